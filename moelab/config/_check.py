"""Check the values of configurations; each check is one line."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints


def check(condition: bool, message: str) -> None:
    """Raise a one-line ValueError unless `condition` holds."""
    if not condition:
        raise ValueError(message)


def unknown(
    complaint: str, name: object, allowed: Iterable[str], *, listing: str = "", close: Sequence[str] = ()
) -> str:
    """Return one line about a name that is none of those allowed: what may have been meant, then what is allowed.

    Args:
        complaint: such as "no experiment 'x'".
        listing: what is allowed, in other words than the names.
        close: names that may have been meant; by default the one that is spelt most alike.
    """
    options = list(allowed)
    close = close or difflib.get_close_matches(str(name), options, n=1)
    meant = f"did you mean {close[0]}? " if close else ""
    return f"{complaint}; {meant}allowed: {listing or ', '.join(options)}"


def check_choices(config: Any, where: str) -> None:
    """Check each field of a dataclass that is declared as a `Literal` against the values that the declaration allows.

    Args:
        config: a dataclass instance.
        where: the beginning of the message, such as "train".

    Raises:
        ValueError: one line naming the field, the allowed values and the value given.
    """
    kind: Any = type(config)
    for name, allowed in _choices(kind).items():
        value = getattr(config, name)
        if value not in allowed:
            names = ", ".join(map(repr, allowed))
            raise ValueError(f"{where}: {name} must be one of {names}, got {value!r}")


@functools.cache
def _choices(kind: Any) -> dict[str, tuple[Any, ...]]:
    """Return field -> allowed values, for the fields of a dataclass that are declared as a `Literal`."""
    hints = get_type_hints(kind)
    return {f.name: get_args(hints[f.name]) for f in fields(kind) if get_origin(hints[f.name]) is Literal}
