"""Keep the evaluations of a run's weights beside it, so that they stay where the weights do not.

    .moelab/runs/<id>/measured/<function>-<digest>.json      arguments, result's digest, code, when, provenance, value

Records (`moelab.runs.records`) hold these files but no weights. An experiment that scores a model or routes text
through it can so be judged, drawn and published from records. Times do not belong here: they depend on the machine, see
`moelab.runs.measurements`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moelab.files import write_json
from moelab.runs.measurements import EVALUATIONS, as_json, call, code, file_digest, prefix, read_record
from moelab.runs.spec import RunSpec
from moelab.runs.store import Run, RunStore
from moelab.terminal import announced


def measure(run: Run, function: Callable[..., Any], *arguments: Any, **others: Any) -> Any:
    """Return what `function(run, *arguments, **others)` returns, as JSON values.

    It is read back if the same code has measured it with the same arguments and the run's present result. Where the
    weights are gone, any earlier code's value is read back.

    Args:
        run: a finished run.
        function: named function of a module of moelab, whose code tells when to measure again; its value is JSON and
            depends on the weights and the arguments alone.
        arguments: numbers, texts, dataclasses, and lists or dicts of them.
        others: what the value does not depend on, such as a function that shows progress.

    Raises:
        ValueError: one line: neither the value nor the weights are there.
    """
    if stored := _current(run, function, arguments):
        return stored["value"]
    run.require_weights()
    record = call(function, (run, *arguments), arguments=as_json(arguments), **others)
    record |= {"result": file_digest(run.path / "result.json")}
    try:
        write_json(_file(run, function, arguments), record)
    except OSError as error:  # a run of another user, say: the value is good, though nobody else will have it
        print(f"{function.__name__}: not kept: {error.strerror}: {run.path / EVALUATIONS}", file=sys.stderr)
    return record["value"]


def measure_all(runs: Sequence[Run], function: Callable[..., Any], *arguments: Any) -> list[tuple[Run, Any]]:
    """Return the runs that have a value or the weights, each with what `measure` returns; announce new measurements."""
    there = [run for run in runs if run.has_weights or _stored(run, function, arguments)]
    new = [run for run in there if not _current(run, function, arguments)]
    named = announced(new, lambda run: f"{run.spec.title}, seed {run.spec.train.seed}")
    values = {run.path: measure(run, function, *arguments) for run in named}
    return [(run, values[run.path] if run.path in values else measure(run, function, *arguments)) for run in there]


def require(run: Run, function: Callable[..., Any], *arguments: Any) -> None:
    """Check that `measure` has a value or the weights; ValueError, one line, where both are missing."""
    if not _stored(run, function, arguments):
        run.require_weights()


def require_of_finished(
    specs: Sequence[RunSpec], store: RunStore, function: Callable[..., Any], *arguments: Any
) -> None:
    """Check by `require` those of the specs' runs that are finished, which is told before the others are trained."""
    for spec in specs:
        if (run := store.run(spec, write=False)).finished:
            require(run, function, *arguments)


def files(run: Run) -> list[Path]:
    """Return the files that hold what was measured with the run's present weights, sorted."""
    digest = file_digest(run.path / "result.json")
    records = [(file, _read(file)) for file in sorted((run.path / EVALUATIONS).glob("*.json"))]
    return [file for file, record in records if record and record["result"] == digest]


def is_new(run: Run, file: Path, record: dict[str, Any]) -> bool:
    """Return whether an imported record adds a file to the run, or replaces one that was measured earlier.

    It replaces none where the weights are there: what they give with today's code counts, see `measure`.
    """
    if not file.exists():
        return True
    digest, there = file_digest(run.path / "result.json"), _read(file)
    older = not there or there["result"] != digest or str(there.get("measured")) < str(record.get("measured"))
    return older and record.get("result") == digest and not run.has_weights


def _stored(run: Run, function: Callable[..., Any], arguments: tuple[Any, ...]) -> dict[str, Any] | None:
    record = _read(_file(run, function, arguments))
    return record if record and record["result"] == file_digest(run.path / "result.json") else None


def _current(run: Run, function: Callable[..., Any], arguments: tuple[Any, ...]) -> dict[str, Any] | None:
    stored = _stored(run, function, arguments)
    return stored if stored and (stored["code"] == code() or not run.has_weights) else None


def _read(file: Path) -> dict[str, Any] | None:
    return read_record(file, ("result", "code", "value"))


def _file(run: Run, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Path:
    name = f"{function.__module__}.{function.__qualname__}"
    digest = hashlib.sha256(json.dumps([name, as_json(arguments)]).encode()).hexdigest()[:12]
    return run.path / EVALUATIONS / f"{prefix(function)}-{digest}.json"
