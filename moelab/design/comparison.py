"""Compare arms by their losses over seeds: differences of means, verdicts, one-line results.

Frames named `final` are `Runs.final()`: a row per run, with columns arm, seed, validation_loss (nats per token) and
more.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from moelab import paper
from moelab.config import ModelConfig
from moelab.design import sequential, settings, titles
from moelab.design.judging import MIN_SAMPLES, judge
from moelab.design.verdicts import Verdict
from moelab.lazy import pd
from moelab.statistics import ALPHA, Estimate

TWINS = "Twins; each arm's mean over its seeds."
RAISED = (
    f"{TWINS} Judged with three seeds as planned, and once more with five, which was decided after seeing the first; "
    "the interval allows for both."
)


def how_compared(scale: str, base: str) -> str:
    """Return in a sentence or two how arms of Figs 2 and 4 are compared at a scale, on one of `settings.BASES`."""
    note = RAISED if scale == "cpu" else TWINS
    return note if base == settings.BASES[0] else f"{note} They are twins of the {base} base."


def by_arm(final: pd.DataFrame, value: str = "validation_loss") -> pd.DataFrame:
    """Return one column of `final` as a table: a row per seed, a column per arm.

    Raises:
        ValueError: one line: an arm has several runs of one seed.
    """
    _check_labels(final)
    return final.pivot(index="seed", columns="arm", values=value)


def common_means(table: pd.DataFrame) -> pd.Series:
    """Return the mean of each column of a table by seed, over the seeds that have all columns; over any if none has."""
    whole = table.dropna()
    return (whole if len(whole) else table).mean()


def _check_labels(table: pd.DataFrame, *point: str) -> None:
    """Check that an arm has one row of each seed (and point of its curve).

    ValueError, one line, where runs that differ have the same label.
    """
    again = table[table.duplicated(["arm", "seed", *point])]
    if len(again):
        arm, seed = again.iloc[0][["arm", "seed"]]
        raise ValueError(f"arm {arm!r} has several runs of seed {seed}; give each of their specs a separate label")


def _check_text(final: pd.DataFrame, *arms: str) -> None:
    """Check that these arms, or all of the table, were validated on one text in the same tokens.

    ValueError, one line: a difference of losses on two texts says nothing of the arms.
    """
    if "unigram_loss" not in final:
        return
    texts = (final[final["arm"].isin(arms)] if arms else final).sort_values("unigram_loss")
    if len(texts) and texts["unigram_loss"].iloc[-1] - texts["unigram_loss"].iloc[0] > 1e-6:
        low, high = texts.iloc[0], texts.iloc[-1]
        raise ValueError(
            f"arms {low['arm']!r} and {high['arm']!r} were validated on different texts or tokens (unigram losses "
            f"{low['unigram_loss']:.3f} and {high['unigram_loss']:.3f}); compare runs with equal data"
        )


def by_peak_rate(final: pd.DataFrame, rates: Sequence[float]) -> pd.DataFrame:
    """Return final losses in which an arm that was trained at several peak rates is an arm for each: "Dense, lr 0.004".

    Args:
        rates: of the runs, in the order of the rows.
    """
    if not len(final):
        return final
    several = pd.Series(rates, index=final.index).groupby(final["arm"]).transform("nunique") > 1
    named = [f"{arm}, lr {rate:g}" for arm, rate in zip(final["arm"], rates, strict=True)]
    return final.assign(arm=final["arm"].where(~several, named))


def paired(final: pd.DataFrame, left: str, right: str) -> list[float]:
    """Return left - right for each seed; seeds that lack one are left out, and `missing` names them.

    Raises:
        ValueError: one line: an arm has several runs of one seed, or the two were validated on different texts.
    """
    _check_text(final, left, right)
    table = by_arm(final)
    if left not in table or right not in table:
        return []
    return list((table[left] - table[right]).dropna())


def missing(final: pd.DataFrame, *arms: str) -> list[str]:
    """Return the seeds of some arms that have no result, or none that is a number: "seed 3 of MoE-128".

    A seed that any arm of `final` has is expected of all.
    """
    arms = tuple(dict.fromkeys(arms))  # an arm may be compared with itself
    return _missing(by_arm(final).reindex(columns=list(arms)), arms)


def _missing(table: pd.DataFrame, arms: Sequence[str]) -> list[str]:
    return [f"seed {seed} of {arm}" for seed, lost in table.isna().iterrows() for arm in arms if lost[arm]]


def gaps(final: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Return columns arm, seed and gap: final loss minus the reference arm's of the same seed, nats per token.

    Raises:
        ValueError: as `paired`.
    """
    _check_labels(final)
    _check_text(final)
    base = final[final["arm"] == reference].set_index("seed")["validation_loss"]
    there = final[final["seed"].isin(base.index)]
    return there.assign(gap=there["validation_loss"] - there["seed"].map(base))[["arm", "seed", "gap"]]


