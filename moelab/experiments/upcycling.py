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
- `Upcycled, top-1`: Dense becomes MoE-32, the paper's layer. Its weights are not normalised: a new router gives about
  1/32 of the feed-forward's output. `Upcycled, top-1, scaled` makes up for that by 32 times the output weights.
- `Grown`: MoE-32 becomes MoE-128. Three noisy copies (a tenth of the deviation) of each expert and of its row of the
  router; outputs times 4, among which the softmax divides a token's weight.

The rate after the branch is the trunk's constant one. Komatsuzaki et al. 2022 (arXiv 2212.05055) go on with the dense
schedule; NVIDIA (arXiv 2410.07524) go back to the peak rate from a decayed one. Before the decay both are the same, and
the peak rates of Dense and MoE are equal here. What a second warm-up changes is measured by an arm of its own. The
copies and the router begin without optimizer state.

Fixed before the first run: 3 seeds, all arms on each. The rule: a difference counts if its 95 % interval over the seeds
is on one side of zero (`EXPECTED`, in nats, left minus right); otherwise the runs cannot tell. Expect that upcycling
beats the dense run and the MoE on its own tokens, and loses to the MoE from scratch at equal tokens and FLOPs, as in
OLMoE (arXiv 2409.02060), whose MoE from scratch catches up after a quarter of the dense run's tokens; that noise and
warm-up change nothing; that top-1 loses unless scaled; that growing beats staying small and loses to 128 from the
start. Not run at `cpu` yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moelab.config import UpcycleConfig
from moelab.design import comparison, settings
from moelab.design.experiment import Experiment, twin_scales
from moelab.runs.branching import token_budgets
from moelab.runs.spec import RunSpec, Start
from moelab.statistics import interval

if TYPE_CHECKING:
    import pandas as pd

SCRATCH = {"Dense": "350M", "MoE-32": "350M+MoE-32", "MoE-128": "350M+MoE-128", "Top-2": "350M+Top2-MoE-32"}
"""Arm that is trained from initial weights -> the paper's model."""

BRANCHES: dict[str, tuple[str, str, UpcycleConfig]] = {
    "Upcycled": ("Dense", "Top-2", UpcycleConfig()),
    "Upcycled, noise": ("Dense", "Top-2", UpcycleConfig(noise=0.5)),
    "Upcycled, warm-up": ("Dense", "Top-2", UpcycleConfig()),
    "Upcycled, top-1": ("Dense", "MoE-32", UpcycleConfig()),
    "Upcycled, top-1, scaled": ("Dense", "MoE-32", UpcycleConfig(scale=32.0)),
    "Grown": ("MoE-32", "MoE-128", UpcycleConfig(noise=0.1, scale=4.0)),
}
"""Arm that begins with copies -> its trunk, the arm whose model it becomes, and how it copies."""

SHORTER = ("Top-2, MoE's tokens", "Top-2, equal FLOPs")
ARMS = (*SCRATCH, *SHORTER, *BRANCHES)

BELOW, ABOVE, LEVEL = "below", "above", "cannot tell"
EXPECTED = (
    ("Upcycled", "Dense", BELOW),
    ("Upcycled", "Top-2, MoE's tokens", BELOW),
    ("Upcycled", "Top-2, equal FLOPs", ABOVE),
    ("Upcycled", "Top-2", ABOVE),
    ("Upcycled, noise", "Upcycled", LEVEL),
    ("Upcycled, warm-up", "Upcycled", LEVEL),
    ("Upcycled, top-1", "MoE-32", ABOVE),
    ("Upcycled, top-1, scaled", "Upcycled, top-1", BELOW),
    ("Grown", "MoE-32", BELOW),
    ("Grown", "MoE-128", ABOVE),
)
"""Left, right, and where the left arm is expected to end; written before the first run."""


def build(scale: str, seed: int, overrides: Mapping[str, Any], *, upcycle_at: float = 0.4) -> list[RunSpec]:
    """Return every arm of one seed, trunks before their branches.

    Args:
        upcycle_at: share of the tokens at which branches begin, before the learning rate decays.
    """
    scratch = {
        label: settings.spec(name, scale, seed, label=label, overrides=overrides) for label, name in SCRATCH.items()
    }
    train = scratch["Dense"].train
    a_step = train.batch_size * scratch["Dense"].data.context
    total = train.steps(scratch["Dense"].data.context)
    last = 1 - train.cooldown_tokens / train.tokens
    if not 0 < upcycle_at < 1 or upcycle_at > last:
        raise ValueError(f"upcycle_at must be a share of the tokens between 0 and {last:.2g}, got {upcycle_at}")
    at = max(1, round(upcycle_at * total)) * a_step
    for trunk in ("Dense", "MoE-32"):
        scratch[trunk] = scratch[trunk].keeping([at])
    own = total * a_step - at
    branches = {}
    for label, (trunk, becomes, upcycle) in BRANCHES.items():
        experts = max(scratch[becomes].model.experts)
        if upcycle.scale != 1:  # smaller at `smoke`
            upcycle = replace(upcycle, scale=experts / max(1, *scratch[trunk].model.experts))
        warmup = max(2, round(own / 10 / a_step)) * a_step if label == "Upcycled, warm-up" else 0
        start = Start(scratch[trunk], at, warmup, upcycle)
        own_train = replace(scratch[becomes].train, keep_at=())
        branches[label] = replace(scratch[becomes], train=own_train, start=start, label=label)
    flops = total_flops(branches["Upcycled"])
    a_token = scratch["Top-2"].model.flops_per_token(context=scratch["Top-2"].data.context)
    budgets = [own, round(flops / a_token / a_step) * a_step]
    scratch["Top-2"], *shorter = _shorter(scratch["Top-2"], budgets)
    return [*scratch.values(), *shorter, *branches.values()]


