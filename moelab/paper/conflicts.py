"""Where the paper contradicts itself, its scripts, or arithmetic; and which reading the other tables use."""

from __future__ import annotations

from dataclasses import dataclass

from moelab.paper._table import Provenance, Table, load


@dataclass(frozen=True, kw_only=True)
class Conflict(Provenance):
    """One contradiction.

    `used` is the reading that the tables carry, with the reason; `check` is the arithmetic that decides.

    `conflict` of the base class stays empty here.
    """

    id: str
    subject: str
    readings: str
    check: str
    used: str

    @property
    def cell(self) -> str:
        """The text that rows touched by this contradiction carry in their `conflict` column."""
        return f"{self.id}: {self.used}"


def conflicts() -> Table[Conflict]:
    """Every known contradiction."""
    return load("conflicts.csv", Conflict)


def conflict(id: str) -> Conflict:
    """One contradiction by its kebab-case id; ValueError names close matches."""
    return conflicts().where(id=id)[0]
