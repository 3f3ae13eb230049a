"""Read what the pages show of each published result, and of the benchmarks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from moelab.config import from_json
from moelab.design.judging import MIN_SAMPLES
from moelab.design.verdicts import MEASURED
from moelab.experiments import EXPERIMENTS, Experiment
from moelab.files import read_json
from moelab.plotting.typography import typeset
from moelab.report.ledger import of_the_plan, scale_rank
from moelab.report.summary import (
    FigureRow,
    Hardware,
    Provenance,
    RunRow,
    Summary,
    read_all,
    read_rows,
    unreadable_line,
)
from moelab.terminal import duration

ODD = (AttributeError, KeyError, TypeError, ValueError)
"""What odd rows raise: those that lack a column, or have no number in it; what they say is not shown then."""


@dataclass(frozen=True)
class Picture:
    """An SVG by its name, with its width and height in pixels; 0 where it does not tell."""

    file: str
    width: int = 0
    height: int = 0

    @classmethod
    def of(cls, path: Path) -> Picture:
        """Return the picture in a file, which may be missing."""
        try:
            with open(path, encoding="utf-8", errors="replace") as f:
                points = re.search(r'<svg\b[^>]*?width="([\d.]+)pt" height="([\d.]+)pt"', f.read(1000))
        except OSError:
            points = None
        return cls(path.name, *(round(float(value) * 4 / 3) for value in points.groups())) if points else cls(path.name)


@dataclass(frozen=True)
class Result:
    """A published result.

    Attributes:
        folder: the result's folder.
        path: the same relative to the results, with slashes.
        summary: what its `summary.json` says.
    """

    folder: Path
    path: str
    summary: Summary

    @property
    def experiment(self) -> str:
        """Name of the experiment."""
        return self.summary.experiment

    @cached_property
    def scale(self) -> str:
        """The scale it ran at; `simulated` if all its verdicts are simulated and nothing was trained."""
        judged = [v for v in self.summary.claims if v.judged]
        simulated = judged and all(v.simulated for v in judged) and not self.summary.runs
        return "simulated" if simulated else self.summary.scale

    @property
    def title(self) -> str:
        """The main finding, typeset."""
        return typeset(self.summary.title)

    @property
    def date(self) -> str:
        """When it was finished, as ``2026-11-24 18:43 UTC``."""
        return self.summary.finished[:16].replace("T", " ") + " UTC"

    @property
    def about(self) -> Experiment:
        """The experiment."""
        return described(self.experiment)

    @cached_property
    def figures(self) -> Sequence[FigureRow]:
        """The figures, their texts typeset: first the one that shows the finding, else one with a judged claim."""
        judged = {v.claim for v in self.summary.claims if v.ours is not None}
        found = [replace(f, title=typeset(f.title), caption=typeset(f.caption)) for f in self.summary.figures]
        leads = [f for f in found if f.title == self.title] or [f for f in found if judged & set(f.claims)]
        lead = next(iter(leads), None)
        return sorted(found, key=lambda f: f is not lead)

    @property
    def models(self) -> str:
        """Parameters of its models and the most tokens of a run, as text; empty if nothing was trained."""
        numbers = [
            (run.result["parameters"], run.result["tokens"])
            for run in self.summary.runs
            if {"parameters", "tokens"} <= run.result.keys()
        ]
        if not numbers:
            return ""
        sizes, tokens = zip(*numbers, strict=True)
        return f"{span(sizes)} parameters, {large(max(tokens))} tokens"

    @property
    def seeds(self) -> str:
        """How many seeds, as text."""
        n = len(self.summary.seeds)
        timed = any(v.kind == MEASURED for v in self.summary.claims)
        return f"no seeds: {'timed' if timed else 'computed'}" if not n else f"{n} seed{'s' if n > 1 else ''}"

    def trained_by(self, run: RunRow) -> tuple[Provenance, ...]:
        """Return the commits and machines that have trained a run."""
        return run.provenance.sessions or (run.provenance,)

    def processors(self, run: RunRow) -> set[str]:
        """Return the kinds of processor that have trained a run."""
        return {_processor(one.hardware) for one in self.trained_by(run)}

    @cached_property
    def machines(self) -> dict[str, str]:
        """Each processor that trained runs, and the arms and seeds that it trained; that with the most runs first.

        A run that was continued on another processor counts for both.
        """
        arms: dict[str, dict[str, list[int]]] = {}
        for run in self.summary.runs:
            for processor in sorted(self.processors(run)):
                arms.setdefault(processor, {}).setdefault(run.label, []).append(run.seed)
        most_first = sorted(arms.items(), key=lambda item: -sum(map(len, item[1].values())))
        return {
            machine: ", ".join(f"{arm} ({' '.join(map(str, sorted(seeds)))})" for arm, seeds in by_arm.items())
            for machine, by_arm in most_first
        }

    @cached_property
    def mixed_seeds(self) -> list[int]:
        """The seeds whose runs were not all trained on one kind of processor."""
        pairs = {(run.seed, processor) for run in self.summary.runs for processor in self.processors(run)}
        return sorted({seed for seed, _ in pairs if sum(seed == one for one, _ in pairs) > 1})

    @property
    def hardware(self) -> str:
        """The machines, as text."""
        machine = self.summary.hardware or self.summary.provenance.hardware
        text = str(machine or "unknown hardware")
        if len(self.machines) > 1:
            short = [name.partition(" (")[0] for name in self.machines]  # without the list of instruction sets
            text = " and ".join(short if len(set(short)) == len(short) else self.machines)
        return f"computed on {text}" if self.scale == "simulated" else text

    @property
    def cost(self) -> str:
        """Time of training, or of computing where nothing was trained."""
        if self.summary.training_seconds:
            return f"{duration(self.summary.training_seconds)} of training"
        return f"{duration(self.computing_seconds)} of computing"

    @property
    def computing_seconds(self) -> float:
        """Seconds of the notebook, with those of the measurements that it read back."""
        earlier = sum(one.seconds for one in self.summary.measurements if one.read_back)
        return (self.summary.notebook_seconds or 0) + earlier

    @property
    def measurement_dates(self) -> list[str]:
        """On which days and at which commits the notebook's measurements were made."""
        dates = {(m.measured.partition(" ")[0], m.provenance.short_commit) for m in self.summary.measurements}
        return sorted(f"{day} at commit {commit}" for day, commit in dates)

    @cached_property
    def commits(self) -> tuple[str, ...]:
        """The commits at which its runs were trained, then the one at which the figures were drawn."""
        trained = sorted({one.short_commit for run in self.summary.runs for one in self.trained_by(run)})
        return (*trained, self.summary.provenance.short_commit)

    @cached_property
    def names(self) -> set[str]:
        """Names of the files in the folder; whoever writes a file adds its name."""
        return {p.name for p in self.folder.iterdir()}

    def has(self, name: str) -> bool:
        """Return whether the folder has a file of this name."""
        return name in self.names

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of a file of JSON lines in the folder, none if it is missing; ValueError: see `read_rows`."""
        return read_rows(self.folder / name) if self.has(name) else []

    def rows_or_none(self, name: str) -> list[dict[str, Any]]:
        """Return `rows`, none of a file that cannot be read, which the result's own page names."""
        try:
            return self.rows(name)
        except (ValueError, OSError, RecursionError):
            return []

    @cached_property
    def arms(self) -> list[dict[str, Any]]:
        """The runs by arm: label, seeds, and the mean of every number that all results of the arm have.

        Runs of one label that differ in a setting (a sweep) are arms of their own, named by what differs. A run that
        stands for two arms, as its own rate is the shared one, counts for the first.
        """
        settings: dict[str, dict[str, set[str]]] = {}  # label -> setting -> its values
        for run in self.summary.runs:
            for setting, value in run.settings.items():
                settings.setdefault(run.label, {}).setdefault(setting, set()).add(str(value))

        def name(run: RunRow) -> str:
            differing = [f"{f} {v}" for f, v in run.settings.items() if len(settings[run.label][f]) > 1]
            return ", ".join([run.label, *differing])

        results: dict[str, list[Mapping[str, Any]]] = {}
        seen: set[str] = set()
        for run in self.summary.runs:
            if run.id not in seen:
                results.setdefault(name(run), []).append(run.result)
            seen.add(run.id)
        rows = [{"arm": arm, "seeds": len(of_arm), **_means(of_arm)} for arm, of_arm in results.items()]
        loss = "validation_loss"  # what a reader looks for, on a narrow screen too
        return [{"arm": row["arm"], **({loss: row[loss]} if loss in row else {}), **row} for row in rows]

    @property
    def curves_note(self) -> str:
        """On how much text the points of curves and the final losses were evaluated; empty if that is the same."""
        trained = [run.spec["train"] for run in self.summary.runs if "train" in run.spec]
        along = {train.get("eval_tokens") for train in trained}
        final = {run.result.get("validation_tokens") for run in self.summary.runs}
        if len(along) != 1 or len(final) != 1 or None in along | final or along == final:
            return ""
        return (
            f"Curve: on {along.pop():,} tokens of the validation text. Final losses are on all {final.pop():,}, so the "
            "last point differs a little from them."
        )

    @property
    def search_text(self) -> str:
        """The text that the page's search looks through."""
        about, shown = (self.about.title, self.about.paper), (f.title for f in self.figures)
        return " ".join((self.experiment, self.scale, self.title, self.date, self.hardware, *about, *shown)).lower()

    def picture(self, name: str) -> Picture:
        """Return the picture of a figure."""
        return Picture.of(self.folder / f"{name}.svg")


