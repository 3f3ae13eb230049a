"""Answer a reader's six questions in a line each, from the published data: value, interval, the paper's, verdict."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from moelab.config import ModelConfig
from moelab.design import budgets, comparison
from moelab.design.verdicts import FAILS, HELD
from moelab.lazy import np, pd
from moelab.paper import PRIMARY
from moelab.plotting.typography import typeset
from moelab.report.site import sentences
from moelab.report.site.charts import gap_of_fig_1, whole_training
from moelab.report.site.claims import ClaimRow
from moelab.report.site.results import ODD, Result, strongest
from moelab.report.site.template import quantity
from moelab.statistics import interval, ratio_interval

ANSWERS = "answers.csv"
MOE, BASE, LARGER = "350M+MoE-128", "350M", "1.3B"
EQUALS = (("1.3B+MoE-128", "6.7B"), (MOE, LARGER))
"""(MoE, the dense model that the paper finds equal)."""
SIZE = "dense-equivalent-4-5x"

COSTS = {"training tokens": "tokens", "training FLOPs": "FLOPs", "time": "time"}
"""What is equal, as the tables of results name it -> in a sentence."""


FEWER = {
    "pr-moe-matches-moe128": "PR-MoE-32/64 {} from MoE-128",
    "pr-moe-size": "{} its parameters",
}
STUDENT = {
    "staged-kd-matches-teacher-350m": "{} from its teacher",
    "mos-size-350m": "{} MoE-128’s parameters",
}
SERVED = {
    "faster-than-6.7b": "Simulated: {} 6.7B’s speed",
    "1t-under-25ms": "a trillion parameters in {}",
    "kernels-6x": "measured: {} for the kernels",
}
"""Claim -> a clause of the answer, with a place for our value."""


@dataclass(frozen=True)
class Answer:
    """A question and what was found.

    Attributes:
        question: as a reader asks it.
        sentence: the answer as a sentence that can be repeated (`moelab.report.site.sentences`); empty for none.
        line: the answer in a line, with the paper's number; what the start page shows before a click.
        short: the answer in full.
        paper: the paper's number beside it.
        basis: size of the models, seeds, scale.
        claims: the claims judged, the one that the answer quotes first.
        link: the page of its figure.
    """

    question: str
    line: str
    short: str
    paper: str = ""
    basis: str = ""
    claims: Sequence[ClaimRow] = field(default=())
    link: str = ""
    sentence: str = ""

    def row(self) -> dict[str, str]:
        """Return it as a row of a table; the verdict is that on the first claim."""
        return {
            "question": self.question,
            "sentence": self.sentence,
            "answer": self.short,
            "paper": self.paper,
            "basis": self.basis,
            "verdict": self.claims[0].verdict if self.claims else "",
            "link": self.link,
        }


def answers(results: Sequence[Result], rows: Iterable[ClaimRow]) -> list[Answer]:
    """Return the questions that these results answer.

    Args:
        results: the newest first.
        rows: of all claims; the deciding one of each counts.
    """
    decided = {row.claim.id: row for row in rows if row.decides and row.ours is not None}
    found = [
        *_of_tables(strongest(results, "scaling"), decided),
        _claims("Can fewer experts match many?", decided, FEWER),
        _claims("Can a student replace its teacher?", decided, STUDENT),
        _claims("How fast is it served?", decided, SERVED),
    ]
    return [answer for answer in found if answer]


def _of_tables(result: Result | None, decided: dict[str, ClaimRow]) -> list[Answer | None]:
    try:
        return [_equal_cost(result, decided), _dense_size(result, decided), _equal_loss(result, decided)]
    except ODD:
        return []


def _mean_text(values: Sequence[float], text: str = "%+.3f", unit: str = "") -> str:
    """Return a mean with its 95 % interval as text: ``−0.285 nats [−0.346, −0.225]``."""
    mean, low, high = interval(list(values))
    return typeset(text % mean + unit + (f" [{text % low}, {text % high}]" if len(values) > 1 else ""))


def _line(found: str, theirs: str) -> str:
    """Return an answer in a line; its unit stands above all of them."""
    return typeset(f"{found} (paper {theirs})" if theirs else found).replace(" nats/token", "").replace(" nats", "")


def _at(share: float) -> str:
    """Say that a number of the paper is one from within its training."""
    return f"at {share:.0%}: " if share < 0.95 else ""


def basis(result: Result) -> str:
    """Return the models of a result, in words: parameters, tokens, seeds, scale."""
    return f"{result.models}, {result.seeds}, scale {result.scale}" if result.models else f"scale {result.scale}"


def share_reached(result: Result) -> float:
    """Return the share of the paper's training, by tokens a parameter, that the runs of `MOE` reach; 0 if unknown."""
    runs = [run for run in result.summary.runs if run.spec.get("model", {}).get("name") == f"{MOE} twin"]
    whole = whole_training(MOE, result.summary.scale)
    return max(run.result.get("tokens", 0) for run in runs) / whole if runs and whole else 0.0


