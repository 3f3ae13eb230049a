"""Read the parameters of an experiment's notebook, and resolve what a user gives for them into values and runs."""

from __future__ import annotations

import ast
import io
import json
import tokenize
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import GenericAlias
from typing import Any

from moelab import paths
from moelab.config import from_text, unknown
from moelab.config.overrides import SECTIONS, check_overrides
from moelab.design.experiment import Experiment
from moelab.files import read_json
from moelab.runs.spec import RunSpec

_SCALARS = (int, float, bool, str)
_TYPES: dict[str, Any] = {
    **{kind.__name__: kind for kind in _SCALARS},
    **{
        str(kind): kind
        for scalar in _SCALARS
        for kind in (GenericAlias(list, (scalar,)), GenericAlias(dict, (str, scalar)))
    },
    "dict": dict[str, Any],
}
"""Annotation of a parameter -> its type; with another one, a value is what its text is in JSON."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a notebook's `parameters` cell, as papermill reads it."""

    name: str
    type: str
    default: Any
    help: str


@dataclass(frozen=True)
class Request:
    """An experiment with checked parameters, and the runs that follow from them.

    Attributes:
        experiment: the experiment.
        given: the parameters that were given, as values of their types.
        values: all parameters of the notebook: those given, and the defaults of the others.
        specs: the runs that the notebook asks for.
    """

    experiment: Experiment
    given: dict[str, Any]
    values: dict[str, Any]
    specs: list[RunSpec]

    @property
    def scale(self) -> str:
        """The size at which it runs."""
        return self.values["scale"]

    @property
    def trained(self) -> list[RunSpec]:
        """The runs that are to be trained; none where the notebook only measures their steps."""
        return self.specs if self.experiment.trains else []


def parameters(experiment: Experiment) -> dict[str, Parameter]:
    """Return the notebook's parameters: name -> type, default, comment.

    They are the annotated assignments of the cell with the tag `parameters`, as for papermill, whose import takes two
    seconds: a command that is given a wrong one answers sooner.

    Raises:
        ValueError: one line: there is no notebook, or not one cell with the tag.
    """
    where = f"{experiment.name}: notebooks/{experiment.notebook}"
    notebook = read_json(paths.notebooks() / experiment.notebook)
    if notebook is None:
        raise ValueError(f"{where} does not exist; docs/extend.md, step 2")
    tagged = [cell for cell in notebook["cells"] if "parameters" in cell["metadata"].get("tags", ())]
    if len(tagged) != 1:
        raise ValueError(f"{where}: {len(tagged)} cells have the tag parameters, expected one; docs/extend.md, step 2")
    source = "".join(tagged[0]["source"])
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.end[0]: t.string.removeprefix("#").strip() for t in tokens if t.type == tokenize.COMMENT}
    return {
        node.target.id: Parameter(
            node.target.id,
            ast.unparse(node.annotation),
            ast.literal_eval(node.value),
            comments.get(node.end_lineno or 0, ""),
        )
        for node in ast.parse(source).body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value
    }


def resolve(experiment: Experiment, given: Mapping[str, str]) -> Request:
    """Return an experiment with parameters from the command line, checked down to the runs that they lead to.

    Dotted names such as ``train.tokens`` are settings of the runs (`moelab.config.overrides`); they become the
    parameter `overrides`.

    Args:
        given: name -> text.

    Raises:
        ValueError: one line with the parameters and types, or the settings, that are allowed.
    """
    known = parameters(experiment)
    listing = ", ".join(f"{p.name}: {p.type} = {p.default!r}" for p in known.values())
    if "overrides" in known:
        listing += f"; settings of the runs: {', '.join(f'{section}.…' for section in SECTIONS)}"
    values: dict[str, Any] = {}
    dotted = {name: text for name, text in given.items() if "." in name and "overrides" in known}
    for name, text in given.items():
        if name in dotted:
            continue
        if name not in known:
            raise ValueError(unknown(f"{experiment.name}: no parameter {name!r}", name, known, listing=listing))
        try:
            values[name] = from_text(_TYPES.get(known[name].type, Any), text, f"parameter {name}")
        except ValueError as error:
            raise ValueError(f"{experiment.name}: {error}; allowed: {listing}") from None
        if isinstance(values[name], str):
            values[name] = _absolute(values[name])
    if dotted:
        try:
            # As a notebook and a submission's record can hold them.
            typed = json.loads(json.dumps(check_overrides(dotted)))
        except ValueError as error:
            raise ValueError(f"{experiment.name}: {error}") from None
        values["overrides"] = values.get("overrides", {}) | typed
    corpus = values.get("overrides", {}).get("data.corpus")
    if isinstance(corpus, str):
        values["overrides"] = values["overrides"] | {"data.corpus": _absolute(corpus)}
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half of a surrogate pair, or bytes that are no UTF-8: no notebook can hold it
        raise ValueError(f"{experiment.name}: a parameter is not valid Unicode text: {values!a}") from None
    whole = {name: values.get(name, p.default) for name, p in known.items()}
    experiment.scale(whole["scale"])
    if experiment.check is not None:
        experiment.check(values)
    return Request(experiment, values, whole, experiment.specs_of(whole))


def _absolute(text: str) -> str:
    """Return a path, or a corpus that is a folder, from the root: a notebook's kernel works in another folder."""
    kind, _, where = text.partition(":")
    if kind == "folder" and where and where[0] not in "/~":
        return f"folder:{Path(where).resolve()}"
    name, _, subset = where.partition(":")
    if kind == "hf" and name and Path(name).is_dir():  # else it is a published name, or ~ stands for the home
        return f"hf:{Path(name).resolve()}" + f":{subset}" * bool(subset)
    is_path = "/" in text or Path(text).suffix in (".jsonl", ".yaml", ".yml")
    return str(Path(text).resolve()) if is_path and Path(text).exists() else text
