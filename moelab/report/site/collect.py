"""What the pages show, read from the publications: results, and the ledger of the paper's claims."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from moelab import paper
from moelab.experiments import EXPERIMENTS, Experiment
from moelab.files import read_json
from moelab.paper.verdicts import (
    DIRECTION,
    NO_SPREAD,
    NOT_REPRODUCED,
    NOT_TESTABLE,
    NOT_TESTED,
    REPRODUCED,
    SIMULATED,
    SIMULATED_DIRECTION,
    SIMULATED_FAILS,
    SIMULATED_HOLDS,
    SIMULATED_WITHIN,
    UNDECIDED,
)
from moelab.plotting.typography import typeset
from moelab.report.ledger import DISAGREES, NOT_YET, SCALES, entries
from moelab.report.publication import SUMMARY
from moelab.report.site.order import position
from moelab.report.site.template import quantity
from moelab.runs.progress import duration
from moelab.runs.provenance import describe

VERDICTS = {
    REPRODUCED: ("✓", "good"),
    SIMULATED_HOLDS: ("✓", "good"),
    SIMULATED_WITHIN: ("✓", "good"),
    DIRECTION: ("↗", "part"),
    SIMULATED_DIRECTION: ("↗", "part"),
    UNDECIDED: ("?", "open"),
    NOT_REPRODUCED: ("✗", "bad"),
    SIMULATED_FAILS: ("✗", "bad"),
    DISAGREES: ("≠", "open"),
    NO_SPREAD: ("1", "none"),
    NOT_TESTED: ("–", "none"),
    NOT_TESTABLE: ("–", "none"),
    NOT_YET: ("–", "none"),
}
"""Verdict -> sign and style, in the order of the summary."""

OPEN = (DISAGREES, NOT_TESTED, NOT_TESTABLE, NOT_YET)
"""Verdicts of claims that no result here judges."""


def tally(count: Mapping[str, int]) -> list[tuple[str, list[tuple[str, str, int]]]]:
    """The counted verdicts as they stand above the ledger: (heading, [(verdict, the same in a word, how many)]) for each kind of evidence."""
    every = dict.fromkeys((*VERDICTS, *sorted(count)))
    kinds = {
        "Measured here": [v for v in every if v not in SIMULATED and v not in OPEN],
        "Simulated on the paper's cluster": [v for v in every if v in SIMULATED],
        "Open": [v for v in every if v in OPEN],
    }
    made = (
        (name, [(v, v.removeprefix("simulated: "), count[v]) for v in of if count.get(v)]) for name, of in kinds.items()
    )
    return [(name, of) for name, of in made if of]


def sign(verdict: str) -> tuple[str, str]:
    """Sign and style of a verdict."""
    return VERDICTS.get(verdict, ("•", "none"))


@dataclass(frozen=True)
class Result:
    """One publication.

    Attributes:
        folder: where it lies.
        path: the same relative to the results, with slashes.
        summary: its `summary.json`; see `moelab.report.publication`.
    """

    folder: Path
    path: str
    summary: Mapping[str, Any]

    @property
    def experiment(self) -> str:
        return self.summary["experiment"]

    @cached_property
    def scale(self) -> str:
        """The scale it ran at; `simulated` for one that says so in all its verdicts and trained nothing."""
        verdicts = {v["verdict"] for v in self.claims} - {NOT_TESTED, NOT_TESTABLE}
        return "simulated" if verdicts and verdicts <= set(SIMULATED) and not self.runs else self.summary["scale"]

    @property
    def title(self) -> str:
        return typeset(self.summary["title"])

    @property
    def finished(self) -> str:
        return self.summary["finished"]

    @property
    def date(self) -> str:
        """``2026-11-24 18:43 UTC``."""
        return self.finished[:16].replace("T", " ") + " UTC"

    @property
    def about(self) -> Experiment | None:
        return EXPERIMENTS.get(self.experiment)

    @cached_property
    def figures(self) -> Sequence[Mapping[str, Any]]:
        of = self.summary.get("figures", [])
        return [{**f, "title": typeset(f["title"]), "caption": typeset(f.get("caption", ""))} for f in of]

    @property
    def tables(self) -> Sequence[Mapping[str, Any]]:
        return self.summary.get("tables", [])

    @property
    def claims(self) -> Sequence[Mapping[str, Any]]:
        return self.summary.get("claims", [])

    @property
    def runs(self) -> Sequence[Mapping[str, Any]]:
        return self.summary.get("runs", [])

    @property
    def seeds(self) -> str:
        n = len(self.summary.get("seeds") or [])
        return "no seeds: computed" if not n else f"{n} seed{'s' if n > 1 else ''}"

    @property
    def hardware(self) -> str:
        record = self.summary.get("hardware") or self.summary.get("provenance", {}).get("hardware")
        made = describe(record) if record else "unknown hardware"
        return f"computed on {made}" if self.scale == "simulated" else made

    @property
    def cost(self) -> str:
        if trained := self.summary.get("training_seconds"):
            return f"{duration(trained)} of training"
        earlier = sum(one["seconds"] for one in self.summary.get("measurements", ()) if one["read_back"])
        return f"{duration((self.summary.get('notebook_seconds') or 0) + earlier)} of computing"

    @property
    def measured(self) -> list[str]:
        """When and by which code the notebook's measurements were made, each pair once."""
        made = ((one["measured"], one["provenance"]) for one in self.summary.get("measurements", ()))
        return sorted({f"{when.partition(' ')[0]} at commit {_commit(record)}" for when, record in made})

    @cached_property
    def commits(self) -> tuple[str, ...]:
        """The commits its runs were trained at, then the one the figures were drawn at; each short, with its state."""
        trained = sorted({_commit(run.get("provenance", {})) for run in self.runs})
        return (*trained, _commit(self.summary.get("provenance", {})))

    def has(self, name: str) -> bool:
        """Whether a file lies beside the summary."""
        return name in self.names

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of a JSON-lines file beside the summary; none if it is missing."""
        return _rows(self.folder / name) if self.has(name) else []

    @cached_property
    def arms(self) -> list[dict[str, Any]]:
        """The runs by arm: label, seeds, and the mean of every number that all results of the arm have, in the order of the runs.

        Runs of one label that were trained differently (a sweep) are arms of their own, named by what differs.
        """
        settings: dict[str, dict[str, set[str]]] = {}  # label -> field of TrainConfig -> its values
        for run in self.runs:
            for field, value in _train(run).items():
                settings.setdefault(run["label"], {}).setdefault(field, set()).add(str(value))
        arms: dict[str, list[Mapping[str, Any]]] = {}
        for run in self.runs:
            differs = [f"{f} {v}" for f, v in _train(run).items() if len(settings[run["label"]][f]) > 1]
            arms.setdefault(", ".join([run["label"], *differs]), []).append(run["result"])
        made = []
        for label, rows in arms.items():
            keys = [k for k in rows[0] if all(_is_number(row.get(k)) for row in rows)]
            made.append({"arm": label, "seeds": len(rows), **{k: sum(r[k] for r in rows) / len(rows) for k in keys}})
        return made

    @cached_property
    def names(self) -> set[str]:
        """The files of the folder; whoever adds one adds its name."""
        return {p.name for p in self.folder.iterdir()}

    @property
    def words(self) -> str:
        """What the search looks through."""
        about = self.about
        described = (about.title, about.paper) if about else ()
        shown = (f["title"] for f in self.figures)
        return " ".join((self.experiment, self.scale, self.title, self.date, self.hardware, *described, *shown)).lower()

    def image(self, name: str) -> dict[str, str]:
        """The files that show a figure: `light`, and `dark` where there is one (else the light one stands on a white card)."""
        if self.has(f"{name}-dark.svg"):
            return {"light": f"{name}.svg", "dark": f"{name}-dark.svg"}
        return {"light": f"{name}.png"}


def _rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON-lines file; none if it is missing."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def _train(run: Mapping[str, Any]) -> dict[str, Any]:
    """How a run was trained, its seed left out, and what follows from the peak rate."""
    train = run.get("spec", {}).get("train", {})
    return {field: value for field, value in train.items() if field not in ("seed", "min_lr")}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _commit(record: Mapping[str, Any]) -> str:
    return (record.get("commit") or "none")[:10] + (" with changes" if record.get("modified") else "")


def results(root: Path) -> tuple[list[Result], list[str]]:
    """All results below `root`, newest first, and a line for each that cannot be read."""
    found, broken = [], []
    for file in sorted(root.glob(f"*/*/*/{SUMMARY}")):
        if file.parent.name.startswith("."):
            continue  # being moved into place
        try:
            summary = read_json(file)
            if missing := {"experiment", "scale", "title", "finished"} - set(summary):
                raise ValueError(f"lacks {', '.join(sorted(missing))}")
        except (ValueError, TypeError, OSError) as error:
            broken.append(f"{file.relative_to(root).as_posix()}: {str(error).split(': ', 1)[-1]}")
            continue
        found.append(Result(file.parent, file.parent.relative_to(root).as_posix(), summary))
    return sorted(found, key=lambda r: (r.finished, r.path), reverse=True), broken


@dataclass(frozen=True)
class Chapter:
    """One experiment of the gallery.

    Attributes:
        name, title, reference, question, answer: the experiment's, as far as it is known.
        command: what runs it, empty for an experiment this version does not have.
        shown: scale -> its newest result, the most telling scale first.
        position: its place in the paper, see `moelab.report.site.order`.
    """

    name: str
    title: str
    reference: str
    question: str
    answer: str
    command: str
    shown: Mapping[str, Result]
    position: int


def scale_rank(scale: str) -> int:
    """0 for the most telling scale; a scale that the ledger does not know comes last."""
    return len(SCALES) - 1 - SCALES.index(scale) if scale in SCALES else len(SCALES)


def chapters(found: Sequence[Result]) -> list[Chapter]:
    """All experiments, with a result or not yet, in the order of the paper."""
    newest: dict[str, dict[str, Result]] = {}
    for result in found:
        newest.setdefault(result.experiment, {}).setdefault(result.scale, result)
    made = []
    for name in dict.fromkeys([*EXPERIMENTS, *newest]):
        about = EXPERIMENTS.get(name)
        where = about.paper if about else ", ".join(c.where for c in paper.claims() if c.experiment == name)
        shown = dict(sorted(newest.get(name, {}).items(), key=lambda item: scale_rank(item[0])))
        made.append(
            Chapter(
                name,
                about.title if about else name,
                where,
                about.question if about else "",
                about.paper_answer if about else "",
                f"moelab run {name}" if about else "",
                shown,
                position(where),
            )
        )
    return sorted(made, key=lambda c: c.position)


@dataclass(frozen=True)
class Line:
    """A claim of the paper and what one result says of it.

    Attributes:
        claim: the paper's statement.
        verdict: one of `moelab.paper.verdicts` or `moelab.report.ledger`.
        result: where it was measured, None for a claim of which no result says anything.
        scale: at which; empty where there is no result.
        ours, low, high: as `Verdict` has them; an infinite bound is None.
        figure: name of the figure that shows it, empty if none does.
        best: whether this is the claim's most telling line, the one that counts.
    """

    claim: paper.Claim
    verdict: str
    result: Result | None = None
    scale: str = ""
    ours: float | None = None
    low: float | None = None
    high: float | None = None
    samples: int = 0
    note: str = ""
    figure: str = ""
    best: bool = False

    @property
    def paper(self) -> str:
        """The paper's number with its unit, or the side it claims: ``−0.307 nats/token``, ``lower``."""
        return self.claim.direction if self.claim.value is None else quantity(self.claim.value, self.claim)

    @property
    def words(self) -> str:
        """What the search looks through."""
        c = self.claim
        return " ".join((c.id, c.statement, c.where, c.experiment, self.experiment, c.quantity, self.verdict)).lower()

    @property
    def experiment(self) -> str:
        """The one whose result this is, else the one that the claim is listed under."""
        return self.result.experiment if self.result else self.claim.experiment

    @property
    def link(self) -> str:
        """The page of the result, at the figure that shows this claim."""
        return f"{self.result.path}/index.html#{self.figure or 'claims'}" if self.result else ""