def _shorter(trunk: RunSpec, budgets: list[int]) -> list[RunSpec]:
    """Return a run, which keeps what its budgets start from, and the same run of each budget of tokens.

    A budget branches off where its own decay begins if the rate is constant there, else it begins anew.
    """
    train = trunk.train
    share = train.cooldown_tokens / train.tokens
    runs = []
    for label, tokens in zip(SHORTER, budgets, strict=True):
        if share and train.warmup_tokens <= tokens * (1 - share):
            (run,) = token_budgets(trunk, [tokens])
        else:
            warmup = min(train.warmup_tokens, round(train.warmup_tokens * tokens / train.tokens))
            less = {"tokens": tokens, "warmup_tokens": warmup, "cooldown_tokens": round(share * tokens)}
            run = replace(trunk, train=replace(train, **less))
        runs.append(replace(run, label=label))
    keeping = trunk.keeping([run.start.tokens for run in runs if run.start])
    return [keeping, *(replace(run, start=replace(run.start, run=keeping)) if run.start else run for run in runs)]


def total_flops(spec: RunSpec, tokens: int | None = None) -> float:
    """Return the training FLOPs of a run up to some of its tokens, with those of its trunk before it begins."""
    end = spec.train.tokens if tokens is None else tokens
    begin = spec.start.tokens if spec.start else 0
    before = total_flops(spec.start.run, begin) if spec.start else 0.0
    return before + spec.model.flops_per_token(context=spec.data.context) * (end - begin)


def costs(specs: list[RunSpec]) -> pd.DataFrame:
    """Return, a row per arm: tokens before the copies and after them (millions), and FLOPs of all of them (10^12)."""
    import pandas as pd

    rows = {}
    for spec in specs:
        copies = spec.label in BRANCHES and spec.start is not None
        rows[spec.title] = {
            "tokens before the copies (M)": spec.start.tokens / 1e6 if copies else 0.0,
            "tokens after (M)": (spec.own_tokens if copies else spec.train.tokens) / 1e6,
            "training TFLOPs": total_flops(spec) / 1e12,
        }
    return pd.DataFrame(rows.values(), index=pd.Index(rows, name="arm"))


def differences(final: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each pair of `EXPECTED`: its difference with the 95 % interval, expected and found.

    Columns: left, right, mean, low, high, seeds, expected, found. With one seed nothing is found.
    """
    import pandas as pd

    rows = []
    for left, right, expected in EXPECTED:
        if values := comparison.paired(final, left, right):
            mean, low, high = interval(values)
            found = BELOW if high < 0 else ABOVE if low > 0 else LEVEL
            one = len(values) < 2
            rows.append([left, right, mean, low, high, len(values), expected, "one seed" if one else found])
    return pd.DataFrame(rows, columns=["left", "right", "mean", "low", "high", "seeds", "expected", "found"])


def at_the_start(curves: pd.DataFrame) -> pd.DataFrame:
    """Return, a row per arm that begins with copies and seed: the loss before and after the copies (nats per token).

    Args:
        curves: `Runs.curves()` of the trunks and the branches.

    Returns:
        Columns arm, seed, before, after. before is missing where the trunk was not evaluated at that step.
    """
    import pandas as pd

    rows = []
    losses = curves.drop_duplicates(["arm", "seed", "tokens"]).set_index(["arm", "seed", "tokens"])["loss"]
    for (arm, seed), part in curves[curves["arm"].isin(BRANCHES)].groupby(["arm", "seed"], sort=False):
        first = part.sort_values("tokens").iloc[0]
        rows.append([arm, seed, losses.get((BRANCHES[arm][0], seed, first["tokens"])), first["loss"]])
    return pd.DataFrame(rows, columns=["arm", "seed", "before", "after"]).astype({"before": float, "after": float})


def headline(final: pd.DataFrame) -> str:
    """Return, in one line, where the upcycled run ends against the MoE from scratch at equal tokens."""
    return comparison.difference(final, "Upcycled", "Top-2")


def over_tokens_headline(final: pd.DataFrame) -> str:
    """Return, in one line, the final gaps to the dense run of the upcycled, the grown and the MoE from scratch."""
    shown = final[final["arm"].isin(["Dense", "Upcycled", "Top-2", "Grown", "MoE-128"])]
    return comparison.gaps_headline(comparison.gaps(shown, "Dense"), "Dense")


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