def pairs(final: pd.DataFrame, of: Sequence[tuple[str, str]], value: str = "validation_loss") -> pd.DataFrame:
    """Return the final loss of one arm minus another's, by seed, for pairs of arms that are both there.

    Columns: arm ("left − right"), left, right, seed, gap (nats per token, or the unit of another `value`), and
    unrepeated where `final` has `unrepeated_loss`: the gap on tokens that cannot be copied.

    Raises:
        ValueError: as `paired`.
    """
    for one in of:
        _check_text(final, *one)
    table = by_arm(final, value)
    rows = [
        [f"{left} − {right}", left, right, seed, gap]
        for left, right in dict.fromkeys(of)  # twice the seeds would make an interval narrower
        if {left, right} <= set(table)
        for seed, gap in (table[left] - table[right]).dropna().items()
    ]
    found = pd.DataFrame(rows, columns=["arm", "left", "right", "seed", "gap"])
    if "unrepeated_loss" in final:
        by_seed = by_arm(final, "unrepeated_loss")
        found["unrepeated"] = [by_seed[r.left][r.seed] - by_seed[r.right][r.seed] for r in found.itertuples()]
    return found


def judge_losses(
    experiment: str,
    final: pd.DataFrame,
    arms: Mapping[str, str],
    scale: str,
    looks: Sequence[int] = (),
    note: str = TWINS,
    decides_from: int = 0,
) -> list[Verdict]:
    """Judge the claims about final validation losses and total parameters; the others are not tested.

    Args:
        experiment: of `paper.claims`.
        arms: arm -> the paper's name of its run (a model, or with +KD, +MoS).
        looks: the plan, see `moelab.design.sequential`.
        note: how the arms are compared.
        decides_from: the first seed that decides.
    """
    claims = paper.claims(experiment)
    return [judge_loss(claim, final, arms, scale, looks, note, decides_from) for claim in claims]


def judge_loss(
    claim: paper.Claim,
    final: pd.DataFrame,
    arms: Mapping[str, str],
    scale: str,
    looks: Sequence[int] = (),
    note: str = TWINS,
    decides_from: int = 0,
) -> Verdict:
    """Judge one claim, see `judge_losses`."""
    if claim.quantity == "total parameters":
        models = [name.replace("+KD", "").replace("+MoS", "") for name in (claim.left, claim.right)]
        left, right = (ModelConfig.parse(model).parameters() for model in models)
        return judge(claim, [left / right], exact=True, note="Arithmetic at the paper's size.")
    share = share_of_training([claim.left, claim.right], final, arms, scale)
    if claim.quantity != "final validation loss" or not len(final):
        return judge(claim, scale=scale, share=share)
    sides = samples(claim, final, arms)
    uncopied = samples(claim, final, arms, "unrepeated_loss") if "unrepeated_loss" in final else {}
    return judge(
        claim,
        arms=sides,
        uncopied=uncopied,
        note=note,
        scale=scale,
        share=share,
        looks=looks,
        decides_from=decides_from,
    )


def samples(
    claim: paper.Claim, rows: pd.DataFrame, arms: Mapping[str, str], value: str = "validation_loss"
) -> dict[str, dict[int, float]]:
    """Return the arms of a claim as `judge` takes them: by the paper's name and seed; none where a side is not there.

    An equality also has the arms of its gain where both are there.

    Args:
        rows: columns arm, seed and `value`, a row per run.
        arms: arm -> the paper's name of its run.

    Raises:
        ValueError: one line: two of the arms have one name, or an arm has several runs of one seed.
    """
    _check_labels(rows)
    labels: dict[str, str] = {}
    for arm, name in arms.items():
        if arm in set(rows["arm"]) and (other := labels.setdefault(name, arm)) != arm:
            raise ValueError(f"arms {other!r} and {arm!r} both stand for {name}; name one of them")
    sides, gain = ({*pair} for pair in ((claim.left, claim.right), (claim.gain_of, claim.gain_over)))
    if not sides <= labels.keys():
        return {}
    names = sides | (gain if gain <= labels.keys() else set())
    by_arm = {name: rows[rows["arm"] == labels[name]].sort_values("seed") for name in sorted(names)}
    return {name: dict(zip(of["seed"].map(int), of[value].map(float), strict=True)) for name, of in by_arm.items()}