def described(name: str) -> Experiment:
    """Return the experiment of a name; one that this version does not have has its name as title, and no question."""
    return EXPERIMENTS.get(name) or Experiment(
        name=name, number=0, title=name, paper="not in this version", question="", paper_answer="", scales={}
    )


def large(value: float) -> str:
    """Return a number as text: ``674 thousand``, ``1.0 million``, ``52 billion``."""
    for size, word in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if value >= size:
            shown = value / size
            return f"{shown:.0f} {word}" if shown >= 10 else f"{shown:.1f} {word}"
    return f"{value:g}"


def span(values: Iterable[float | None], text: Callable[[float], str] = large) -> str:
    """Return the least and the greatest of numbers as text: ``0.17 to 2.7 million``; ``unknown`` if there is none."""
    known = [v for v in values if v is not None]
    if not known:
        return "unknown"
    low, high = text(min(known)), text(max(known))
    if low == high:
        return low
    if low.partition(" ")[2] == high.partition(" ")[2]:
        low = low.partition(" ")[0]
    return f"{low} to {high}"


def _means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    def is_number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    keys = [key for key in rows[0] if all(is_number(row.get(key)) for row in rows)]
    return {key: sum(row[key] for row in rows) / len(rows) for key in keys}


def read_results(root: Path) -> tuple[list[Result], list[str]]:
    """Return all results below `root`, newest first, and a line for each that cannot be read."""
    summaries, unreadable = read_all(root)
    found = [Result(root / path, path, summary) for path, summary in summaries]
    return sorted(found, key=lambda r: (r.summary.finished, r.path), reverse=True), unreadable


