"""Measure the spread over seeds, and find what makes it (beyond the paper, which gives one run per arm).

Shows: the standard deviation of the final loss over seeds, of a single arm and of the difference of two arms with the
same seed (same shared weights, same data order), and how many seeds an effect needs to be seen. At `full` it is the
study from which the twin was chosen that answers the paper's figures: candidates are trained for 30 M tokens, and for
each it shows when copying begins, how far the seeds end apart, and which attention heads copy.

Fixed before the first run, below `full`: the seeds of the experiments that share these runs, first 3, later 5. The pair
of PR-MoE and MoE-128 was added after its runs were seen.

The limits of the study were set before its runs, on 2026-12-02; runs of full length on record were known. How the onset
is interpolated, and the order of the candidates, was written down when the first seed had ended:

- *Onset* of copying: the tokens after which the loss of copyable tokens (whose pair, the token before and itself,
  occurred earlier in the sequence) is below `ONSET_NATS`, interpolated between evaluations.
- A candidate passes where on every seed the onset lies below `MAX_ONSET` of a whole training, and the final losses of
  its dense and its MoE arm each have a standard deviation of at most `MAX_SPREAD` over three seeds or more. Runs of
  full length on record count.
- Of those that pass, the smallest change is taken, then the cheapest: first the twins of the 1.3B base as they are
  (64 wide, two heads), then the 350M base's with smeared keys, then both together; wider changes (a norm on queries
  and keys, a convolution of queries, keys and values) only where none of these passes.
- Seeds from 100 on, of which no claim has a run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from moelab import paths
from moelab.design import comparison, power, settings
from moelab.design.experiment import Experiment, Scale, twin_scales
from moelab.design.judging import MIN_SAMPLES
from moelab.lazy import np, pd
from moelab.runs import evaluations
from moelab.runs.collection import Runs
from moelab.runs.spec import RunSpec
from moelab.runs.store import Run

ARMS = {
    "Dense": "350M",
    "MoE-32": "350M+MoE-32",
    "PR-MoE-32/64": "350M+PR-MoE-32/64",
    "MoE-128": "350M+MoE-128",
}
PAIRS = (("MoE-128", "Dense"), ("MoE-32", "Dense"), ("MoE-128", "MoE-32"), ("PR-MoE-32/64", "MoE-128"))

_SMEARED = {"model.decoder.smeared_keys": True}
_TWO_HEADS = {"model.heads": 2, "model.decoder.head_size": 32}
_MOE = {"MoE-32": "350M+MoE-32"}
CANDIDATES: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "smeared keys": ({"Dense": "350M", **_MOE}, _SMEARED),
    "smeared keys, fp32": (_MOE, {**_SMEARED, "train.dtype": "fp32"}),
    "smeared keys, two heads of 32": (_MOE, {**_SMEARED, **_TWO_HEADS}),
}
"""Change of the 350M base's twin -> its arms, and its settings. The last two look for the cause of what is left."""

RECORDED: dict[str, tuple[dict[str, str], Sequence[int]]] = {
    "350M": ({"Dense": "350M", **_MOE, "MoE-128": "350M+MoE-128"}, range(9)),
    "1.3B": ({"Dense": "350M", "MoE-128": "350M+MoE-128", "PR-MoE-64/128": "350M+PR-MoE-64/128"}, (0, 1, 2, 100)),
}
"""Base -> arms of full length on record, as on the 350M base, and their seeds."""

TOKENS = 30_003_200
"""Of a run of the study: at this length the seeds of the 350M base's twins lie far apart."""

TOKEN_KINDS = ("repeated", "changed", "new")
"""`moelab.data.batches.PAIRS`, whose module loads torch; "repeated" tokens are the copyable ones."""

ONSET_NATS = 2.7
"""Loss of copyable tokens below which a model copies: without copying it stays above 3, at the end it is near 1."""
MAX_ONSET = 0.10
MAX_SPREAD = 0.015
HEAD_TOKENS = 8192
"""Validation tokens of each domain on which heads are removed."""


def build(
    scale: str, seed: int, overrides: Mapping[str, Any], *, candidates: Sequence[str] | None = None
) -> list[RunSpec]:
    """Return the runs of one seed: at `full` the arms of every candidate, elsewhere `ARMS`.

    Args:
        candidates: those that are wanted at `full`; None means all.
    """
    if scale != "full":
        return settings.of_arms(ARMS, scale, seed, overrides)
    if unknown := set(candidates or ()) - set(CANDIDATES):
        raise ValueError(f"unknown candidate {min(unknown)!r}; allowed: {', '.join(CANDIDATES)}")
    specs = []
    for candidate in candidates or CANDIDATES:
        arms, own = CANDIDATES[candidate]
        given = {"train.tokens": TOKENS, **own, **overrides}
        for spec in settings.of_arms(arms, scale, settings.SWEEP_SEED + seed, given, rate="shared"):
            specs.append(replace(spec, label=f"{spec.label}, {candidate}"))
    return specs


