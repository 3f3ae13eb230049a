"""Routing made visible: which expert takes which token, and what a capacity limit would drop.

    gates = routing_view.Gates(run)                    # or trained=False: as the run began
    layer = gates.on_text("Fellow citizens of ...")[0]  # the first MoE layer's `Choices`
    routing_view.heatmap(layer, ax)
    routing_view.loads(gates.on_validation()[0], ax, top_k=1, capacity_factor=1.0)
    layer.dropped(top_k=2, capacity_factor=1.25)

Reads runs and draws; trains nothing. Letters as in `moelab.config`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelab import paths
from moelab.config import RoutingConfig
from moelab.data import prepare, validation_batches
from moelab.inference.text import load_run
from moelab.kernels import Gate, gate
from moelab.models import build
from moelab.models.routing import Router
from moelab.runs.store import Run

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    import pandas as pd
    from matplotlib.axes import Axes

KEPT, DROPPED, CHOSEN = "#0072B2", "#D55E00", "#D55E00"
SPACE = "▁"
"""Stands for the space that begins a token."""


@dataclass(frozen=True)
class Choices:
    """How one MoE layer's gate scores the tokens of a text.

    Attributes:
        layer: counting from 1.
        tokens: what each token says, S texts, a leading space written as `SPACE`.
        logits_SE: the gate's scores, fp32.
        top_k: experts a token, as the model was trained.
    """

    layer: int
    tokens: tuple[str, ...]
    logits_SE: Tensor
    top_k: int

    @property
    def experts(self) -> int:
        """E."""
        return self.logits_SE.shape[1]

    @property
    def probability_SE(self) -> Tensor:
        """The gate's probabilities, fp32."""
        return self.logits_SE.softmax(1)

    def route(self, top_k: int | None = None, capacity_factor: float | None = None, *, by_chance: bool = True) -> Gate:
        """The same scores under another rule (the code that training uses); nothing is learned anew.

        Args:
            top_k: by default the model's own.
            capacity_factor: None drops nothing.
            by_chance: an over-full expert keeps tokens at random, else the earliest.
        """
        K, limit = top_k or self.top_k, None
        if capacity_factor is not None:
            rule = RoutingConfig(capacity_factor=capacity_factor)
            limit = rule.capacity(len(self.tokens), self.experts, K, training=True)
        return gate(self.logits_SE, K, limit, seed=0 if by_chance else None, normalize=K > 1)

    def dropped(self, top_k: int | None = None, capacity_factor: float | None = None) -> float:
        """Share of the S x K choices that find their expert full, 0 to 1."""
        made = self.route(top_k, capacity_factor)
        return 1 - float(made.kept_E.sum()) / float(made.load_E.sum())

    def repeats(self) -> tuple[int, int]:
        """Of the tokens that stand earlier in the text already: how many take the same first expert as there, and how many there are."""
        earlier: dict[str, int] = {}
        same = [
            earlier[token] == expert
            for token, expert in zip(self.tokens, self.route().expert_SK[:, 0].tolist(), strict=True)
            if token in earlier or earlier.update({token: expert})
        ]
        return sum(same), len(same)


class Gates:
    """A run's MoE layers, asked what they would do with a text.

    Args:
        trained: False takes the weights that the run began with.

    Raises:
        ValueError: the run's model has no MoE layer, or no checkpoint yet.
    """

    def __init__(self, run: Run, *, trained: bool = True) -> None:
        spec = run.spec
        if not spec.model.is_moe:
            raise ValueError(f"gates: {spec.title} is dense, it routes nothing")
        self._spec = replace(spec, train=replace(spec.train, device="cpu"))
        self._data = prepare(spec.data, paths.home() / "data")
        self._tokenizer = self._data.tokenizer()
        self._model = (load_run(run.path) if trained else build(spec.model, spec.train.seed)).eval()

    def on_text(self, text: str) -> list[Choices]:
        """One `Choices` per MoE layer, in order.

        Raises:
            ValueError: no text, or more tokens than the model's context.
        """
        ids = self._tokenizer.encode(text)
        if not ids:
            raise ValueError("gates: the text is empty")
        return self._listen(torch.tensor([ids]))

    def on_validation(self) -> list[Choices]:
        """The same for the first batch of the run's validation text, as many sequences as a training step has."""
        spec = self._spec
        batches = validation_batches(self._data, spec.train.batch_size, spec.data.context)
        return self._listen(next(iter(batches))[1])

    @torch.no_grad()
    def _listen(self, tokens_BT: Tensor) -> list[Choices]:
        heard: list[Tensor] = []

        def note(router: nn.Module, given: tuple[Tensor, ...], _: Gate) -> None:
            heard.append(F.linear(given[0].float(), router.weight.float()))

        routers = [module for module in self._model.modules() if isinstance(module, Router)]
        hooks = [router.register_forward_hook(note) for router in routers]
        try:
            self._model(tokens_BT)
        finally:
            for hook in hooks:
                hook.remove()
        texts = tuple(self._tokenizer.decode([i]).replace(" ", SPACE) for i in tokens_BT.flatten())
        layers = [i + 1 for i, experts in enumerate(self._spec.model.experts) if experts]
        K = self._spec.model.top_k
        return [Choices(layer, texts, logits, K) for layer, logits in zip(layers, heard, strict=True)]