def _paper_gap(other: str, share: float) -> float | None:
    """Return the paper's loss of `MOE` minus another model's at a share of its training, interpolated in Fig 1."""
    points = gap_of_fig_1(MOE, other)
    return float(np.interp(share, [at for at, _, _ in points], [gap for _, gap, _ in points])) if points else None


def _beside(result: Result, other: str) -> str:
    """Say the paper's difference of the MoE and another model at the share that a result reaches, and at the end."""
    share, points = share_reached(result), gap_of_fig_1(MOE, other)
    if not share or not points:
        return ""
    here = f"{_paper_gap(other, share):+.2f} at {share:.0%} of its training, " if share < 0.95 else ""
    return typeset(f"{here}{points[-1][1]:+.2f} at its end")


def _costs(result: Result) -> pd.DataFrame:
    """Return the MoE's gap to its base at equal tokens, FLOPs and time: at tokens alone where no budget was trained."""
    costs, final = (pd.DataFrame(result.rows_or_none(f"{name}.jsonl")) for name in ("equal-cost", "final"))
    if len(costs) or not {"arm", "seed", "validation_loss"} <= set(final):
        return costs
    return comparison.pairs(final, [(MOE, BASE)]).assign(at="training tokens")


def _equal_cost(result: Result | None, decided: dict[str, ClaimRow]) -> Answer | None:
    rows = _costs(result) if result else pd.DataFrame()
    if not result or not len(rows):
        return None
    parts = {COSTS.get(at, at): list(part["gap"]) for at, part in rows.groupby("at", sort=False)}
    ids = ("moe128-350m-beats-own-base", "moe128-1.3b-beats-own-base")
    gaps = {at: _mean_text(values, unit=" nats") for at, values in parts.items()}
    own = decided.get(ids[0])
    if own and own.result is result and "tokens" in gaps and own.low is not None:  # one number for one thing
        gaps["tokens"] = typeset(f"{own.ours:+.3f} nats [{own.low:+.3f}, {own.high:+.3f}]")
    said = [f"{gap} at equal {at}" for at, gap in gaps.items()]
    dearer = _to_equal_loss(result, MOE, BASE)[0]
    more = f"; to an equal loss its base takes {', '.join(dearer)}" if dearer else ""
    share = share_reached(result)
    theirs, beside = _paper_gap(BASE, share), _beside(result, BASE)
    line = _line(said[0].removesuffix(" at equal tokens"), "" if theirs is None else f"{_at(share)}{theirs:+.2f}")
    # The first that holds after adjustment for the number of tests is quoted, the primary one before others.
    claims = sorted(
        (decided[id] for id in ids if id in decided),
        key=lambda row: (row.verdict not in HELD, row.claim.role != PRIMARY),
    )
    short = f"{_yes(claims[0])}: {', '.join(said)}" if claims else ", ".join(said)
    if claims and claims[0].claim.right != BASE:
        row, number = claims[0], claims[0].paper.partition(" ")[0]
        first = typeset(f"{_yes(row)}, {row.claim.right} base: {row.ours:+.3f} nats [{row.low:+.3f}, {row.high:+.3f}]")
        alone = f" ({claims[1].verdict})" if claims[1:] else ""
        line, beside = _line(first, number), f"{number} and {beside}"
        short = f"{first}; {BASE} base{alone}: {', '.join(said)}"
    elif claims:
        line = f"{_yes(claims[0])}: {line}"
    return Answer(
        "Does an MoE beat its dense base?",
        line,
        f"{short}{more}.",
        beside,
        basis(result),
        claims,
        f"{result.path}/index.html#{'gap-over-tokens' if result.has('gap-over-tokens.svg') else 'against-dense'}",
        sentences.gain(claims[0]) if claims else "",
    )


def _yes(row: ClaimRow) -> str:
    """Return a verdict as an answer to whether the claim is so."""
    return "Yes" if row.verdict in HELD else "No" if row.verdict == FAILS else "Cannot be told yet"


def effective_sizes(result: Result) -> dict[str, list[float]]:
    """Return the dense size that the MoE equals, in units of its base's, by what is equal: tokens, FLOPs, time.

    At equal FLOPs and time the MoE's loss is its base's plus the difference in the table of equal costs.
    """
    final, costs = pd.DataFrame(result.rows_or_none("final.jsonl")), _costs(result)
    if not len(final) or not len(costs):
        return {}
    base = final[final["arm"] == BASE].set_index("seed")["validation_loss"]
    sizes = {}
    for at, part in costs.groupby("at", sort=False):
        moe = pd.DataFrame({"arm": MOE, "seed": part["seed"], "validation_loss": part["seed"].map(base) + part["gap"]})
        table = pd.concat([final[final["arm"] != MOE], moe])
        times = budgets.effective_size(table, MOE, BASE, LARGER, result.summary.scale)
        sizes[COSTS.get(at, at)] = list(times["times"])
    return {at: values for at, values in sizes.items() if values}


