"""Climb a ladder of widths with dense, PR-MoE and MoE-128 models, and predict the next rung before it is run.

Shows: final validation losses of the 350M twins at three widths and several token budgets, each budget with its own
decay; a law of the loss for each family (`moelab.design.laws`), with intervals for its floor and exponent; the
*efficiency leverage* of an MoE, which is the training FLOPs that a dense model of the best size needs for the MoE's
loss, over the MoE's own, and the same in measured time; and what the laws predict for a larger width, beside what came.

Beyond the paper, which trains each model for as many tokens and says "5 times less" of one size. Others report that
leverage grows with compute and with the share of inactive experts (Tian et al., arXiv 2507.17702: over 7 for 0.85B
active parameters of 17.5B).

Fixed before the first run: 3 seeds, three widths for the laws, which never see the larger one. A result without
``larger`` is the prediction; it is published before a run of the larger width is trained. The form of the laws and the
budgets that they are fitted to were changed in between, when two seeds of the three widths had been seen (LOG.md).
Every width has the peak rate of the 350M twin: at `cpu` that was the best of two at 96, elsewhere it was not checked.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moelab.config import ModelConfig
from moelab.config.overrides import check_overrides, override
from moelab.design import budgets, settings
from moelab.design.experiment import Experiment, Scale
from moelab.lazy import np, pd
from moelab.runs.collection import Runs
from moelab.runs.spec import RunSpec

if TYPE_CHECKING:
    from moelab.design import laws

ARMS = {"Dense": "350M", "PR-MoE": "350M+PR-MoE-32/64", "MoE-128": "350M+MoE-128"}

WIDTHS = {"smoke": (16, 32, 48), "cpu": (32, 64, 96), "gpu": (128, 192, 256)}
"""Scale -> hidden sizes that the laws are fitted to."""

LARGER = {"smoke": 64, "cpu": 128, "gpu": 384}
"""Scale -> the hidden size that is predicted."""

SETTINGS: dict[str, dict[str, Any]] = {
    "smoke": {"train.tokens": 24_576, "train.warmup_tokens": 2_048, "train.cooldown_tokens": 4_608},
    "cpu": {"train.dtype": "bf16"},
}
"""Scale -> what differs from the scale's own settings: at `smoke` a decay for budgets to branch off before."""

FITTED = 3
"""How many of each width's budgets the laws are fitted to: the longest. At `cpu` the others have 250 and 500 steps."""

REFITS = {"smoke": 40}
"""Scale -> refits behind an interval, where fewer than `moelab.design.laws.DRAWS`: no law fits untrained models."""

INTERVAL = ("value", "low", "high")


def build(scale: str, seed: int, overrides: Mapping[str, Any], *, larger: bool = False) -> list[RunSpec]:
    """Return every family at every width and budget, for one seed.

    Args:
        larger: also at the width that is predicted.
    """
    widths = WIDTHS[scale] + ((LARGER[scale],) if larger else ())
    trunks = [_trunk(arm, name, width, scale, seed, overrides) for width in widths for arm, name in ARMS.items()]
    return budgets.expand(trunks, [trunk.label for trunk in trunks], scale)


def _trunk(arm: str, name: str, width: int, scale: str, seed: int, overrides: Mapping[str, Any]) -> RunSpec:
    if "model.hidden" in overrides:
        raise ValueError("model.hidden is what its runs differ in, so it cannot be set")
    label = _label(arm, width)
    given = check_overrides(SETTINGS.get(scale, {}) | dict(overrides))
    spec = settings.spec(name, scale, seed, label=label, overrides=given)
    whole = ModelConfig.parse(name)
    shape: dict[str, Any] = {**settings.SHAPES[scale], "hidden": whole.hidden / width}
    model = replace(whole.shrink(**shape), routing=spec.model.routing, name=f"{spec.model} {width} wide")
    return replace(spec, model=override("model", model, given))


