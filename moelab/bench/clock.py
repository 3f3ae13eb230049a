"""Where a step's time goes: a clock that always runs for exactly one part, the innermost one that is being computed."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from moelab.engine.collectives import Collective, observe
from moelab.models import GPT
from moelab.models.moe import MoE

PARTS = ("attention", "gate", "dispatch", "all-to-all", "experts", "combine", "feed-forward", "head", "sums", "rest")
"""experts: with packed weights also dispatch and combine, which are one call with them. feed-forward: dense layers and
the fixed MLP of residual ones. sums: all-reduces and all-gathers outside the exchange. rest: norms, embeddings,
choosing tokens, Python."""


class Clock:
    """Times the parts of a model from `attach` to `detach`.

    Attributes:
        seconds: part -> time since the last `reset`.
        collectives: calls since then, of any kind.
        distinct: experts that had tokens on this rank, one number for each call of an MoE layer's gate.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._cuda = device == "cuda"
        self._stack, self._since = ["rest"], time.perf_counter()
        self._attached: list[tuple[Any, str, Any]] = []
        self._hooks: list[RemovableHandle] = []
        self.reset()

    def reset(self) -> None:
        """Start again at zero."""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.collectives = 0
        self.distinct: list[int] = []
        self._since = self._now()

    def stop(self) -> None:
        """Book the time up to now."""
        self._book()

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def _book(self) -> None:
        now = self._now()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def _part(self, part: str) -> Iterator[None]:
        self._book()
        self._stack.append(part)
        try:
            yield
        finally:
            self._book()
            self._stack.pop()

    def attach(self, model: GPT) -> None:
        """Time this model's parts from now on."""
        for block in model.blocks:
            self._replace(block.attention, "forward", "attention")
            ffn = block.ffn
            if not isinstance(ffn, MoE):
                self._replace(ffn, "forward", "feed-forward")
                continue
            self._replace(ffn.experts, "forward", "experts")
            self._replace(ffn.experts, "of_tokens", "experts")
            self._replace(ffn.dispatcher, "dispatch", "dispatch")
            self._replace(ffn.dispatcher, "combine", "combine")
            if ffn.mlp is not None:
                self._replace(ffn.mlp, "forward", "feed-forward")
            self._replace(ffn.router, "forward", "gate")
            self._hooks.append(ffn.router.register_forward_hook(self._count))
        self._replace(model, "head", "head")

    def detach(self) -> None:
        """Restore the model as it was."""
        while self._hooks:
            self._hooks.pop().remove()
        while self._attached:
            owner, name, before = self._attached.pop()
            if before is None:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

    def _replace(self, owner: Any, name: str, part: str) -> None:
        self._attached.append((owner, name, owner.__dict__.get(name)))
        setattr(owner, name, self._part(part)(getattr(owner, name)))

    @contextlib.contextmanager
    def communication(self) -> Iterator[None]:
        """Time this process's collectives, too, while the context lasts."""
        with observe(self._collective):
            yield

    def _collective(self, call: Collective) -> contextlib.AbstractContextManager:
        self.collectives += 1
        return self._part("all-to-all" if call.operation == "all_to_all" else "sums")

    def _count(self, _: Any, __: Any, routing: Any) -> None:
        self.distinct.append(int((routing.load_E > 0).sum()))
