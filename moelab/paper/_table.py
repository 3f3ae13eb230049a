"""Reading the CSV files of this package into frozen dataclasses: no third-party imports.

The header of a file is the field list of its dataclass, in the same order. An empty cell is `None` (or an empty tuple
or string), numbers are plain, lists are separated by spaces. Every row ends with where it comes from: see
`Provenance`.
"""

from __future__ import annotations

import csv
import difflib
import functools
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from importlib import resources
from typing import TYPE_CHECKING, Any, Generic, TypeVar, Union, get_args, get_origin, get_type_hints

from moelab.lazy import pd

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Row = TypeVar("Row", bound="DataclassInstance")


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a row comes from.

    source: the document with its section, table, figure or file. how: the way the value got here, starting with one
    of `HOW`. conflict: empty, or "id: reading" for each contradiction that touches the row, joined by " | "; the ids
    are those of `conflicts()`. note: anything else worth knowing.
    """

    source: str
    how: str
    conflict: str
    note: str


HOW = (
    "table cell",
    "quoted text",
    "script",
    "printed label",
    "read off plot",
    "read off vector chart",
    "derived",
    "assumed",
)
"""The words `Provenance.how` starts with; several may be joined by "; "."""


class Table(tuple[Row, ...], Generic[Row]):
    """Rows of one CSV file, in file order. A tuple with `frame()`."""

    __slots__ = ()

    def frame(self) -> pd.DataFrame:
        """Return the rows as a pandas data frame, one column per field (pandas is imported here, not before)."""
        return pd.DataFrame(list(self))

    def where(self, **wanted: Any) -> Table[Row]:
        """Return the rows whose fields equal `wanted`; a wanted value of `None` does not filter.

        Raises:
            ValueError: one line: no row has one of the values; it names those that are spelt alike.
        """
        conditions = {name: value for name, value in wanted.items() if value is not None}
        for name, value in conditions.items():
            if value not in (known := [getattr(row, name) for row in self]):
                raise unknown(type(self[0]).__name__.lower() if name == "id" else name, value, map(str, known))
        return Table(row for row in self if all(getattr(row, name) == value for name, value in conditions.items()))


def _parser(hint: Any) -> Callable[[str], Any]:
    """Return the function that turns a cell into a value of type `hint`."""
    if get_origin(hint) in (Union, types.UnionType):
        (inner,) = (argument for argument in get_args(hint) if argument is not type(None))
        parse = _parser(inner)
        return lambda cell: parse(cell) if cell else None
    if get_origin(hint) is tuple:
        parse = _parser(get_args(hint)[0])
        return lambda cell: tuple(parse(part) for part in cell.split())
    if hint is bool:
        return {"yes": True, "no": False}.__getitem__
    return hint


@functools.cache
def load(file_name: str, row_type: type[Row]) -> Table[Row]:
    """Read `file_name` of this package into `row_type` rows; a bad cell is a ValueError that names file and line."""
    hints = get_type_hints(row_type)
    names = [field.name for field in fields(row_type)]
    parsers = {name: _parser(hints[name]) for name in names}
    text = resources.files(__package__).joinpath(file_name).read_text(encoding="utf-8")
    reader = csv.DictReader(text.splitlines(), strict=True)
    if set(reader.fieldnames or ()) != set(names):
        raise ValueError(f"{file_name}: columns {sorted(set(reader.fieldnames or ()) ^ set(names))} do not match")
    rows = []
    for cells in reader:
        if None in cells or None in cells.values():
            raise ValueError(f"{file_name}, line {reader.line_num}: wrong number of cells")
        values = {}
        for name in names:
            try:
                values[name] = parsers[name](cells[name])
            except (KeyError, ValueError) as error:
                raise ValueError(f"{file_name}, line {reader.line_num}: {name} cannot be {cells[name]!r}") from error
        rows.append(row_type(**values))
    return Table(rows)


def unknown(what: str, name: object, allowed: Iterable[str]) -> ValueError:
    """Return a one-line ValueError that says what is allowed: the close matches, or everything if there are none."""
    options = list(dict.fromkeys(allowed))
    lower = {option.lower(): option for option in options}
    close = [lower[match] for match in difflib.get_close_matches(str(name).lower(), lower, n=4, cutoff=0.55)]
    if close:
        return ValueError(f"unknown {what} {name!r}; did you mean {', '.join(close)}?")
    return ValueError(f"unknown {what} {name!r}; known: {', '.join(options)}")
