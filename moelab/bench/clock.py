"""Where a step's time goes: a clock that always runs for exactly one part, the innermost one that is being computed."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from moelab.engine.collectives import Collective, observe
from moelab.models import GPT
from moelab.models.moe import MoE

PARTS = ("attention", "gate", "dispatch", "all-to-all", "experts", "combine", "feed-forward", "head", "sums", "rest")
"""experts: with packed weights (`breakdown` in decode_steps.py) also dispatch and combine. feed-forward: dense layers
and the fixed MLP of residual ones. sums: all-reduces and all-gathers outside the exchange. rest: norms, embeddings,
choosing tokens, Python."""


class Clock:
    """Times the parts of a model.

    Attributes:
        seconds: part -> time since the last `reset`.
        collectives: calls since then, of any kind.
        distinct: experts that had tokens on this rank, one number for each call of an MoE layer's gate.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._cuda = device == "cuda"
        self._stack = ["rest"]
        self.reset()

    def reset(self) -> None:
        """Start again at zero."""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.collectives = 0
        self.distinct: list[int] = []
        self._since = self._now()

    def stop(self) -> None:
        """Book the time up to now."""
        now = self._now()
        self.seconds[self._stack[-1]] += now - self._since
        self._since = now

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    @contextlib.contextmanager
    def _part(self, part: str) -> Iterator[None]:
        self.stop()
        self._stack.append(part)
        try:
            yield
        finally:
            self.stop()
            self._stack.pop()

    @contextlib.contextmanager
    def attached(self, model: GPT) -> Iterator[None]:
        """Time this model's parts and this process's collectives while the context lasts."""
        with contextlib.ExitStack() as undo, observe(self._collective):

            def replace(owner: Any, name: str, part: str) -> None:
                setattr(owner, name, self._part(part)(getattr(owner, name)))
                undo.callback(delattr, owner, name)  # the class's own is found again

            for block in model.blocks:
                replace(block.attention, "forward", "attention")
                ffn = block.ffn
                if not isinstance(ffn, MoE):
                    replace(ffn, "forward", "feed-forward")
                    continue
                replace(ffn.experts, "forward", "experts")
                replace(ffn.dispatcher, "dispatch", "dispatch")
                replace(ffn.dispatcher, "combine", "combine")
                if ffn.mlp is not None:
                    replace(ffn.mlp, "forward", "feed-forward")
                replace(ffn.router, "forward", "gate")
                undo.callback(ffn.router.register_forward_hook(self._count).remove)
            replace(model, "head", "head")
            yield

    def _collective(self, call: Collective) -> contextlib.AbstractContextManager:
        self.collectives += 1
        return self._part("all-to-all" if call.operation == "all_to_all" else "sums")

    def _count(self, _: Any, __: Any, routing: Any) -> None:
        self.distinct.append(int((routing.load_E > 0).sum()))
