"""Say in words what an experiment found, how sure that is, and what it does not say: the end of every notebook."""

from __future__ import annotations

from collections.abc import Sequence

from moelab.design.verdicts import CANNOT_TELL, FITTED, MEASURED, Verdict, outcome

HERE = "It is about this machine and these shapes alone."


class Conclusion(str):
    """A text in markdown, which a notebook shows as such."""

    def _repr_markdown_(self) -> str:
        return str(self)


def conclude(
    headline: str,
    judged: Sequence[Verdict] = (),
    *,
    seeds: int = 0,
    simulated: bool = False,
    sure: str = "",
    scale: str = "",
) -> Conclusion:
    """Return the conclusion of an experiment.

    Args:
        headline: the main finding, one sentence.
        judged: the verdicts on the paper's claims; none for a question beyond the paper.
        seeds: of the training runs; 0 where nothing was trained.
        simulated: the finding is a simulation's, whether or not claims are judged.
        sure: how sure it is, in place of the sentence on seeds.
        scale: at `paper` models are not small.
    """
    lines = ["## Conclusion", "", f"**What was found.** {headline.rstrip('.')}."]
    decided = [v for v in judged if v.judged]
    lines += [
        f"- {outcome(v.verdict).sign} *{v.verdict}*: {v.statement} Ours {_value(v)}, the paper {v.paper or '–'}."
        for v in decided
    ]
    lines += [
        "",
        f"**How sure.** {_sure(decided, seeds, simulated, sure)}",
        "",
        f"**What it does not say.** {_limits(judged, decided, seeds, simulated, scale)}",
    ]
    return Conclusion("\n".join(lines))


def _value(verdict: Verdict) -> str:
    if verdict.ours is None:
        return "–"
    unit = f" {verdict.unit}" if verdict.unit else ""
    interval = verdict.samples and verdict.low is not None and verdict.high is not None
    return f"{verdict.ours:.3g}{unit}" + (f" ({verdict.low:.3g} to {verdict.high:.3g})" if interval else "")


def _sure(decided: Sequence[Verdict], seeds: int, simulated: bool, sure: str) -> str:
    kinds = {v.kind for v in decided}
    parts = [sure] if sure else []
    if MEASURED in kinds:
        samples = sorted({v.samples for v in decided if v.kind == MEASURED})
        count = f"{samples[0]}" if len(samples) == 1 else f"{samples[0]} to {samples[-1]}"
        parts.append(
            f"Intervals are 95 % over {count} seeds or sessions, each claim alone; the results pages adjust for the "
            "number of tests, after which some cannot be told."
        )
    elif seeds and not sure:
        parts.append("One seed says nothing of chance." if seeds == 1 else f"Intervals are 95 % over {seeds} seeds.")
    if simulated or any(v.simulated for v in decided):
        parts.append(
            "Simulated values have no spread: how far the simulator is off, notebook 11 shows number by number."
        )
    if FITTED in kinds:
        parts.append("Those it was fitted on are no evidence.")
    return " ".join(parts) or "Nothing here has a spread: what was counted is exact."


def _limits(judged: Sequence[Verdict], decided: Sequence[Verdict], seeds: int, simulated: bool, scale: str) -> str:
    parts = ["Its numbers of a cluster are simulated, not measured."] if simulated else []
    if seeds:
        parts.append(
            "Text and software are not the paper’s, and a difference to its numbers may be theirs."
            if scale == "paper"
            else "Small models on one machine show whether an effect appears at this size, not how large it is at the "
            "paper’s."
        )
    elif any(v.kind == MEASURED for v in decided):
        parts.append(HERE)
    if left := len(judged) - len(decided):
        parts.append(
            f"{left} of the paper’s {len(judged)} claims here {'is' if left == 1 else 'are'} not judged"
            f"{'' if simulated else ' at this scale'}."
        )
    unclear = [v.simulated for v in decided if v.verdict == CANNOT_TELL]
    if close := sum(unclear):
        parts.append(f"Not told: {close}, where two simulated values are too near each other for their order to count.")
    if open_ := len(unclear) - close:
        parts.append(f"Not told yet: {open_}, which more seeds or longer runs could turn either way.")
    return " ".join(parts) or HERE
