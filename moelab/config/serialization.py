"""Turn configurations into JSON and back, and compute the digest that names a run."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import types
import typing
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar

from moelab.config._check import check as _check

T = TypeVar("T")


def identity(config: Any) -> Any:
    """Return the JSON values that identify a configuration.

    Fields at their default and fields with the metadata ``identity=False`` are left out. So a field that is added later
    does not change the identity of existing configurations; in turn, a released default must never change. A value
    counts as its field's type (0 as 0.0), so that equal configurations and those read back from JSON have one identity.

    Raises:
        ValueError: one line, for a value of another type than its field's.
    """
    if is_dataclass(config):
        kept, hints = {}, _hints(type(config))
        for f in fields(config):
            value = getattr(config, f.name)
            default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            if f.metadata.get("identity", True) and value != default:
                kept[f.name] = identity(coerce(hints[f.name], value, f"{type(config).__name__}.{f.name}"))
        return kept
    if isinstance(config, tuple | list):
        return [identity(v) for v in config]
    return config


def digest(config: Any, length: int = 10) -> str:
    """Return the hexadecimal SHA-256 of a config's `identity`, shortened."""
    text = json.dumps(identity(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def to_json(config: Any) -> dict[str, Any]:
    """Return all fields of a config as JSON values; `from_json` reads them back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


_hints = functools.cache(typing.get_type_hints)
_NAMES = {list: "a list", dict: "an object"}


def from_json(cls: type[T], data: Any, where: str = "", *, known: bool = False) -> T:
    """Return a dataclass of type `cls` from `to_json`'s output.

    Args:
        known: take the fields that the class knows and leave out others, which another version may have written.

    Raises:
        ValueError: one line naming an unknown or missing field, or one of another type.
    """
    where = where or cls.__name__
    _check(isinstance(data, dict), f"{where}: expected an object, got {data!r}")
    hints = _hints(cls)
    data = {key: value for key, value in data.items() if key in hints} if known else data
    unknown = set(data) - set(hints)
    _check(not unknown, f"{where}: unknown field {', '.join(sorted(unknown))}; allowed: {', '.join(hints)}")
    needed = {f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING}
    _check(needed <= set(data), f"{where}: {', '.join(sorted(needed - set(data)))} is missing")
    return cls(**{key: coerce(hints[key], value, f"{where}.{key}", known=known) for key, value in data.items()})


def coerce(hint: Any, value: Any, where: str, *, known: bool = False) -> Any:
    """Return a JSON value, or one that has the type already, as the declared type of a field.

    Args:
        hint: the declared type.
        value: the value.
        where: the beginning of the message, such as "train.tokens".
        known: see `from_json`.

    Raises:
        ValueError: one line, for a value of another type.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if is_dataclass(hint):
        return value if isinstance(value, hint) else from_json(hint, value, where, known=known)
    if origin in (list, dict):
        _check(isinstance(value, origin), f"{where}: expected {_NAMES[origin]}, got {value!r}")
        if origin is list:
            return [coerce(args[0], v, where, known=known) for v in value]
        return {key: coerce(args[1], v, where, known=known) for key, v in value.items()}
    if origin is tuple:
        _check(isinstance(value, list | tuple), f"{where}: expected a list, got {value!r}")
        inner = [args[0]] * len(value) if args[-1] is Ellipsis else args
        _check(len(inner) == len(value), f"{where}: expected {len(inner)} values, got {value!r}")
        return tuple(coerce(h, v, where, known=known) for h, v in zip(inner, value, strict=True))
    if origin is Literal:
        _check(value in args, f"{where}: must be one of {', '.join(map(repr, args))}, got {value!r}")
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return coerce(next(a for a in args if a is not type(None)), value, where, known=known)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        _check(math.isfinite(value), f"{where}: expected a finite number, got {value!r}")
        return float(value)
    _check(
        isinstance(value, hint) and (hint is bool or not isinstance(value, bool)),
        f"{where}: expected {hint.__name__}, got {value!r}",
    )
    return value
