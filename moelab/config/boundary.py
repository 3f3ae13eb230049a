"""Read what comes from outside, JSON, YAML and texts of the command line, as values of declared types, by pydantic.

What is wrong is said in one line: where, what is allowed, and what was given. pydantic is imported when something is
read.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
import types
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from moelab.config._check import unknown

if TYPE_CHECKING:
    from pydantic import TypeAdapter

T = TypeVar("T")


def from_json(kind: type[T], value: Any, where: str = "", *, known: bool = False, texts: bool = False) -> T:
    """Return JSON values as a declared type, such as a dataclass from `to_json`'s output.

    Args:
        kind: a dataclass, or another type that JSON values can have.
        where: the beginning of the message; by default the type's name.
        known: take the fields that a dataclass has and leave out others, which another version may have written.
        texts: numbers and truth values are given as texts.

    Raises:
        ValueError: one line naming an unknown or missing field, or one of another type.
    """
    if type(value) is kind and (kind in (bool, int) or (kind is float and math.isfinite(cast(Any, value)))):
        return value  # most fields of most configurations, without pydantic
    from pydantic import ValidationError

    reader: TypeAdapter[T] = _reader(cast(Any, kind))
    extra: Literal["ignore", "forbid"] = "ignore" if known else "forbid"
    try:
        if texts:
            return reader.validate_python(value, extra=extra)
        text = json.dumps(value, default=str, ensure_ascii=False).encode()
        return reader.validate_json(text, strict=True, extra=extra)
    except UnicodeEncodeError:
        raise ValueError(f"{where}: not valid Unicode text: {value!a}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    raise ValueError(_line(kind, where or kind.__name__, first))


def from_text(kind: type[T], text: str, where: str) -> T:
    """Return a text of the command line as a declared type; ValueError as for `from_json`.

    Numbers may be written as ``4e6`` and ``1_000``, truth values as ``yes``, nothing as ``none``; lists and objects are
    JSON, lists also elements between commas.
    """
    optional = get_origin(kind) in (Union, types.UnionType)
    if str in (get_args(kind) if optional else (kind,)) or get_origin(kind) is Literal:
        return from_json(kind, text, where, texts=True)
    value: Any = text
    for reading in (text.replace("_", "").lower().replace("none", "null"), text):
        with contextlib.suppress(json.JSONDecodeError):
            value = json.loads(reading, parse_float=_number)
    if get_origin(kind) in (list, tuple) and not isinstance(value, list):
        value = [from_text(get_args(kind)[0], part.strip(), where) for part in text.split(",") if part.strip()]
    if not isinstance(value, list | dict):
        with contextlib.suppress(ValueError):
            return from_json(kind, value, where)
        return from_json(kind, text, where, texts=True)
    return from_json(kind, value, where)


def _number(digits: str) -> int | float:
    number = float(digits)
    return int(number) if number.is_integer() else number


@functools.cache
def _reader(kind: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind, config=None if is_dataclass(kind) else {"allow_inf_nan": False})


def _line(kind: Any, where: str, error: Any) -> str:
    """Return one of pydantic's errors as a line."""
    if error["type"] == "value_error":  # of a dataclass's own check
        return str(error["ctx"]["error"])
    *parents, name = map(str, error["loc"] or [""])
    if error["type"] == "missing":
        return f"{where}: {'.'.join([*parents, name])} is missing"
    if error["type"] == "unexpected_keyword_argument":
        allowed = _fields(kind, error["loc"][:-1])
        return unknown(f"{'.'.join([where, *parents])}: unknown field {name}", name, allowed)
    must = re.sub("^(Input|Tuple|List) should", "must", error["msg"]).partition(", unable ")[0]
    for theirs, plain in _WORDS.items():
        must = must.replace(theirs, plain)
    return f"{'.'.join([where, *parents, name]).rstrip('.')} {must}, got {error['input']!r}"


_WORDS = {
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid boolean": "true or false",
    "a valid string": "a text",
    "a valid tuple": "a list",
    "a valid list": "a list",
    "a valid dictionary": "an object",
    " after validation": "",
}
"""pydantic's words and the plain ones."""


def _fields(kind: Any, path: tuple[Any, ...]) -> list[str]:
    """Return the names of the fields of the dataclass that lies at a path inside a type."""
    if is_dataclass(kind):
        return _fields(get_type_hints(kind)[path[0]], path[1:]) if path else [f.name for f in fields(kind)]
    inside = next(part for part in get_args(kind)[::-1] if part not in (type(None), Ellipsis))
    return _fields(inside, path if get_origin(kind) in (Union, types.UnionType) else path[1:])
