"""Put the results in the paper's order; say how all claims came out, how large twins are, how a result is made again.

All of it is generated from the stored verdicts, specs and parameters of the results that are there.
"""

from __future__ import annotations

import contextlib
import functools
import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from moelab import paper
from moelab.config import ModelConfig
from moelab.design.parameters import parameters
from moelab.experiments import EXPERIMENTS, Experiment
from moelab.report.ledger import OPEN
from moelab.report.site.claims import HEADINGS, ClaimRow, TallyItem
from moelab.report.site.plot import Axis, axes
from moelab.report.site.results import Result, described, large, span, weakness


@dataclass(frozen=True)
class Chapter:
    """One experiment of the gallery.

    Attributes:
        about: the experiment.
        results: the newest of each scale and base, the strongest evidence first.
    """

    about: Experiment
    results: Sequence[Result]


def chapters(results: Sequence[Result]) -> list[Chapter]:
    """Return a chapter for every experiment, with or without a result, in the order of the paper's claims.

    Args:
        results: the newest first.
    """
    newest: dict[str, dict[tuple[str, str], Result]] = {}
    for result in sorted(results, key=weakness):
        newest.setdefault(result.experiment, {}).setdefault((result.scale, result.summary.other_base), result)
    names = dict.fromkeys([*paper.experiments(), *EXPERIMENTS, *newest])
    return [Chapter(described(name), list(newest.get(name, {}).values())) for name in names]


def by_chapter(rows: Sequence[ClaimRow], chapters: Sequence[Chapter]) -> list[tuple[Chapter, list[ClaimRow]]]:
    """Return the claims that a result supports, grouped by experiment in the order of `chapters`."""
    groups: dict[str, list[ClaimRow]] = {}
    for row in rows:
        if row.result:
            groups.setdefault(row.experiment, []).append(row)
    return [(chapter, groups[chapter.about.name]) for chapter in chapters if chapter.about.name in groups]


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

    It is about the runs of every experiment but the tour (`start`), which compares nothing.
    """
    by_scale: dict[str, list[Result]] = {}
    for result in (result for result in results if result.experiment != "start"):
        by_scale.setdefault(result.scale, []).append(result)
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
        if name == "arms" and isinstance(value, list) and set(map(str, value)) == set(about.arms or ()):
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