def judged(result: Result) -> list[Line]:
    """What a result says of the paper's claims, those it could not test included; claims this version does not know are left out."""
    known = {claim.id: claim for claim in paper.claims()}
    return [
        Line(
            known[v["claim"]],
            v["verdict"],
            result,
            result.scale,
            *(_finite(v.get(key)) for key in ("ours", "low", "high")),
            samples=v.get("samples", 0),
            note=v.get("note", ""),
        )
        for v in result.claims
        if v["claim"] in known
    ]


def ledger(found: Sequence[Result]) -> list[Line]:
    """Every claim, in the order of the paper's figures: a line for each scale with a value, the one that counts first, or one line without.

    What counts is decided by `moelab.report.ledger`, as for `moelab claims`.
    """
    by_path = {result.path: result for result in found}
    lines = []
    for entry in entries((result.path, result.summary) for result in found):
        claim, counts = paper.claim(entry.claim), entry.finding
        told = [f for f in entry.findings if f.judged or f.ours is not None]
        for f in sorted(told, key=lambda f: f is not counts):
            numbers = (_finite(value) for value in (f.ours, f.low, f.high))
            figure = f.figure.removeprefix(f"{f.result}/").removesuffix(".png")
            verdict = entry.verdict if f is counts else f.verdict
            line = Line(
                claim, verdict, by_path[f.result], f.scale, *numbers, f.samples, f.note, figure, best=f is counts
            )
            lines.append(line)
        if not told:
            lines.append(Line(claim, entry.verdict, best=True))
    return sorted(lines, key=lambda line: position(line.claim.where))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def grouped(lines: Sequence[Line], of: Sequence[Chapter]) -> list[tuple[Chapter, list[Line]]]:
    """The lines that a result stands behind, by experiment, in the order of `of`."""
    by_name: dict[str, list[Line]] = {}
    for line in lines:
        if line.result:
            by_name.setdefault(line.experiment, []).append(line)
    return [(chapter, by_name[chapter.name]) for chapter in of if chapter.name in by_name]


