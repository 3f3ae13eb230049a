"""Route text by a run's gates: which expert takes which token, and what a capacity limit would drop.

    gates = Gates(run.path)                             # or with initial weights: Gates(run.path, initial=seed)
    layer = gates.on_text("Fellow citizens of ...")[0]  # the first MoE layer's `Choices`
    layer.dropped(top_k=2, capacity_factor=1.25)

Reads runs and trains nothing. Shape letters as in `moelab.config`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelab import paths
from moelab.config import RoutingConfig
from moelab.data.batches import validation_batches
from moelab.data.preparation import prepare
from moelab.inference.text import load_run, run_configs
from moelab.kernels import Gate
from moelab.lazy import pd
from moelab.models import build
from moelab.models.routing import Router

SPACE = "▁"
"""Marks the space at the beginning of a token."""


@dataclass(frozen=True)
class Choices:
    """The scores that one MoE layer's gate gives the tokens of a text.

    Attributes:
        layer: the layer, counted from 1.
        tokens: the S tokens as text, a leading space written as `SPACE`, bytes that are no character as ``<name>``.
        logits_SE: the gate's scores, fp32.
        top_k: experts per token, as the model was trained.
        rules: the model's.
        bias_E: that loss-free balancing has given the experts, or None.
    """

    layer: int
    tokens: tuple[str, ...]
    logits_SE: Tensor
    top_k: int
    rules: RoutingConfig = field(default=RoutingConfig())
    bias_E: Tensor | None = None

    @property
    def experts(self) -> int:
        """The number of experts E."""
        return self.logits_SE.shape[1]

    @property
    def probability_SE(self) -> Tensor:
        """The gate's probabilities, fp32: scores divided by their sum over the experts."""
        return self._router(self.top_k, self.rules)._probabilities(self.logits_SE)

    def route(self, top_k: int | None = None, capacity_factor: float | None = None) -> Gate:
        """Route by the same scores under another rule, with the code that training uses; the weights stay the same.

        An expert over its capacity keeps tokens at random.

        Args:
            top_k: by default the model's own.
            capacity_factor: None drops nothing.
        """
        rules = replace(self._rules(capacity_factor), random_token_selection=True)
        return self._router(top_k or self.top_k, rules).route(self.logits_SE)

    def _rules(self, capacity_factor: float | None) -> RoutingConfig:
        return replace(self.rules, drop_tokens=capacity_factor is not None, capacity_factor_eval=capacity_factor or 1.0)

    def _router(self, top_k: int, rules: RoutingConfig) -> Router:
        router = Router(1, self.experts, top_k, rules).eval()
        if self.bias_E is not None:
            router.balance_bias = nn.Parameter(self.bias_E, requires_grad=False)
        return router

    def dropped(self, top_k: int | None = None, capacity_factor: float | None = None) -> float:
        """Return the share of the S x K choices that are dropped because their expert is full, 0 to 1."""
        routing = self.route(top_k, capacity_factor)
        return 1 - float(routing.kept_E.sum()) / float(routing.load_E.sum())

    def loads(self, top_k: int, capacity_factor: float) -> tuple[list[int], list[int], int]:
        """Return the tokens that each expert keeps, those that chose it, and its capacity."""
        routing = self.route(top_k, capacity_factor)
        limit = self._rules(capacity_factor).capacity(len(self.tokens), self.experts, top_k, training=False)
        return routing.kept_E.tolist(), routing.load_E.tolist(), limit or len(self.tokens)

    def repeats(self) -> tuple[int, int]:
        """Return how many repeated tokens take the same first expert as before, and how many tokens repeat."""
        earlier: dict[str, int] = {}
        same = [
            earlier[token] == expert
            for token, expert in zip(self.tokens, self.route().expert_SK[:, 0].tolist(), strict=True)
            if token in earlier or earlier.update({token: expert})
        ]
        return sum(same), len(same)


class Gates:
    """Applies the gates of a run's model to a text.

    Args:
        folder: the run's.
        initial: the seed of initial weights to take in place of the trained ones.

    Raises:
        ValueError: the run's model has no MoE layer, or no checkpoint yet.
    """

    def __init__(self, folder: Path, *, initial: int | None = None) -> None:
        self._config, self._text = run_configs(folder)
        if not self._config.is_moe:
            raise ValueError(f"gates: {self._config} is dense, it routes nothing")
        self._data = prepare(self._text, paths.home() / "data")
        self._tokenizer = self._data.tokenizer()
        self._model = (load_run(folder, data=self._data) if initial is None else build(self._config, initial)).eval()

    def on_text(self, text: str) -> list[Choices]:
        """Return one `Choices` per MoE layer, in order.

        Raises:
            ValueError: no text, or more tokens than the model's context.
        """
        ids = self._tokenizer.encode(text)
        if not ids:
            raise ValueError("gates: the text is empty")
        return self._scores(torch.tensor([ids]))

    def on_validation(self, sequences: int) -> list[Choices]:
        """Return the same for the first batch, of so many sequences, of the run's validation text."""
        batches = validation_batches(self._data, sequences, self._text.context)
        return self._scores(next(iter(batches))[1])

    @torch.no_grad()
    def _scores(self, tokens_BT: Tensor) -> list[Choices]:
        recorded: list[tuple[Router, Tensor]] = []

        def record(router: Any, given: tuple[Tensor, ...], _: Gate) -> None:
            recorded.append((router, F.linear(given[0].float(), router.weight.float())))

        routers = [module for module in self._model.modules() if isinstance(module, Router)]
        hooks = [router.register_forward_hook(record) for router in routers]
        try:
            self._model(tokens_BT)
        finally:
            for hook in hooks:
                hook.remove()
        texts = tuple(map(self._text_of, tokens_BT.flatten().tolist()))
        layers = [i + 1 for i, experts in enumerate(self._config.experts) if experts]
        return [
            Choices(layer, texts, logits, self._config.top_k, router.config, router.balance_bias)
            for layer, (router, logits) in zip(layers, recorded, strict=True)
        ]

    def _text_of(self, token: int) -> str:
        text = self._tokenizer.decode([token])
        if "\N{REPLACEMENT CHARACTER}" in text:  # a part of a character: such tokens all decode to the same
            return f"<{self._tokenizer.backend.id_to_token(token)}>"
        return text.replace(" ", SPACE)


def frame(moments: Mapping[str, Choices]) -> pd.DataFrame:
    """Return the numbers of heat maps, one row per token and expert.

    Returns:
        Columns when, layer, position, token, expert, probability, chosen.
    """
    rows = []
    for when, choices in moments.items():
        chosen_SK = choices.route().expert_SK.tolist()
        for position, (token, p_E) in enumerate(zip(choices.tokens, choices.probability_SE.tolist(), strict=True)):
            at = {"when": when, "layer": choices.layer, "position": position, "token": token}
            rows += [
                {**at, "expert": e, "probability": p, "chosen": e in chosen_SK[position]} for e, p in enumerate(p_E)
            ]
    return pd.DataFrame(rows)


def dropped(choices: Choices, factors: Iterable[float], top_k: int | None = None) -> pd.DataFrame:
    """Return the share of choices dropped at each capacity factor.

    Returns:
        Columns layer, experts, top_k, capacity_factor, dropped.
    """
    K = top_k or choices.top_k
    at = {"layer": choices.layer, "experts": choices.experts, "top_k": K}
    return pd.DataFrame([{**at, "capacity_factor": f, "dropped": choices.dropped(K, f)} for f in factors])