def _dense_size(result: Result | None, decided: dict[str, ClaimRow]) -> Answer | None:
    sizes = effective_sizes(result) if result else {}
    if not result or not sizes:
        return None
    said = {at: _mean_text(values, "%.2f") for at, values in sizes.items()}
    rows = result.rows_or_none("against-dense.jsonl")
    behind = [row["gap"] for row in rows if (row.get("left"), row.get("right")) == (MOE, LARGER)]
    large, small = (ModelConfig.parse(name).non_embedding_parameters() for name in (LARGER, BASE))
    more = f"; {_mean_text(behind, unit=' nats')} from {LARGER}, {large / small:.0f}× its base" if behind else ""
    share = share_reached(result)
    whole = comparison.tokens_a_parameter(BASE)
    end = budgets.paper_effective_size(MOE, BASE, LARGER, whole)
    theirs = budgets.paper_effective_size(MOE, BASE, LARGER, share * whole)
    here = f"{theirs:.1f}× at {share:.0%} of its training, " if share < 0.95 else ""
    line = _line(next(iter(said.values())).replace(" ", "× its base ", 1), f"{_at(share)}{theirs:.1f}×")
    times = ", ".join(f"{value} at equal {at}" for at, value in said.items())
    short = f"{MOE} equals a dense model of a multiple of its base’s parameters (without embeddings): {times}{more}."
    beside = typeset(f"{MOE}: {here}{end:.1f}× at its end; against {LARGER} {_beside(result, LARGER)}")
    if both := decided.get(SIZE):  # what the verdict is about comes first
        of_both = f"{quantity(both.ours, both.claim)} its base [{both.interval.replace(' to ', ', ')}]"
        line, short = _line(of_both, both.paper.replace(" to ", "–")), f"{of_both}, mean of two pairs. {short}"
        beside = f"{both.paper}. {beside}"
    return Answer(
        "Which dense size equals it?",
        line,
        short,
        beside,
        basis(result),
        [decided[id] for id in (SIZE, "moe128-1.3b-matches-6.7b", "moe128-350m-beats-1.3b") if id in decided],
        link=f"{result.path}/index.html#against-dense",
        sentence=sentences.size(both) if both else "",
    )


def _to_equal_loss(result: Result, moe: str, dense: str) -> tuple[list[str], list[str]]:
    """Return what a dense model costs to an equal loss, a clause for each cost, and the paper's where it has one."""
    rows = [row for row in result.rows_or_none("equal-loss.jsonl") if row["pair"] == f"{moe} − {dense}"]
    table, ours, theirs = pd.DataFrame(rows, columns=["at", "times", "paper"]), [], []
    for at, part in table.groupby("at", sort=False):
        what = f"× the {COSTS.get(at, at)}"
        mean, low, high = ratio_interval(list(part["times"]))
        ours.append(f"{mean:.1f}{what}" + (f" [{low:.1f}, {high:.1f}]" if len(part) > 1 else ""))
        theirs += [f"{value:.1f}{what}" for value in part["paper"].dropna()[:1]]
    return ours, theirs


def _equal_loss(result: Result | None, decided: dict[str, ClaimRow]) -> Answer | None:
    found = {pair: _to_equal_loss(result, *pair) for pair in EQUALS} if result else {}
    said = {f"{dense} takes {{}} of {moe}": both for (moe, dense), both in found.items() if both[0]}
    if not result or not said:
        return None
    (moe, dense), (ours, theirs) = next((pair, both) for pair, both in found.items() if both[0])
    return Answer(
        "What does that dense model cost?",
        _line(f"{dense}: {ours[-1].replace('the', f'{moe}’s', 1)}", theirs[-1].split()[0] if theirs else ""),
        f"To an equal loss {'; '.join(text.format(', '.join(ours)) for text, (ours, _) in said.items())}.",
        typeset(", ".join(theirs)),
        basis(result),
        [speed] if (speed := decided.get(sentences.SPEED)) else (),
        link=f"{result.path}/index.html#equal-loss",
        sentence=sentences.speed(speed) if speed else "",
    )


def _claims(question: str, decided: dict[str, ClaimRow], clauses: dict[str, str]) -> Answer | None:
    """Answer a question by claims: id -> a clause with a place for our value; claims without a value are left out."""
    rows = [decided[id] for id in clauses if id in decided]
    if not rows:
        return None
    said = []
    for row in rows:
        ours = quantity(row.ours, row.claim)
        if row.samples and row.interval != "–":
            ours += f" [{row.interval.replace(' to ', ', ')}]"
        said.append(clauses[row.claim.id].format(ours))
    paper, first = "; ".join(row.paper for row in rows), rows[0].result
    line = _line(said[0], rows[0].paper)
    return Answer(question, line, f"{'; '.join(said)}.", paper, basis(first) if first else "", rows, rows[0].link)
