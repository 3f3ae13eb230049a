"""Say in five sentences what the results found, how large the twins are, and how each result is made again.

All of it is generated from the stored verdicts, specs and parameters of the results that are there.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shlex
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from moelab import paper
from moelab.config import ModelConfig
from moelab.design.parameters import parameters
from moelab.design.verdicts import (
    CANNOT_TELL,
    COUNTED,
    DIRECTION,
    DISAGREES,
    EQUAL,
    FEW,
    FITTED,
    NO_DIFFERENCE,
    NOT_REPRODUCED,
    NOT_TESTABLE,
    PREDICTED,
    REPRODUCED,
    SIMULATED_CLOSE,
    SIMULATED_DIRECTION,
    SIMULATED_FAILS,
    SIMULATED_HOLDS,
    SIMULATED_WITHIN,
    UNDECIDED,
)
from moelab.experiments import EXPERIMENTS
from moelab.plotting.typography import typeset
from moelab.report.ledger import OPEN
from moelab.report.site.claims import HEADINGS, TIMED, TRAINED, ClaimRow, TallyItem
from moelab.report.site.plot import Axis, axes
from moelab.report.site.results import Result, large, span

SHOWN = 3
"""Claims quoted below a finding, at most."""


@dataclass(frozen=True)
class Finding:
    """A sentence on what was found, with claims that show it.

    Attributes:
        name: two words that say what it is about.
        sentence: one sentence.
        claims: the claims quoted below it, the clearest first.
        more: how many others there are.
    """

    name: str
    sentence: str
    claims: Sequence[ClaimRow] = ()
    more: int = 0


def findings(rows: Iterable[ClaimRow], counted: Collection[str]) -> list[Finding]:
    """Return five findings: where training agrees, contradicts, leaves open; timings; what was not measured.

    They count verdicts after Holm's adjustment.

    Args:
        rows: of all claims (`moelab.report.site.claims.all_claims`); the deciding one of each claim counts.
        counted: ids of the claims that count, those that rows share once (`moelab.report.ledger.distinct`).
    """
    decided = [row for row in rows if row.decides and row.claim.id in counted]
    trained = [row for row in decided if row.group == TRAINED]
    agreeing = _with(trained, REPRODUCED, DIRECTION, EQUAL)
    contradicting = _with(trained, NOT_REPRODUCED, NO_DIFFERENCE)
    unsettled = [row for row in trained if row not in agreeing and row not in contradicting]
    return [
        _agreement(agreeing, len(trained)),
        _quoting(
            "Contradiction",
            contradicting,
            lambda n: (
                f"{_claims(n)} {'is' if n == 1 else 'are'} contradicted by the trained twins{_slight(contradicting)}:"
            ),
            f"{'No' if trained else 'Without such a test no'} claim is contradicted by the trained twins.",
        ),
        _undecided(unsettled, [row for row in decided if row.group == OPEN or not row.group]),
        _timing([row for row in decided if row.group == TIMED]),
        _not_measured(decided),
    ]


def _with(rows: Sequence[ClaimRow], *verdicts: str) -> list[ClaimRow]:
    return sorted((row for row in rows if row.verdict in verdicts), key=_doubt)


def _doubt(row: ClaimRow) -> float:
    """Return a number that is smaller the clearer a claim's interval is: its width over our value."""
    if row.low is None or row.high is None or not row.ours:
        return float("inf")
    return (row.high - row.low) / abs(row.ours)


def _claims(n: int, what: str = "claim") -> str:
    words = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")
    return f"{words[n] if n < len(words) else n} {what}{'' if n == 1 else 's'}"


def _quoting(name: str, rows: Sequence[ClaimRow], sentence: Callable[[int], str], none: str) -> Finding:
    return Finding(name, sentence(len(rows)) if rows else none, rows[:SHOWN], len(rows[SHOWN:]))


def _agreement(rows: Sequence[ClaimRow], trained: int) -> Finding:
    n = Counter(row.verdict for row in rows)
    equal = f", {n[EQUAL]} in being equal, without showing the paper's difference" if n[EQUAL] else ""
    return _quoting(
        "Agreement",
        rows,
        lambda agreeing: (
            f"The trained twins agree with the paper on {agreeing} of the {trained} claims they were trained for: "
            f"{n[REPRODUCED]} as stated, {n[DIRECTION]} in direction, without showing the paper's size of effect"
            f"{equal}."
        ),
        "No trained claim agrees with the paper yet." if trained else "No claim has been tested by training yet.",
    )


