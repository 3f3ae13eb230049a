"""Split the difference of two arms' losses: by what the sequence has shown before of a token, and by domain.

A model that copies from its context gains on copyable tokens (their pair occurred before), one that knows more gains on
the others; a difference of two losses is the sum of both (`moelab.data.batches.pairs`).
"""

from __future__ import annotations

from collections.abc import Sequence

from moelab.design import comparison
from moelab.lazy import pd
from moelab.runs.collection import Runs

_NAMES = {"repeated": "copyable"}
"""Kind of tokens as runs store it -> its name."""


def gaps(runs: Runs, pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """Return the parts of left minus right, by seed; empty where results do not tell tokens apart (older ones).

    Args:
        runs: finished ones are read, one for each arm and seed.
        pairs: (left, right) arms; those that are not both there are left out.

    Returns:
        Columns pair ("left − right"), seed, target (copyable, changed or new: `moelab.data.batches.PAIRS`), share (of
        the validation tokens), left, right (losses on these tokens) and part (share times left minus right; all in nats
        per token). The parts sum to the difference of the losses on all tokens.
    """
    by_run = {(run.spec.title, run.spec.train.seed): run.result.get("validation_by_pair", {}) for run in runs.finished}
    rows = [
        [
            f"{left} − {right}",
            seed,
            _NAMES.get(target, target),
            numbers["share"],
            by_run[left, seed][target]["loss"],
            numbers["loss"],
        ]
        for left, right in pairs
        for (arm, seed), targets in by_run.items()
        if arm == right and by_run.get((left, seed))
        for target, numbers in targets.items()
    ]
    table = pd.DataFrame(rows, columns=["pair", "seed", "target", "share", "left", "right"])
    return table.assign(part=table["share"] * (table["left"] - table["right"]))


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Return the parts of `gaps`, means over seeds: a row per pair, a column per target and one for all of them."""
    parts = table.groupby(["pair", "target"], sort=False)["part"].mean().unstack()
    return parts.assign(all=parts.sum(axis=1))


def by_domain(runs: Runs, pairs: Sequence[tuple[str, str]]) -> pd.DataFrame:
    """Return left minus right on each domain of the validation text, by seed; empty for a text of one domain.

    Args:
        runs, pairs: as in `gaps`.

    Returns:
        Columns pair ("left − right"), arm (the domain), seed and gap (nats per token); of each pair the domain with the
        lowest mean first.
    """
    losses = {(run.spec.title, run.spec.train.seed): run.result["validation_by_domain"] for run in runs.finished}
    rows = [
        [f"{left} − {right}", domain, seed, losses[left, seed][domain]["loss"] - numbers["loss"]]
        for left, right in pairs
        for (arm, seed), domains in losses.items()
        if arm == right and (left, seed) in losses and len(domains) > 1
        for domain, numbers in domains.items()
    ]
    table = pd.DataFrame(rows, columns=["pair", "arm", "seed", "gap"])
    position = table["pair"].map({f"{left} − {right}": i for i, (left, right) in enumerate(pairs)})
    mean = table.groupby(["pair", "arm"])["gap"].transform("mean")
    return table.assign(position=position, mean=mean).sort_values(["position", "mean", "arm", "seed"])[[*table]]


def domain_headline(table: pd.DataFrame) -> str:
    """Return "A beats B in 14/15 domains, ...": in how many domains of `by_domain` each pair's left arm ends lower."""
    means = table.groupby(["pair", "arm"], sort=False)["gap"].mean()
    said: list[str] = []
    for pair in table["pair"].unique():
        share = f"{(means[pair] < 0).sum()}/{len(means[pair])}{'' if said else ' domains'}"
        said.append(f"{pair.replace(' − ', ' beats ')} in {share}")
    return ", ".join(said)


def headline(differences: pd.DataFrame, left: str, right: str, looks: Sequence[int] = ()) -> str:
    """Return in one line what an arm ends above another, on all tokens and on those that cannot be copied."""
    part = differences[differences["arm"] == f"{left} − {right}"]
    if not len(part):
        return f"{left} and {right} have no seed in common"
    said = [f"{part['gap'].mean():+.3f} nats on all tokens ({comparison.interval_text(list(part['gap']), looks)})"]
    if part["unrepeated"].notna().all():
        others = comparison.interval_text(list(part["unrepeated"]), looks)
        said.insert(0, f"{part['unrepeated'].mean():+.3f} on tokens that cannot be copied ({others})")
    return f"{left} minus {right}: {', '.join(said)}"