def heatmap(choices: Choices, ax: Axes, *, top: float | None = None) -> Axes:
    """The gate's probabilities as a picture, a column a token and a row an expert; a ring marks the chosen expert.

    Args:
        top: the probability of the darkest blue, for pictures to be compared; by default the highest there is.
    """
    shown = choices.probability_SE.T
    image = ax.imshow(shown.numpy(), aspect="auto", cmap="Blues", vmin=0, vmax=top, interpolation="nearest")
    for expert_S in choices.route().expert_SK.T:
        ax.plot(
            range(len(expert_S)),
            expert_S.numpy(),
            "o",
            markersize=8,
            markeredgewidth=1.8,
            markerfacecolor="none",
            color=CHOSEN,
            clip_on=False,
        )
    ax.set_xticks(range(len(choices.tokens)), choices.tokens, rotation=90, family="monospace")
    ax.set_yticks(range(0, choices.experts, max(1, choices.experts // 8)))
    ax.set(ylabel="expert")
    ax.grid(visible=False)
    ax.figure.colorbar(image, ax=ax, label="gate's probability", pad=0.01)
    return ax


def frame(moments: Mapping[str, Choices]) -> pd.DataFrame:
    """The numbers of heat maps, a row a token and expert: columns when, layer, position, token, expert, probability, chosen."""
    import pandas as pd

    rows = []
    for when, choices in moments.items():
        chosen_SK = choices.route().expert_SK.tolist()
        for position, (token, p_E) in enumerate(zip(choices.tokens, choices.probability_SE.tolist(), strict=True)):
            at = {"when": when, "layer": choices.layer, "position": position, "token": token}
            rows += [
                {**at, "expert": e, "probability": p, "chosen": e in chosen_SK[position]} for e, p in enumerate(p_E)
            ]
    return pd.DataFrame(rows)


def loads(choices: Choices, ax: Axes, *, top_k: int, capacity_factor: float) -> Axes:
    """What each expert is asked to take, kept and dropped, against its capacity."""
    made = choices.route(top_k, capacity_factor)
    kept, asked = made.kept_E.tolist(), made.load_E.tolist()
    experts = range(choices.experts)
    ax.bar(experts, kept, color=KEPT, label="kept")
    over = [a - k for a, k in zip(asked, kept, strict=True)]
    ax.bar(experts, over, bottom=kept, color=DROPPED, hatch="///", edgecolor="white", label="dropped")
    limit = RoutingConfig(capacity_factor=capacity_factor).capacity(len(choices.tokens), choices.experts, top_k, True)
    ax.axhline(limit, color="#444444", linestyle="--", linewidth=1, label=f"capacity {limit}")
    share, slots = choices.dropped(top_k, capacity_factor), choices.experts * limit
    ax.set(
        xlabel="expert",
        ylabel="tokens",
        title=f"{share:.0%} of {sum(asked):,} choices dropped, {1 - sum(kept) / slots:.0%} of {slots:,} slots empty",
    )
    ax.set_xticks(experts)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def dropped(choices: Choices, factors: Iterable[float], top_k: int | None = None) -> pd.DataFrame:
    """Share of choices dropped at each capacity factor: columns layer, experts, top_k, capacity_factor, dropped."""
    import pandas as pd

    K = top_k or choices.top_k
    at = {"layer": choices.layer, "experts": choices.experts, "top_k": K}
    return pd.DataFrame([{**at, "capacity_factor": f, "dropped": choices.dropped(K, f)} for f in factors])