def _label(arm: str, width: int) -> str:
    return f"{arm}, {width} wide"


def points(runs: Runs) -> pd.DataFrame:
    """Return the finished trunks and budgets.

    Columns: arm, width, seed, flops (training FLOPs of a token), tokens, compute (FLOPs), loss (nats per token).
    """
    rows = []
    for run in runs.finished:
        trunk = run.spec.start.run if run.spec.start else run.spec
        flops, tokens = run.spec.model.flops_per_token(context=run.spec.data.context), run.result["tokens"]
        arm, loss = trunk.label.split(",")[0], run.result["validation_loss"]
        rows.append([arm, run.spec.model.hidden, run.spec.train.seed, flops, tokens, flops * tokens, loss])
    return pd.DataFrame(rows, columns=["arm", "width", "seed", "flops", "tokens", "compute", "loss"])


def longest(table: pd.DataFrame) -> pd.DataFrame:
    """Return the points of the budgets that the laws are fitted to; `table` comes from `points`."""
    return table[table["tokens"].isin(sorted(table["tokens"].unique())[-FITTED:])]


def fits(table: pd.DataFrame, scale: str) -> dict[str, laws.Fit]:
    """Return the law of each family, fitted to the widths below the larger one; families with too few points lack it.

    `table` comes from `points`.
    """
    from moelab.design import laws

    table, by_arm = longest(table), {}
    for arm in ARMS:
        try:
            mine = table[(table["arm"] == arm) & table["width"].isin(WIDTHS[scale])]
            by_arm[arm] = laws.fit(mine, REFITS.get(scale, 0))
        except ValueError:
            continue
    return by_arm


def constants(fits: Mapping[str, laws.Fit]) -> pd.DataFrame:
    """Return floor (nats) and exponents of each law: columns arm, constant, value, low, high."""
    exponents = {"alpha": "exponent of size", "beta": "exponent of data", "exponent": "exponent of compute"}
    rows = [
        [arm, title, *fitted.interval(operator.attrgetter(name))]
        for arm, fitted in fits.items()
        for name, title in ({"floor": "floor"} | exponents).items()
    ]
    return pd.DataFrame(rows, columns=["arm", "constant", *INTERVAL])


def curves(fits: Mapping[str, laws.Fit], table: pd.DataFrame, scale: str) -> pd.DataFrame:
    """Return each law along the budgets of each width: columns arm, width, compute (FLOPs), loss.

    `fits` and `table` come from `fits` and `points`.
    """
    table, parts = longest(table), []
    for arm, fitted in fits.items():
        mine = table[table["arm"] == arm]
        for width in WIDTHS[scale]:
            flops = mine.loc[mine["width"] == width, "flops"].iloc[0]
            tokens = np.geomspace(mine["tokens"].min(), mine["tokens"].max(), 40)
            loss = fitted.law.loss(flops, tokens)
            parts.append(pd.DataFrame({"arm": arm, "width": width, "compute": flops * tokens, "loss": loss}))
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["arm", "width", "compute", "loss"])


@dataclass(frozen=True)
class Leverage:
    """Hold the efficiency leverage of an MoE at a width and a budget, at its mean loss over seeds.

    Attributes:
        at: what a dense model needs more of: "training FLOPs" or "time".
        compute: the MoE's training FLOPs.
        value: infinite where the loss is at the dense law's floor or below it.
        draws: the same with the dense law's refits, and with the MoE's loss moved as far as so many seeds can move it.
        beyond: the dense model would need more compute than any dense run had, so that the law is extrapolated.
    """

    at: str
    arm: str
    width: int
    tokens: int
    compute: float
    value: float
    draws: np.ndarray
    beyond: bool