def share_of_training(names: Collection[str], final: pd.DataFrame, arms: Mapping[str, str], scale: str) -> float | None:
    """Return the share of the paper's training that runs of some names reach; None where none of them is there.

    Training is counted in tokens for each parameter that the dense base has outside its embeddings, so 1 is the paper's
    own ratio of tokens to parameters.
    """
    reached = [
        tokens_a_parameter(name, scale, tokens) / tokens_a_parameter(name)
        for name in names
        if "tokens" in final and name in arms.values()
        for tokens in final.loc[final["arm"].map(arms) == name, "tokens"].unique()
    ]
    return min(reached, default=None)


def tokens_a_parameter(name: str, scale: str = "paper", tokens: float | None = None) -> float:
    """Return a run's tokens for each parameter of its dense base outside the embeddings.

    Args:
        name: the paper's name of the run.
        scale: whose model it is.
        tokens: of the run; by default the paper's.
    """
    base = settings.base_of(name)
    model = ModelConfig.parse(base) if scale == "paper" else settings.spec(base, scale).model
    return (tokens or paper.training_settings(name).train_tokens) / model.non_embedding_parameters()


def alpha(final: pd.DataFrame, looks: Sequence[int]) -> float:
    """Return the level of the look at these runs: the chance that one of the figure's intervals misses its mean."""
    return sequential.level(max(1, final["seed"].nunique()), tuple(looks))


def estimated(final: pd.DataFrame, left: str, right: str) -> Estimate | None:
    """Return the mean loss of one arm minus another's, each over all its seeds; None where one of them has none.

    Raises:
        ValueError: as `paired`.
    """
    _check_text(final, left, right)
    table = by_arm(final)
    sides = [list(table[arm].dropna()) if arm in table else [] for arm in (left, right)]
    return Estimate.contrast([(1.0, sides[0]), (-1.0, sides[1])]) if all(sides) else None


def interval_text(values: Sequence[float] | Estimate, looks: Sequence[int] = ()) -> str:
    """Return the 95 % interval of a mean, the repeated one of a plan's look, and the number of seeds, in words.

    An interval that is wider because all of a plan's looks are right together says over how many, this one included.
    """
    found = values if isinstance(values, Estimate) else Estimate.of(values)
    if found.samples < 2:
        return "1 seed, no spread"
    level = sequential.level(found.samples, tuple(looks))
    low, high = found.interval(level)
    over = f" over {len({*looks, min(found.samples, looks[-1])})} looks" if level < ALPHA else ""
    return f"95 % interval{over} {low:+.3f} to {high:+.3f}, {found.samples} seeds"


def difference(final: pd.DataFrame, left: str, right: str, looks: Sequence[int] = (), decides_from: int = 0) -> str:
    """Return "LEFT ends 0.012 nats above RIGHT (95 % interval …)", that it is inconclusive, or which arm is missing.

    Seeds of which one arm has no result are named. Where one of the two has none at all, it is said of the last and the
    first arm that have some.

    Args:
        looks: the plan, see `moelab.design.sequential`.
        decides_from: the first seed that counts; where none does yet, the difference is that of earlier ones.
    """
    every, final = final, final[final["seed"] >= decides_from]
    found = estimated(final, left, right)
    if found is None and decides_from and estimated(every, left, right) is not None:
        return f"{difference(every, left, right, looks)} on seeds before {decides_from}, which do not decide"
    if found is None:
        return _of_those_there(final, looks) or f"{left} and {right} have no finished pair"
    lost = missing(final, left, right)
    without = f"; without {', '.join(lost)}" if lost else ""
    how = f"({interval_text(found, looks)}{without})"
    low, high = found.interval(sequential.level(found.samples, tuple(looks)))
    if low <= 0 <= high and left != right:
        return f"{left} minus {right}: {found.mean:+.3f} nats, inconclusive {how}"
    where = f"{abs(found.mean):.3f} nats {'below' if found.mean < 0 else 'above'}" if found.mean else "level with"
    return f"{left} ends {where} {right} {how}"


def _of_those_there(final: pd.DataFrame, looks: Sequence[int]) -> str:
    """Return `difference` of the last and the first arm that have finished; empty where there are no two."""
    arms = list(dict.fromkeys(final["arm"]))
    done = [arm for arm in arms if final.loc[final["arm"] == arm, "validation_loss"].notna().any()]
    pair = (done[-1], done[0]) if len(done) > 1 else ()
    return difference(final, *pair, looks) if pair else ""


