"""Executing an experiment's notebook through papermill: parameters checked first, results published whole or not at all."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from traitlets import Unicode

from moelab.workbench import paths
from moelab.workbench.experiments import Experiment
from moelab.workbench.results import SUMMARY
from moelab.workbench.site import convert


class NotebookFailed(RuntimeError):
    """A notebook stopped at an error; the message names the cell, the error and the executed copy."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a notebook's `parameters` cell, as papermill reads it."""

    name: str
    type: str
    default: Any
    help: str


def parameters(experiment: Experiment) -> dict[str, Parameter]:
    """What the notebook takes: name -> type, default, comment."""
    from papermill import inspect_notebook

    found = inspect_notebook(str(paths.notebooks() / experiment.notebook))
    return {
        name: Parameter(name, p["inferred_type_name"], ast.literal_eval(p["default"]), p["help"])
        for name, p in found.items()
    }


def check_parameters(experiment: Experiment, given: Mapping[str, str]) -> dict[str, Any]:
    """Parameter texts from the command line as values of the notebook's declared types.

    Raises:
        ValueError: one line with the parameters and types that are allowed.
    """
    allowed = parameters(experiment)
    listing = "; allowed: " + ", ".join(f"{p.name}: {p.type} = {p.default!r}" for p in allowed.values())
    values = {}
    for name, text in given.items():
        if name not in allowed:
            raise ValueError(f"{experiment.name}: no parameter {name!r}{listing}")
        try:
            values[name] = _value(allowed[name].type, text)
        except ValueError:
            raise ValueError(
                f"{experiment.name}: parameter {name} must be {allowed[name].type}, got {text!r}{listing}"
            ) from None
    return values


def _value(kind: str, text: str) -> Any:
    if kind == "str":
        return text
    if kind == "bool":
        if text.lower() in ("true", "yes", "1"):
            return True
        if text.lower() in ("false", "no", "0"):
            return False
        raise ValueError(text)
    if kind in ("int", "float"):
        return {"int": int, "float": float}[kind](text.replace("_", ""))
    if kind.startswith("list"):
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = [part.strip() for part in text.split(",") if part.strip()]
        if not isinstance(value, list):
            raise ValueError(text)
        if kind == "list[str]" and not all(isinstance(v, str) for v in value):
            raise ValueError(text)
        return value
    raise ValueError(text)


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for the length of a block; the kernel that papermill starts inherits them."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def execute(experiment: Experiment, values: Mapping[str, Any], plan: Path) -> Path:
    """Execute the notebook with these parameter values; returns the folder of the published result.

    Everything is made in `.moelab/publishing/` and moved into the results in one step, so a failed or killed notebook publishes nothing.

    Args:
        values: from `check_parameters`.
        plan: file in which the notebook lists the runs it waits for, for whoever shows progress.

    Raises:
        NotebookFailed: a cell raised; the executed copy, with the error on top, stays in `.moelab/publishing/`.
    """
    import papermill

    scale = values.get("scale", parameters(experiment)["scale"].default)
    experiment.scale(scale)
    name = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    staging = paths.home() / "publishing" / f"{experiment.name}-{scale}-{name}-{os.getpid()}"
    staging.mkdir(parents=True)
    copy = staging / "notebook.ipynb"
    with environment({"MOELAB_PUBLICATION": str(staging), "MOELAB_PLAN": str(plan), "JUPYTER_PREFER_ENV_PATH": "1"}):
        try:
            papermill.execute_notebook(
                str(paths.notebooks() / experiment.notebook),
                str(copy),
                parameters=dict(values),
                kernel_name="python3",
                kernel_manager_class=_kernel_manager(),
                progress_bar=False,
                cwd=str(staging),
            )
        except papermill.PapermillExecutionError as error:
            why = (str(error.evalue).splitlines() or [""])[0]
            raise NotebookFailed(
                f"{experiment.notebook}, cell {error.exec_count}: {error.ename}: {why} (executed copy: {copy})"
            ) from None
    if not (staging / SUMMARY).exists():
        raise NotebookFailed(f"{experiment.notebook} ended without publishing a result (executed copy: {copy})")
    _forget_places(copy)
    convert(copy)
    target = paths.results() / experiment.name / scale / name
    while target.exists():  # nothing is overwritten
        target = target.with_name(target.name + "x")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Moved beside its place first: results may be on another disk than the workshop, and only a rename is one step.
    beside = target.with_name(f".{target.name}")
    shutil.move(staging, beside)
    os.replace(beside, target)
    return target


def _forget_places(notebook: Path) -> None:
    """Papermill notes where it read and wrote on this machine; a published copy lies elsewhere."""
    import nbformat

    content = nbformat.read(notebook, as_version=4)
    for key in ("input_path", "output_path"):
        content.metadata["papermill"][key] = Path(content.metadata["papermill"][key]).name
    nbformat.write(content, notebook)


def _kernel_manager() -> type:
    """A kernel manager on Unix sockets where there are any: no port race between notebooks run in parallel, nothing on the network."""
    from jupyter_client.manager import AsyncKernelManager

    if os.name != "posix":
        return AsyncKernelManager
    return type("SocketKernelManager", (AsyncKernelManager,), {"transport": Unicode("ipc")})
