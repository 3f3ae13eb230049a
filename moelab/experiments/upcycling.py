"""Turn a dense run into an MoE run, and let an MoE grow its experts (beyond the paper, which trains from scratch).

Shows: final validation loss of the 350M base whose feed-forwards become experts in the middle of training (sparse
upcycling), against the same MoE from scratch at equal tokens, at equal FLOPs and at the tokens of the MoE part alone,
and against the dense run trained on; and of MoE-32 that grows to 128 experts.

Here: twins, paired by seed. A run begins at 40 % of the tokens, where the learning rate is constant, by a branch of the
dense run (`moelab.runs.spec.Start`) that has the trunk's own schedule and decay. The arms:

- `Dense`, `MoE-32`, `Top-2` (two of 32 experts, weights normalised) and `MoE-128`: from scratch.
- `Top-2, MoE's tokens`: as many tokens as the upcycled run has as an MoE, for a reader who has the dense run already.
  `Top-2, equal FLOPs`: as many FLOPs as the upcycled run with its dense part. Both decay on their own.
- `Upcycled`: Dense becomes Top-2. Every expert is an exact copy, so that the model computes at first what Dense did.
  `Upcycled, noise`: with noise of half the weights' deviation, another for each expert. `Upcycled, warm-up`: the rate
  rises again over a tenth of the MoE's tokens.
- `Upcycled, top-1`: Dense becomes MoE-32, the paper's layer. Its weights are not normalised, so that the layer's output
  begins small. `Upcycled, top-1, scaled` multiplies the output weights by 32, the inverse of an expert's mean weight.
  But a token's weight is the largest of the 32, by a new router 2.6 to 3.0 times the mean on the Dense trunk (seed 3 at
  `cpu`, validation text), so that the output is 2.8 times Dense's. `Upcycled, top-1, matched` multiplies by 0.36 times
  32, which makes it about equal.
- `Grown`: MoE-32 becomes MoE-128 by three copies of each expert and its row of the router, with noise of a tenth of the
  deviation. Outputs are times 4, because the softmax divides a token's weight among the copies.

The rate after the branch is the trunk's constant one. Komatsuzaki et al. 2022 (arXiv 2212.05055) go on with the dense
schedule; NVIDIA (arXiv 2410.07524) go back to the peak rate from a decayed one. Before the decay both are the same, and
the peak rates of Dense and MoE are equal here. Copies and router begin without optimizer state.

Fixed before the first run: 3 seeds (at `cpu` 3 to 5, whose trunks ran on one machine), all arms on each, and
`EXPECTED`. A difference counts if its 95 % interval over the seeds is on one side of zero. At equal tokens, Upcycled
is expected to lose as in OLMoE (arXiv 2409.02060), whose MoE from scratch catches up after a quarter of the dense
run's tokens. `Upcycled, top-1, matched` and what is expected of it were added after the other arms had been seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moelab.config import UpcycleConfig
from moelab.design import comparison, settings
from moelab.design.experiment import Experiment, twin_scales
from moelab.lazy import pd
from moelab.runs.branching import shorter
from moelab.runs.spec import RunSpec, Start

SCRATCH = {"Dense": "350M", "MoE-32": "350M+MoE-32", "MoE-128": "350M+MoE-128", "Top-2": "350M+Top2-MoE-32"}
"""Arm that is trained from initial weights -> the paper's model."""

BRANCHES: dict[str, tuple[str, str, UpcycleConfig]] = {
    "Upcycled": ("Dense", "Top-2", UpcycleConfig()),
    "Upcycled, noise": ("Dense", "Top-2", UpcycleConfig(noise=0.5)),
    "Upcycled, warm-up": ("Dense", "Top-2", UpcycleConfig()),
    "Upcycled, top-1": ("Dense", "MoE-32", UpcycleConfig()),
    "Upcycled, top-1, scaled": ("Dense", "MoE-32", UpcycleConfig(scale=32.0)),
    "Upcycled, top-1, matched": ("Dense", "MoE-32", UpcycleConfig(scale=0.36 * 32)),
    "Grown": ("MoE-32", "MoE-128", UpcycleConfig(noise=0.1, scale=4.0)),
}
"""Arm that begins with copies -> its trunk, the arm whose model it becomes, and how it copies.

Scales are those at 32 and 128 experts; at scales with fewer, they shrink in proportion.
"""

_GROWTH = {"Dense": 32, "MoE-32": 4}
"""Trunk -> experts for each of the trunk's that the scales above are meant for."""