def leverages(
    table: pd.DataFrame, fits: Mapping[str, laws.Fit], speeds: Mapping[str, Sequence[float]]
) -> list[Leverage]:
    """Return the efficiency leverage of each MoE at each width and fitted budget, in FLOPs and in time.

    In time it is what training the dense model of the fewest FLOPs takes, over the MoE's own time. A dense model
    between two widths has FLOPs/s between theirs, one beyond them those of the nearest.

    Args:
        table, fits: from `points` and `fits`.
        speeds: arm and width, as the trunks' labels have them -> training tokens/s, measured side by side.
    """
    if not (dense := fits.get("Dense")):
        return []
    table = longest(table)
    sizes = table[table["arm"] == "Dense"].groupby("width")["flops"].first()
    rates = [flops * np.median(speeds[_label("Dense", width)]) for width, flops in sizes.items()]
    most = table.loc[table["arm"] == "Dense", "compute"].max()
    budgets, found = sorted(table["tokens"].unique()), []
    for (arm, width, tokens, compute), part in table.groupby(["arm", "width", "tokens", "compute"], sort=False):
        if arm == "Dense" or arm not in fits:
            continue
        loss, seconds = part["loss"].mean(), tokens / np.median(speeds[_label(arm, width)])
        moved = loss + fits[arm].spread(part["seed"].nunique(), stream=width)[:, budgets.index(tokens)]
        for at, cost, rate in (("training FLOPs", compute, [1.0] * len(sizes)), ("time", seconds, rates)):

            def times(law: laws.Law, loss: float, cost: float = cost, rate: Sequence[float] = rate) -> float:
                flops, count = law.best(loss)
                return flops * count / float(np.interp(np.log(flops), np.log(sizes), rate)) / cost

            value, draws = times(dense.law, loss), np.array([*map(times, dense.draws, moved)])
            found.append(Leverage(at, arm, width, tokens, compute, value, draws, dense.law.compute(loss) > most))
    return found


def summary(levers: Sequence[Leverage]) -> pd.DataFrame:
    """Return leverages with the bounds of their intervals: the fields of `Leverage`, low and high instead of draws."""
    from moelab.design import laws

    rows = [vars(lever) | dict(zip(("low", "high"), laws.bounds(lever.draws), strict=True)) for lever in levers]
    return pd.DataFrame(rows, columns=["at", "arm", "width", "tokens", "compute", *INTERVAL, "beyond"])


def trend(levers: Sequence[Leverage]) -> pd.DataFrame:
    """Return by which factor ten times the compute changes each MoE's leverage, over the widths at their most tokens.

    The factor is that of a power law through the widths' leverages; infinite where one of them is. Columns: at, arm,
    value, low, high.
    """
    from moelab.design import laws

    rows, most = [], max((lever.tokens for lever in levers), default=0)
    for at, arm in dict.fromkeys((lever.at, lever.arm) for lever in levers):
        mine = [lever for lever in levers if (lever.at, lever.arm, lever.tokens) == (at, arm, most)]
        if len(mine) > 1:
            along = np.log10([lever.compute for lever in mine])
            along -= along.mean()
            by_draw = np.column_stack([[lever.value, *lever.draws] for lever in mine])
            with np.errstate(invalid="ignore"):
                slopes = np.log10(by_draw) @ along / (along @ along)  # of least squares
            value, *draws = np.where(np.isfinite(by_draw).all(axis=1), 10**slopes, math.inf)
            rows.append([at, arm, value, *laws.bounds(draws)])
    return pd.DataFrame(rows, columns=["at", "arm", *INTERVAL])