def recorded() -> list[RunSpec]:
    """Return the runs of full length whose twins no candidate changes, on the seeds that have them (`RECORDED`)."""
    return [
        replace(spec, label=f"{spec.label}, {base} base, full length")
        for base, (arms, seeds) in RECORDED.items()
        for seed in seeds
        for spec in settings.of_arms(arms, "full", seed, {}, base=base, rate="shared")
    ]


def deviations(final: pd.DataFrame) -> pd.DataFrame:
    """Return standard deviations over seeds of the difference of two arms, of pairs that have two seeds or more.

    Columns: what (the pair), mean, paired, unpaired (if seeds were not shared), seeds, and the seeds of each arm with
    which one look tells an effect of 0.03 or 0.01 nats with 80 % power, unpaired as claims are judged
    (`moelab.design.power`); None is more than `MAX_SEEDS`.
    """
    table = comparison.by_arm(final)
    rows = []
    for left, right in PAIRS:
        if left in table and right in table and len(both := table[[left, right]].dropna()) > 1:
            gap = both[left] - both[right]
            spreads = {left: both[left].std(), right: both[right].std()}
            unpaired, weights = math.hypot(*spreads.values()), {left: 1.0, right: -1.0}
            needed = [power.of_contrasts([(weights, e)], spreads, looks=False).at_once for e in (0.03, 0.01)]
            rows.append([f"{left} − {right}", gap.mean(), gap.std(), unpaired, len(both), *needed])
    columns = ["what", "mean", "paired", "unpaired", "seeds", "seeds for 0.03", "seeds for 0.01"]
    return pd.DataFrame(rows, columns=columns)


def spread_title(table: pd.DataFrame) -> str:
    """Return, in one line, what sharing seeds does for the first pair of `deviations`."""
    if not len(table):
        return headline(table)
    first = table.iloc[0]
    return f"Standard deviation, same / other seeds: {first['what']} {first['paired']:.3f} / {first['unpaired']:.3f}"


def headline(table: pd.DataFrame) -> str:
    """Return, in one line, how sharing seeds changes the spread of the first pair and of that which it helps most.

    `table` comes from `deviations`.
    """
    if not len(table):
        return "no pair of arms has finished two seeds"
    most = table.loc[(table["paired"] / table["unpaired"]).idxmin()]
    pairs = {row["what"]: f"{row['what']} {row['paired']:.3f} / {row['unpaired']:.3f}" for row in (table.iloc[0], most)}
    return (
        f"Standard deviation of a difference, same seeds / other seeds: {', '.join(pairs.values())} nats "
        f"({most['seeds']:.0f} seeds)"
    )


def onset(tokens: Sequence[float], copyable: Sequence[float]) -> float:
    """Return the tokens after which the loss of copyable tokens stays below `ONSET_NATS`, interpolated; NaN if never.

    Args:
        tokens: at which the model was evaluated, increasing.
        copyable: its loss on copyable tokens there, nats per token.
    """
    above = [i for i, loss in enumerate(copyable) if loss >= ONSET_NATS]
    if not above:
        return tokens[0]
    if (i := above[-1]) + 1 == len(tokens):
        return math.nan
    part = (copyable[i] - ONSET_NATS) / (copyable[i] - copyable[i + 1])
    return tokens[i] + part * (tokens[i + 1] - tokens[i])


def study(runs: Runs) -> pd.DataFrame:
    """Return a row per finished run that was evaluated by kind of token.

    Columns: arm, seed, onset (share of a whole training, see `onset`), loss (final, nats per token), and the final
    loss of each of `TOKEN_KINDS`.
    """
    whole = settings.TRAINS["full"].tokens
    rows = []
    for run in runs.finished:
        if by_kind := run.result.get("validation_by_pair"):
            points = [(r["tokens"], r["by_pair"]["repeated"]["loss"]) for r in _evaluations(run)]
            began = onset(*zip(*points, strict=True)) / whole if points else math.nan
            losses = [by_kind[kind]["loss"] for kind in TOKEN_KINDS]
            rows.append([run.spec.title, run.spec.train.seed, began, run.result["validation_loss"], *losses])
    return pd.DataFrame(rows, columns=["arm", "seed", "onset", "loss", *TOKEN_KINDS])