def beside_unigram(final: pd.DataFrame) -> str:
    """Return in one line how the arms' losses lie to the unigram loss, which the tokens' frequencies alone give."""
    unigram, losses = final["unigram_loss"].iloc[0], final["validation_loss"]
    arms = f"unigram {unigram:.2f} nats; arms {losses.min():.2f} to {losses.max():.2f}"
    if losses.max() < 0.8 * unigram:
        return f"{arms}: all far below it"
    low = losses.max() < unigram
    where = "not far below it" if low else "not all below it"
    return f"{arms}: {where}; these runs are too short for models to differ much"


def differences(
    final: pd.DataFrame, expected: Sequence[tuple[str, str, str]], looks: Sequence[int] = ()
) -> pd.DataFrame:
    """Return, a row per pair of arms, the difference of their final losses beside what was expected of it.

    Args:
        expected: left, right, and where the left arm was expected to end: "below", "above" or "cannot tell".
        looks: the plan, see `moelab.design.sequential`.

    Returns:
        Columns left, right, mean (left minus right), low, high (95 % interval, the repeated one of a plan's look),
        seeds, expected, found: "below" or "above" if the interval is on one side of zero, else "cannot tell"; "too few
        seeds" below `judging.MIN_SAMPLES`; where a seed has no result in one of the arms, "without" its name.
    """
    rows = []
    for left, right, where in expected:
        if found := estimated(final, left, right):
            low, high = found.interval(sequential.level(found.samples, tuple(looks)))
            outcome = "below" if high < 0 else "above" if low > 0 else "cannot tell"
            outcome = outcome if found.samples >= MIN_SAMPLES else "too few seeds"
            if lost := missing(final, left, right):  # it may have diverged, so that the others are a selection
                outcome = f"without {', '.join(lost)}"
            rows.append([left, right, found.mean, low, high, found.samples, where, outcome])
    return pd.DataFrame(rows, columns=["left", "right", "mean", "low", "high", "seeds", "expected", "found"])


def over_training(curves: pd.DataFrame, arms: Sequence[str], reference: str) -> pd.DataFrame:
    """Return the losses minus the reference arm's at the same tokens and seed.

    Columns: arm, against (the reference), seed, tokens, loss (the difference).
    """
    _check_labels(curves, "tokens")
    trained = curves[curves["tokens"] > 0]
    base = trained[trained["arm"] == reference].set_index(["seed", "tokens"])["loss"].rename("base")
    both = trained[trained["arm"].isin(arms)].join(base, on=["seed", "tokens"], how="inner")
    moved = both.assign(against=reference, loss=both["loss"] - both["base"])
    return moved[["arm", "against", "seed", "tokens", "loss"]]


def gaps_headline(final: pd.DataFrame, reference: str, *, along: bool = False) -> str:
    """Return "Against REFERENCE: ARM −0.012, … nats"; seeds that an arm or the reference lacks are named.

    Of many arms only the highest and the lowest. With `along` it says that the figure shows them along the training.
    """
    table = gaps(final, reference)
    means = table[table["arm"] != reference].groupby("arm", sort=False)["gap"].mean()
    if not len(means):
        return f"{reference} and another arm have no finished pair"
    lost = missing(final, reference, *means.index)
    without = f"; without {', '.join(lost)}" if lost else ""
    begins = f"Along the training, against {reference}:" if along else f"Against {reference}:"
    return titles.listed(begins, means.to_dict(), "+.3f", "nats") + without


def then_and_at_the_end(moved: pd.DataFrame, share: float) -> str:
    """Return "+0.012 nats after 70%, +0.034 after 100% of training", from one arm's rows of `over_training`.

    The first is at the last evaluation up to that share of the training, and says which share that is.
    """
    at = moved.groupby("tokens")["loss"].mean()
    then = max(0, int((at.index <= share * at.index[-1]).sum()) - 1)
    reached = at.index[then] / at.index[-1]
    return f"{at.iloc[then]:+.3f} nats after {reached:.0%}, {at.iloc[-1]:+.3f} after 100% of training"


def ends_headline(final: pd.DataFrame) -> str:
    """Return "Final loss: ARM 3.95, … nats", means over seeds on the whole validation text; of many arms the ends."""
    means = final.groupby("arm", sort=False)["validation_loss"].mean()
    return titles.listed("Final loss:", means.to_dict(), ".2f", "nats")