def prediction(
    table: pd.DataFrame,
    fits: Mapping[str, laws.Fit],
    scale: str,
    seeds: int,
    overrides: Mapping[str, Any] | None = None,
) -> pd.DataFrame:
    """Return what the laws predict for the larger width, and the losses that were measured.

    Columns: arm, width, tokens, compute, value, low, high (95 % for the mean over the seeds), measured (missing where
    nothing was run), seeds (that were), miss (measured minus value, nats), inside.

    Args:
        table, fits: from `points` and `fits`.
        seeds: of the larger runs; those that were run where there are any.
        overrides: those of the runs, with which a token of the larger width costs other FLOPs.
    """
    width, table, rows = LARGER[scale], longest(table), []
    for arm, fitted in fits.items():
        mine = table[table["arm"] == arm]
        spec = _trunk(arm, ARMS[arm], width, scale, 0, overrides or {})
        flops = spec.model.flops_per_token(context=spec.data.context)
        tokens = sorted(mine.loc[mine["width"].isin(WIDTHS[scale]), "tokens"].unique())
        came = mine[mine["width"] == width]
        count = came["seed"].nunique() or seeds
        for budget, expected in zip(tokens, fitted.predict(flops, tokens, count), strict=True):
            losses = came.loc[came["tokens"] == budget, "loss"]
            measured = losses.mean() if len(losses) else float("nan")
            inside = expected[1] <= measured <= expected[2] if len(losses) else None
            rows.append(
                [arm, width, budget, flops * budget, *expected, measured, len(losses), measured - expected[0], inside]
            )
    columns = ["arm", "width", "tokens", "compute", *INTERVAL, "measured", "seeds", "miss", "inside"]
    return pd.DataFrame(rows, columns=columns)


def headline(levers: pd.DataFrame) -> str:
    """Return, in one line, the leverage of MoE-128 at its largest rung, in FLOPs and in time; from `summary`."""
    mine = levers[levers["arm"] == "MoE-128"]
    if mine.empty:
        return "too few runs have finished to fit a law"
    last = mine[mine["compute"] == mine["compute"].max()].set_index("at")
    said = [
        f"{last.loc[at, 'value']:.1f} ({last.loc[at, 'low']:.1f} to {last.loc[at, 'high']:.1f}) times its {what}"
        for at, what in (("training FLOPs", "FLOPs"), ("time", "time"))
        if at in last.index
    ]
    return f"To reach MoE-128's loss at the largest rung, dense models need {' and '.join(said)}"


def of_most_tokens(levers: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `summary` at the most tokens: a leverage of each MoE at each width."""
    return levers[levers["tokens"] == levers["tokens"].max()]


def leverage_headline(levers: pd.DataFrame) -> str:
    """Return in one line what dense models cost at the largest rung, from `summary`."""
    flops = of_most_tokens(levers[levers["at"] == "training FLOPs"])
    if flops.empty:
        return "too few runs have finished to fit a law"
    last = flops.loc[flops["width"] == flops["width"].max(), "value"]
    return f"Largest rung: dense takes {last.min():.1f} to {last.max():.1f} times an MoE's FLOPs"


def prediction_headline(predicted: pd.DataFrame) -> str:
    """Return in one line how many losses of the larger rung lie inside their intervals, from `prediction`."""
    came = predicted[predicted["seeds"] > 0]
    if came.empty:
        return "The larger rung is predicted, not run"
    return f"{came['inside'].sum()} of {len(came)} losses of the larger rung inside the predicted intervals"


EXPERIMENT = Experiment(
    name="ladder",
    number=28,
    title="A ladder with a prediction",
    paper="beyond the paper",
    question="How much compute does an MoE save, does that grow with size, and can the next size be predicted?",
    paper_answer="Training 1.3B+MoE-128 costs a fifth of the dense 6.7B of its quality (Table 3); no law over sizes.",
    scales={
        "smoke": Scale("twins 16 to 48 wide (predicted: 64); up to 25 k tokens of sotu", "seconds (tests)"),
        "cpu": Scale(
            "twins 32 to 96 wide (predicted: 128), 8 layers; 1 to 16.4 M tokens of mix5, in bf16",
            "1.5 hours a seed on one core, 1.1 more with larger=true",
        ),
        "gpu": Scale("twins 128 to 256 wide (predicted: 384); 25 to 400 M tokens of the Pile", "not yet run; one GPU"),
    },
    build=build,
    measures_on_gpu=("gpu",),
)
