"""Turn configurations into JSON, and compute the digest that names a run."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import typing
from dataclasses import fields, is_dataclass
from typing import Any

from moelab.config.boundary import from_json

_hints = functools.cache(typing.get_type_hints)


def identity(config: Any) -> Any:
    """Return the JSON values that identify a configuration.

    Fields at their default and fields with the metadata ``identity=False`` are left out. So a field that is added later
    does not change the identity of existing configurations; in turn, a released default must never change. A value
    counts as its field's type (0 as 0.0), so that equal configurations and those read back from JSON have one identity.

    Raises:
        ValueError: one line, for a value of another type than its field's.
    """
    if is_dataclass(config):
        cls: Any = type(config)
        kept, hints = {}, _hints(cls)
        for f in fields(config):
            value = getattr(config, f.name)
            default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            if f.metadata.get("identity", True) and value != default:
                where = f"{cls.__name__}.{f.name}"
                kept[f.name] = identity(value if is_dataclass(value) else from_json(hints[f.name], value, where))
        return kept
    if isinstance(config, tuple | list):
        return [identity(v) for v in config]
    return config


def digest(config: Any) -> str:
    """Return the first ten hexadecimal digits of the SHA-256 of a config's `identity`."""
    text = json.dumps(identity(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def to_json(config: Any) -> dict[str, Any]:
    """Return all fields of a config as JSON values; `from_json` reads them back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
