"""Replace settings of a run by dotted names, such as ``train.tokens`` or ``model.routing.drop_tokens``.

The allowed names and the types of their values come from the fields of the configuration classes, so that a new field
can be set without a change here.
"""

from __future__ import annotations

import difflib
import functools
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from moelab.config._check import unknown
from moelab.config.boundary import from_text
from moelab.config.data import DataConfig
from moelab.config.distill import DistillConfig
from moelab.config.model import ModelConfig
from moelab.config.parallel import ParallelConfig
from moelab.config.train import TrainConfig

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")

SECTIONS = {
    "model": ModelConfig,
    "train": TrainConfig,
    "data": DataConfig,
    "parallel": ParallelConfig,
    "distill": DistillConfig,
}
"""First part of a dotted name -> the configuration class whose field it names."""

_FIXED = ("model.name", "train.seed", "model.dispatch", "train.compile", "distill.top_k", "distill.cache_bytes")
"""A name has no effect, an experiment's `seeds` sets the seeds, and the others are settings of earlier versions."""


@functools.cache
def settable() -> dict[str, Any]:
    """Return every dotted name that can be overridden, with the declared type of its value."""
    settings: dict[str, Any] = {}

    def collect(cls: Any, prefix: str) -> None:
        hints = get_type_hints(cls)
        for field in fields(cls):
            name, hint = f"{prefix}.{field.name}", hints[field.name]
            if is_dataclass(hint):
                collect(hint, name)
            elif name not in _FIXED:
                settings[name] = hint

    for section, cls in SECTIONS.items():
        collect(cls, section)
    return settings


def check_overrides(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return overrides with each value converted to the type of its setting.

    Args:
        given: dotted name -> value, or its text as on a command line (``4e6``, ``true``, ``[0, 4]``).

    Raises:
        ValueError: one line: an unknown name (with those that are allowed), or a value of another type.
    """
    return {name: _value(name, value) for name, value in given.items()}


def override(section: str, config: T, given: Mapping[str, Any]) -> T:
    """Return a copy of a configuration with the settings of its section replaced.

    Args:
        section: key of `SECTIONS`.
        given: from `check_overrides`; names of other sections are ignored.
    """
    changes: dict[str, Any] = {}
    for name, value in given.items():
        first, *inner, last = name.split(".")
        if first == section:
            level = changes
            for part in inner:
                level = level.setdefault(part, {})
            level[last] = value
    return _replace(config, changes)


def _replace(config: T, changes: Mapping[str, Any]) -> T:
    new = {k: _replace(getattr(config, k), v) if isinstance(v, dict) else v for k, v in changes.items()}
    return replace(config, **new) if new else config


def _value(name: str, value: Any) -> Any:
    allowed = settable()
    if name not in allowed:
        section = name.partition(".")[0]
        of_section = [other for other in allowed if other.startswith(f"{section}.")]
        # The same field elsewhere (model.routing.top_k, model.top_k) before a name that is spelt alike.
        same = [other for other in allowed if other.rpartition(".")[2] == name.rpartition(".")[2]]
        initials = "".join(word[:1] for word in name.rpartition(".")[2].split("_"))  # lr of learning_rate
        short = [other for other in of_section if other.rpartition(".")[2] == initials]
        close = difflib.get_close_matches(name, same, n=1, cutoff=0) or short
        listing = ", ".join(of_section or (f"{section}.…" for section in SECTIONS))
        raise ValueError(unknown(f"no setting {name!r}", name, allowed, listing=listing, close=close))
    return from_text(allowed[name], value if isinstance(value, str) else json.dumps(value, default=str), name)