def _evaluations(run: Run) -> list[dict[str, Any]]:
    return [row for row in run.rows("validation.jsonl").to_dict("records") if isinstance(row.get("by_pair"), dict)]


def spreads(table: pd.DataFrame) -> pd.DataFrame:
    """Return a row per arm of `study`: seeds, latest onset, mean loss, and standard deviations over seeds.

    Columns: arm, seeds, latest onset, mean, spread (of the final loss), one of each of `TOKEN_KINDS`, and passes
    (whether onset and spread keep the limits; None with fewer than three seeds, which say too little about a spread).
    """
    rows = []
    for arm, part in table.groupby("arm", sort=False):
        late = math.nan if part["onset"].isna().any() else part["onset"].max()
        spread = part["loss"].std()
        passes = None if len(part) < MIN_SAMPLES else bool(late < MAX_ONSET and spread <= MAX_SPREAD)
        kinds = [part[kind].std() for kind in TOKEN_KINDS]
        rows.append([arm, len(part), late, part["loss"].mean(), spread, *kinds, passes])
    return pd.DataFrame(rows, columns=["arm", "seeds", "latest onset", "mean", "spread", *TOKEN_KINDS, "passes"])


def correlation(table: pd.DataFrame) -> float:
    """Return the mean correlation over seeds of two arms' losses, over pairs of arms with three seeds in common.

    Near zero, differences paired by seed are no narrower than unpaired ones. NaN without such a pair.
    """
    by_seed = table.pivot(index="seed", columns="arm", values="loss")
    pairs = by_seed.corr(min_periods=3).to_numpy()
    return float(np.nanmean(pairs[np.triu_indices(len(pairs), 1)])) if len(pairs) > 1 else math.nan


def study_headline(table: pd.DataFrame) -> str:
    """Return in one line how many arms of `spreads` pass."""
    judged = table["passes"].dropna()
    if not len(judged):
        return "No arm has finished three seeds"
    return f"{judged.sum():.0f} of {len(judged)} arms copy early and spread at most {MAX_SPREAD} nats"


def heads(runs: Runs) -> pd.DataFrame:
    """Return a row per attention head of each run that has weights or was measured with them.

    Columns: arm, seed, layer, head, copies (whether it copies), and of each of `TOKEN_KINDS` how far the loss rises
    without it (nats per token).
    """
    rows = [
        {"arm": run.spec.title, "seed": run.spec.train.seed, **head}
        for run, found in evaluations.measure_all(runs.finished, head_effects, HEAD_TOKENS)
        for head in found
    ]
    return pd.DataFrame(rows, columns=["arm", "seed", "layer", "head", "copies", *TOKEN_KINDS])


def head_effects(run: Run, tokens: int) -> list[dict[str, Any]]:
    """Return what each head of a run is for, see `moelab.evaluation.heads.Head`; tokens as `HEAD_TOKENS`."""
    from moelab.data.preparation import prepare
    from moelab.evaluation import heads as measured
    from moelab.inference.text import load_run

    spec = run.spec
    data = prepare(spec.data, paths.home() / "data")
    model = load_run(run.path, data=data, device="cpu").eval()
    found = measured.head_effects(model, data, spec.train.batch_size, spec.data.context, tokens)
    return [{"layer": h.layer, "head": h.head, "copies": h.copies, **h.rise} for h in found]


def copying(table: pd.DataFrame, effects: pd.DataFrame) -> pd.DataFrame:
    """Return the runs of `study` with the number of heads that copy, from `heads`: a column copying heads."""
    count = effects.groupby(["arm", "seed"])["copies"].sum().rename("copying heads")
    return table.join(count, on=["arm", "seed"], how="inner")


def heads_headline(counted: pd.DataFrame) -> str:
    """Return in one line how many heads copy in the runs of `copying`."""
    heads, runs = counted["copying heads"], len(counted)
    if not runs:
        return "No run has weights"
    least, most = heads.min(), heads.max()
    span = f"{most:.0f}" if least == most else f"{least:.0f} to {most:.0f}"
    return f"{span} heads copy in {f'each of {runs} runs' if runs > 1 else 'the one run'}"


EXPERIMENT = Experiment(
    name="seeds",
    number=23,
    title="Spread over seeds",
    paper="beyond the paper",
    question="How many seeds does a difference need, and what makes seeds differ?",
    paper_answer="Not examined; one run an arm.",
    scales=twin_scales(4)
    | {
        "full": Scale(
            "the study of the twin: dense and MoE-32, 32 wide, with smeared keys; 30 M tokens of mix15",
            "about 45 minutes a seed on a quiet core of a Zen 4 (measured)",
        )
    },
    arms=ARMS,
    build=build,
)