SHORTER = ("Top-2, MoE's tokens", "Top-2, equal FLOPs")
ARMS = (*SCRATCH, *SHORTER, *BRANCHES)

EXPECTED = (
    ("Upcycled", "Dense", "below"),
    ("Upcycled", "Top-2, MoE's tokens", "below"),
    ("Upcycled", "Top-2, equal FLOPs", "above"),
    ("Upcycled", "Top-2", "above"),
    ("Upcycled, noise", "Upcycled", "cannot tell"),
    ("Upcycled, warm-up", "Upcycled", "cannot tell"),
    ("Upcycled, top-1", "MoE-32", "above"),
    ("Upcycled, top-1, scaled", "Upcycled, top-1", "below"),
    ("Upcycled, top-1, matched", "Upcycled, top-1", "below"),
    ("Upcycled, top-1, matched", "MoE-32", "above"),
    ("Grown", "MoE-32", "below"),
    ("Grown", "MoE-128", "above"),
)
"""Left, right, and where the left arm is expected to end; written before the arm's first run."""


def build(scale: str, seed: int, overrides: Mapping[str, Any], *, upcycle_at: float = 0.4) -> list[RunSpec]:
    """Return every arm of one seed, trunks before their branches.

    Args:
        upcycle_at: share of the tokens at which branches begin, before the learning rate decays.
    """
    scratch = {arm: settings.spec(name, scale, seed, label=arm, overrides=overrides) for arm, name in SCRATCH.items()}
    train, context = scratch["Dense"].train, scratch["Dense"].data.context
    a_step, last = train.batch_size * context, 1 - train.cooldown_tokens / train.tokens
    if not 0 < upcycle_at < 1 or upcycle_at > last:
        raise ValueError(f"upcycle_at must be a share of the tokens between 0 and {last:.2g}, got {upcycle_at}")
    total = train.steps(context)
    at = max(1, round(upcycle_at * total)) * a_step
    plain = dict(scratch)
    for trunk in ("Dense", "MoE-32"):
        scratch[trunk] = scratch[trunk].with_checkpoints([at])
    own = total * a_step - at
    branches = {}
    for label, (trunk, becomes, upcycle) in BRANCHES.items():
        if upcycle.scale != 1:
            few, more = (max(1, *scratch[arm].model.experts) for arm in (trunk, becomes))
            upcycle = replace(upcycle, scale=upcycle.scale * more / few / _GROWTH[trunk])
        warmup = max(2, round(own / 10 / a_step)) * a_step if label == "Upcycled, warm-up" else 0
        start = Start(scratch[trunk], at, warmup, upcycle)
        branches[label] = replace(plain[becomes], start=start, label=label)
    top2 = scratch["Top-2"]
    budgets = [own, round(branches["Upcycled"].total_cost / top2.cost * total) * a_step]
    starts = [run.start.tokens for run in (shorter(top2, tokens) for tokens in budgets) if run.start]
    scratch["Top-2"] = top2.with_checkpoints(starts)
    less = [replace(shorter(scratch["Top-2"], n), label=label) for label, n in zip(SHORTER, budgets, strict=True)]
    return [*scratch.values(), *less, *branches.values()]


def by_kind(gaps: pd.DataFrame) -> pd.DataFrame:
    """Return rows of `comparison.gaps` by how their arm begins, a column kind; the lowest mean of each kind first."""
    kinds = {arm: "begins with copies" if arm in BRANCHES else "trained from scratch" for arm in ARMS}
    means = gaps["arm"].map(gaps.groupby("arm")["gap"].mean())
    kind = gaps["arm"].map(kinds)
    return gaps.assign(kind=kind, mean=means).sort_values(["kind", "mean", "seed"], ascending=[False, True, True])


def over_tokens_headline(final: pd.DataFrame) -> str:
    """Return, in one line, the final gaps to the dense run of the upcycled, the grown and the MoE from scratch."""
    shown = final[final["arm"].isin(["Dense", "Upcycled", "Top-2", "Grown", "MoE-128"])]
    return comparison.gaps_headline(shown, "Dense")


EXPERIMENT = Experiment(
    name="upcycling",
    number=27,
    title="Upcycling: a dense run becomes an MoE",
    paper="beyond the paper",
    question="Is it better to upcycle a dense run, or to train the MoE from scratch?",
    paper_answer="Not examined; every model is trained from scratch.",
    scales=twin_scales(8),
    build=build,
)
