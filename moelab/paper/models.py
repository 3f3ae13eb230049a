"""The models of the paper: shapes, sizes as stated and as computed, parallel degrees."""

from __future__ import annotations

from dataclasses import dataclass

from moelab.config import ModelConfig
from moelab.lazy import pd
from moelab.paper._table import Provenance, Table, load

RUN_SUFFIXES = ("+KD", "+MoS")
"""What a run label adds to a student's name: distilled throughout, or staged distillation (Mixture-of-Students)."""


@dataclass(frozen=True, kw_only=True)
class PaperModel(Provenance):
    """One architecture.

    Sizes are in billions of parameters (`_B`); a degree or count that no document states is `None`.

    experts: experts per layer from the first layer to the last, 0 for a dense layer. top_k: experts per token (0:
    dense model). residual: every MoE layer also sends each token through a fixed MLP. experts_kind: `stated`,
    `derived` (the standard layout of every second layer) or `assumed`. stated_B: the size the documents print, with
    stated_precision_B the half unit of its last digit and stated_kind `nominal` (a name), `rounded` (a size in a
    table or text) or `none`. computed_B and active_B: our arithmetic (tied embedding, vocabulary 50304, 2048
    positions, all biases and gates); active_B counts `top_k` experts per MoE layer plus the residual MLP.
    stated_active_B: the active size the documents print. training_*/inference_*: tensor-parallel (tp),
    expert-parallel (ep) and expert-slicing degrees and GPU counts; inference_gpus lists every count measured.
    """

    model: str
    base: str
    role: str
    layers: int
    hidden: int
    heads: int | None
    experts: tuple[int, ...]
    experts_kind: str
    top_k: int
    residual: bool
    stated_B: float | None
    stated_precision_B: float | None
    stated_kind: str
    computed_B: float
    stated_active_B: float | None
    active_B: float
    training_tp: int | None
    training_ep: int | None
    training_gpus: int | None
    inference_tp: int | None
    inference_ep: int | None
    inference_expert_slicing: int | None
    inference_gpus: tuple[int, ...]

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers that hold experts, counted from 1."""
        return tuple(number for number, count in enumerate(self.experts, start=1) if count)


def models() -> Table[PaperModel]:
    """Every architecture of the paper, plus the released 125M example."""
    return load("models.csv", PaperModel)


def model(name: str) -> PaperModel:
    """One architecture by its name, such as `350M+PR-MoE-32/64`; ValueError names close matches.

    A student's run label (`…+L21+KD`, `…+L21+MoS`) finds the student: distillation changes the training, not the shape.
    """
    plain = name
    for suffix in RUN_SUFFIXES:
        if name.endswith("+L21" + suffix):
            plain = name.removesuffix(suffix)
    return models().where(model=plain)[0]


def size_table() -> pd.DataFrame:
    """Return the models that the paper trains for quality, by `ModelConfig.parse`, with the size that the paper states.

    One row per model: layers, hidden, experts (``10 x 32, 2 x 64`` by layer), residual, parameters and active
    parameters (billions), stated (billions), off (parameters over stated, minus 1). Stated sizes are rounded as
    printed.
    """
    rows = {}
    for row in models():
        if row.role.startswith("quality") and row.stated_B is not None:
            model = ModelConfig.parse(row.model)
            counts = {e: model.experts.count(e) for e in sorted(set(model.experts)) if e}
            rows[row.model] = {
                "layers": model.layers,
                "hidden": model.hidden,
                "MoE layers x experts": ", ".join(f"{n} x {e}" for e, n in counts.items()) or "–",
                "residual": "yes" if model.residual else "",
                "parameters (B)": model.parameters() / 1e9,
                "active (B)": model.active_parameters() / 1e9,
                "paper (B)": row.stated_B,
                "off": model.parameters() / 1e9 / row.stated_B - 1,
            }
    return pd.DataFrame(rows.values(), index=pd.Index(rows, name="model"))