def _slight(rows: Sequence[ClaimRow]) -> str:
    """Say how many of the contradicted claims are orders of which no difference that matters is there."""
    slight = len(_with(rows, NO_DIFFERENCE))
    return f", {slight} of them by a difference too small to matter" if slight else ""


def _undecided(rows: Sequence[ClaimRow], open_: Sequence[ClaimRow]) -> Finding:
    larger = sum(row.verdict == NOT_TESTABLE for row in open_)
    disputed = sum(row.verdict == DISAGREES for row in open_)
    left = f"{len(open_)} {'other has' if len(open_) == 1 else 'others have'} no verdict"
    if larger:
        left += f", {larger} of them because they need larger or longer runs than any at hand"
    if disputed:
        left += f", {disputed} because the paper’s own numbers disagree"
    left = left if open_ else "every other claim has a verdict"
    return _quoting(
        "Undecided",
        rows,
        lambda n: (
            f"{_claims(n)} that twins were trained for {'stays' if n == 1 else 'stay'} undecided: "
            f"{_reasons(rows)}; {left}."
        ),
        f"No trained claim is undecided; {left}.",
    )


def _reasons(rows: Sequence[ClaimRow]) -> str:
    """Say for how many of these claims which reason leaves them undecided."""
    n = Counter(row.verdict for row in rows)
    reasons = (
        (n[UNDECIDED], "because the seeds leave both answers open"),
        (n[CANNOT_TELL], "because the arms that must differ do not differ in these runs"),
        (sum(n[few] for few in FEW), "because seeds are too few or missing"),
    )
    return ", ".join(f"{k} {why}" for k, why in reasons if k) or "for want of samples"


def _timing(rows: Sequence[ClaimRow]) -> Finding:
    agreeing, against = _with(rows, REPRODUCED, DIRECTION), _with(rows, NOT_REPRODUCED)
    few = sum(row.verdict in FEW for row in rows)

    def sentence(n: int) -> str:
        if few == n:
            were = "was" if n == 1 else "were"
            return f"{_claims(n)} about speed {were} timed in fewer than three sessions, which judges nothing:"
        open_ = sum(row.verdict in (UNDECIDED, CANNOT_TELL) for row in rows)
        unjudged = f", {open_} undecided" if open_ else ""
        unjudged += f", {few} not judged (fewer than three sessions)" if few else ""
        whole = sum(row.verdict == REPRODUCED for row in agreeing)
        return (
            f"Of {n} claims about speed timed here {whole} agree, {len(agreeing) - whole} in direction only, and "
            f"{len(against)} contradict{unjudged}:"
        )

    ordered = [*against, *agreeing, *(row for row in rows if row not in against and row not in agreeing)]
    return _quoting("Speed", ordered, sentence, "No claim about speed has been timed here yet.")


def _not_measured(rows: Sequence[ClaimRow]) -> Finding:
    """Say what arithmetic and the simulator find; a contradiction among them is quoted."""
    of = {kind: [row for row in rows if row.group == kind] for kind in (COUNTED, PREDICTED, FITTED)}
    parts = []
    if counted := of[COUNTED]:
        parts.append(f"arithmetic confirms {len(_with(counted, REPRODUCED))} of {len(counted)} counted claims")
    if predicted := of[PREDICTED]:
        n = Counter(row.verdict for row in predicted)
        parts.append(
            f"the simulated cluster predicts {n[SIMULATED_WITHIN] + n[SIMULATED_HOLDS]} of {len(predicted)} as the "
            f"paper states them (numbers within 15 %), {n[SIMULATED_DIRECTION]} in direction only and "
            f"{n[SIMULATED_FAILS]} not"
            + (f", and cannot tell {n[SIMULATED_CLOSE]}, within its own error" if n[SIMULATED_CLOSE] else "")
        )
    if fitted := of[FITTED]:
        parts.append(f"{len(fitted)} more served to fit it and prove nothing")
    if not parts:
        return Finding("Not measured", "Nothing has been counted or simulated yet.")
    against = [*_with(of[COUNTED], NOT_REPRODUCED), *_with(of[PREDICTED], SIMULATED_FAILS)]
    text = f"Without any measurement, {'; '.join(parts)}{':' if against else '.'}"
    return Finding("Not measured", typeset(text), against[:SHOWN], len(against[SHOWN:]))


@dataclass(frozen=True)
class ForestGroup:
    """Claims of one group in the forest plot: their verdicts counted, and their rows by the axis that they share."""

    name: str
    heading: str
    tally: Sequence[TallyItem]
    panels: Sequence[tuple[Axis | None, Sequence[ClaimRow]]]