def strongest(results: Sequence[Result], experiment: str, data: str = "") -> Result | None:
    """Return the newest result of an experiment at the scale whose evidence is strongest.

    Args:
        results: the newest first.
        data: only results that have this file.
    """
    found = [result for result in results if result.experiment == experiment and (not data or result.has(data))]
    return min(found, key=weakness, default=None)


def weakness(result: Result) -> tuple[int, int, bool]:
    """Return the sort key of an experiment's results, the strongest evidence first, as in the ledger.

    One or two seeds judge nothing (one less than two), and a result at `full` with other seeds or settings is not of
    the plan. At one scale the base that has most of the paper's claims comes first.
    """
    summary, rank = result.summary, scale_rank(result.scale)
    few = max(0, MIN_SAMPLES - len(summary.seeds)) if summary.seeds else 0
    return few if of_the_plan(summary) else MIN_SAMPLES, rank, summary.other_base != ""


BENCHMARKS = {
    "exchange": "Exchanges of tokens between ranks: time over the flat all-to-all",
    "gate": "The gate alone, forward and backward: time over ours",
    "layer": "One MoE layer, forward and backward: time over the dense layer of equal FLOPs",
    "train": "Training speed of the twins, side by side",
    "decode": "A decoding step: ours, the paper's baseline, transformers, llama.cpp",
    "decode-bf16": "A decoding step in bf16: ours, the paper's baseline, transformers, llama.cpp",
    "losses": "Validation losses by mode of inference and dtype",
}
"""Title of each benchmark of `moelab bench`."""


def _processor(machine: Hardware | None) -> str:
    """Return the kind of GPU or CPU, which determines how a run is rounded; how many there were does not."""
    return (machine and (next(iter(machine.gpus), None) or machine.cpu)) or "unknown hardware"


@dataclass(frozen=True)
class Benchmark:
    """The numbers of `moelab bench` or `moelab eval --out`, with the names of their files, provenance and picture.

    `name` and `files` are relative to `benchmarks/`; those of a further machine lie in a folder of their own there.
    """

    name: str
    title: str
    provenance: Provenance
    files: tuple[str, ...]
    rows: tuple[dict[str, Any], ...] = ()
    picture: Picture | None = None

    @property
    def table(self) -> list[dict[str, Any]]:
        """The rows without what makes a table unreadable: lists, objects, and long texts that all rows share."""
        dropped = {
            key
            for row in self.rows
            for key, value in row.items()
            if isinstance(value, list | dict)
            or (isinstance(value, str) and len(value) > 40 and all(other.get(key) == value for other in self.rows))
        }
        return [{key: value for key, value in row.items() if key not in dropped} for row in self.rows]


def read_benchmarks(root: Path) -> tuple[list[Benchmark], list[str]]:
    """Return what `benchmarks/` holds, by name, and a line for each that cannot be read."""
    found, unreadable = [], []
    folder = root / "benchmarks"
    for file in sorted((*folder.glob("*.provenance.json"), *folder.glob("*/*.provenance.json"))):
        machine, name = file.parent.relative_to(folder), file.name.removesuffix(".provenance.json")
        files = tuple(sorted(p.relative_to(folder).as_posix() for p in file.parent.glob(f"{name}.*")))
        rows_file = file.with_name(f"{name}.jsonl")
        try:
            provenance = from_json(Provenance, read_json(file), "provenance", known=True)
            rows = tuple(read_rows(rows_file)) if rows_file.exists() else ()
        except (ValueError, OSError, RecursionError) as error:
            unreadable.append(unreadable_line(file, root, error))
            continue
        title = typeset(provenance.title or BENCHMARKS.get(name, f"Benchmark: {name}"))
        if machine.name:
            title += f" ({machine.name})"
        drawn = file.with_name(f"{name}.svg")
        picture = replace(Picture.of(drawn), file=drawn.relative_to(folder).as_posix()) if drawn.exists() else None
        found.append(Benchmark((machine / name).as_posix(), title, provenance, files, rows, picture))
    return found, unreadable