BENCHMARKS = {
    "exchange": "Exchanges of tokens between ranks: time over the flat all-to-all",
    "gate": "The gate alone, forward and backward: time over ours",
    "layer": "One MoE layer, forward and backward: time over the dense layer of equal FLOPs",
    "scaling": "Weak scaling of training over ranks of one machine",
    "submit": "What Slurm adds: from submitting to the first step, many runs at once",
    "train": "Training speed of the twins, side by side",
    "decode": "A decoding step: optimised, the paper's baseline, transformers",
}
"""What each benchmark of `moelab bench` measures."""


@dataclass(frozen=True)
class Benchmark:
    """Numbers of `moelab bench` or `moelab eval --out`: a name with its files beside a provenance."""

    name: str
    title: str
    path: str
    hardware: str
    commit: str
    files: tuple[str, ...]
    rows: tuple[dict[str, Any], ...] = ()

    def has(self, suffix: str) -> bool:
        return f"{self.name}{suffix}" in self.files


def benchmarks(root: Path) -> list[Benchmark]:
    """What lies in `benchmarks/`, by name."""
    made = []
    for file in sorted((root / "benchmarks").glob("*.provenance.json")):
        name = file.name.removesuffix(".provenance.json")
        record = read_json(file)
        beside = tuple(sorted(p.name for p in file.parent.glob(f"{name}.*")))
        made.append(
            Benchmark(
                name,
                typeset(record.get("title") or BENCHMARKS.get(name, f"Benchmark: {name}")),
                "benchmarks",
                describe(record["hardware"]),
                _commit(record),
                beside,
                tuple(_rows(file.with_name(f"{name}.jsonl"))),
            )
        )
    return made