def forest(rows: Iterable[ClaimRow], tally: dict[str, list[TallyItem]]) -> list[ForestGroup]:
    """Return the deciding rows of all claims by group, with their axes; groups without claims are left out."""
    decided = [row for row in rows if row.decides]
    return [
        ForestGroup(name, HEADINGS[name], items, axes(row for row in decided if (row.group or OPEN) == name))
        for name, items in tally.items()
    ]


def sizes(results: Sequence[Result]) -> dict[str, str]:
    """Return scale -> a text: how large its twins are and how long they trained, beside the paper's models.

    It is about the runs behind the newest result of every experiment but the tour (`start`), which compares nothing.
    """
    newest: dict[tuple[str, str], Result] = {}
    for result in (result for result in results if result.experiment != "start"):
        newest.setdefault((result.scale, result.experiment), result)
    by_scale: dict[str, list[Result]] = {}
    for (scale, _), result in newest.items():
        by_scale.setdefault(scale, []).append(result)
    return {scale: text for scale, found in by_scale.items() if (text := _size(found))}


def _size(results: Sequence[Result]) -> str:
    runs = {run.id: run for result in results for run in result.summary.runs}.values()
    models, trained, data = (
        [run.spec[part] for run in runs if part in run.spec] for part in ("model", "train", "data")
    )
    parameters = [run.result["parameters"] for run in runs if "parameters" in run.result]
    if not (models and trained and parameters):
        return ""
    published = [known for model in models if (known := _paper_size(str(model.get("name", ""))))]
    seeds = [len(result.summary.seeds) for result in results if result.summary.seeds]
    tokens, corpora = _range_of(trained, "tokens", large), sorted({str(d.get("corpus")) for d in data})
    shape = f"{_range_of(models, 'layers')} layers of {_range_of(models, 'hidden')}"
    each = f"{span(seeds, str)} seed{'' if set(seeds) == {1} else 's'} each"
    return (
        f"The twins have {span(parameters)} parameters in {shape} and are trained on {tokens} "
        f"tokens of {', '.join(corpora)}, {each} ({len(runs)} runs). The paper’s models of these names have "
        f"{span(size for size, _ in published)} parameters and {span(tokens for _, tokens in published)} tokens."
    )


@functools.cache
def _paper_size(name: str) -> tuple[int, float] | None:
    """Return parameters and training tokens of the paper's model of which `name` names the twin, None if unknown."""
    try:
        label = name.removesuffix(" twin")
        return ModelConfig.parse(label).parameters(), paper.training_settings(label).train_tokens
    except ValueError:
        return None


def _range_of(configs: Iterable[Mapping[str, float]], field: str, text: Callable[[float], str] = str) -> str:
    return span((config.get(field) for config in configs), text)


def command(result: Result) -> str:
    """Return the command that makes a result again, from its parameters; empty for an unknown experiment.

    Parameters that today's notebook does not have, and those at their defaults, are left out.
    """
    about = EXPERIMENTS.get(result.experiment)
    if about is None:
        return ""
    given = result.summary.parameters
    swept = given.get("sweep")
    varied = {k: v for k, v in swept.items() if isinstance(v, list)} if isinstance(swept, dict) else {}
    scale = given.get("scale") if varied else result.summary.scale
    words = ["moelab", "sweep" if varied else "run", about.name, *(["--scale", _text(scale)] if scale else [])]
    defaults = _defaults(about.name)
    for name, values in varied.items():
        texts = [_text(value) for value in values]
        words += ["-g", f"{name}={(';' if any(',' in text for text in texts) else ',').join(texts)}"]
    for name, value in given.items():
        if name == "scale" or name not in defaults or value in (None, "", [], {}, defaults[name]):
            continue
        if name == "arms" and isinstance(value, list) and set(value) == set(about.arms or ()):
            continue
        if name == "overrides" and isinstance(value, dict):
            words += [word for key, v in value.items() for word in ("-p", f"{key}={_text(v)}")]
        else:
            words += ["-p", f"{name}={_text(value)}"]
    return shlex.join(words)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@functools.cache
def _defaults(name: str) -> dict[str, object]:
    """Return the parameters of an experiment's notebook with their defaults; none without the notebook."""
    with contextlib.suppress(ValueError):
        return {p.name: p.default for p in parameters(EXPERIMENTS[name]).values()}
    return {}
