"""Public measurements of MoE systems on A100, H100, H800 and H200: `public.csv`, and its open and sealed halves.

A row is one published number; its source was read when it was entered. Of several forms of one operation on a page,
the fastest is taken (and NCCL's own all-to-all). `settings` says what must be known to simulate it, as words
`name=value`; `assumed`, what the source leaves open. Rows of one `series` share source, hardware and layout.

The halves were fixed before the simulator was run on any row, and whole series stand on one side, so that the sealed
half is made of systems that no constant has seen (`halves`). `public.json` holds the SHA-256 of the sealed rows;
`public_opened.json`, what they showed when they were opened, once.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

GROUPS = {
    "exchange": "all-to-all of expert parallelism",
    "layer": "products and experts of one GPU",
    "decode": "decoding steps and short requests",
    "prefill": "prefill",
    "serving": "prefill beside decode at full load",
    "training": "training steps",
}
"""The groups, in the order of pages."""

Half = Literal["open", "sealed"]


@dataclass(frozen=True)
class Measurement:
    """One published number.

    Attributes:
        id, series, group: its name, the rows that it belongs with, a key of `GROUPS`.
        system: the program that was measured. cluster: a name of `moelab.simulate.clusters`.
        settings: what must be known to simulate it.
        metric, value, unit: what was measured, such as time, tokens or step.
        source, place, date: address; where on the page, with the version read; when it was published.
        assumed: what the source leaves open.
    """

    id: str
    series: str
    group: str
    system: str
    cluster: str
    settings: str
    metric: str
    value: float
    unit: str
    source: str
    place: str
    date: str
    assumed: str

    @property
    def known(self) -> dict[str, str | int]:
        """The settings by name, numbers as numbers."""
        words = (word.split("=") for word in self.settings.split())
        return {name: int(value) if value.isdigit() else value for name, value in words}

    @property
    def in_words(self) -> str:
        """What was measured of a decoding row, in a reader's words."""
        known = self.known
        words = {
            "step": f"{self.value:g} ms a token",
            "request": f"{self.value:.3g} s for {known.get('prompt')} + {known.get('output')} tokens",
            "tokens": f"{self.value:g} tokens/s",
            "node": f"{self.value:,.0f} tokens/s a node",
        }
        return f"{words[self.metric]}, batch {known['batch']}, {self.system} on {self.cluster}"

    @property
    def more_is_better(self) -> bool:
        """Whether the number is a rate, not a time."""
        return self.metric not in ("time", "step", "request")


def _text(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


@cache
def measurements() -> tuple[Measurement, ...]:
    """Return all rows in the order of the file."""
    rows = csv.DictReader(_text("public.csv").splitlines(), strict=True)
    return tuple(Measurement(value=float(row.pop("value")), **row) for row in rows)


def digest(text: str) -> str:
    """Return the SHA-256 of a text, as hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


@cache
def halves() -> dict[str, Half]:
    """Return the half of each series.

    In each group the series come in the order of the SHA-256 of their names, and each goes to the half that has fewer
    rows of the group so far, to the open one first.
    """
    found: dict[str, Half] = {}
    for group in GROUPS:
        rows = [m.series for m in measurements() if m.group == group]
        counts: dict[Half, int] = {"open": 0, "sealed": 0}
        for series in sorted(set(rows), key=digest):
            half: Half = "sealed" if counts["sealed"] < counts["open"] else "open"
            found[series] = half
            counts[half] += rows.count(series)
    return found


def half(which: Half) -> tuple[Measurement, ...]:
    """Return the rows of a half."""
    return tuple(m for m in measurements() if halves()[m.series] == which)


def fitted_on() -> tuple[Measurement, ...]:
    """Return the rows that constants may be fitted on: a third of the open ones, by the SHA-256 of their ids."""
    return tuple(m for m in half("open") if int(digest(m.id), 16) % 3 == 0)


def sealed_digest() -> str:
    """Return the SHA-256 of the sealed rows as the file has them, joined by line feeds."""
    lines = _text("public.csv").splitlines()[1:]
    return digest("\n".join(line for line, m in zip(lines, measurements(), strict=True) if m in half("sealed")))


def seal() -> dict[str, Any]:
    """Return `public.json`: the rule, the numbers of rows, and the digest of the sealed half as it was fixed."""
    return json.loads(_text("public.json"))


def experience(group: str) -> tuple[float, int, int]:
    """Return a group's range as a factor, and how many of how many sealed rows lay within it when they were opened."""
    row = next(s for s in opened()["summary"] if s["group"] == group and s["half"] == "sealed")
    return row["range_factor"], row["within"], row["rows"]


def nearest(group: str, model: str, cluster: str, **numbers: int) -> Measurement | None:
    """Return the measurement of a published model that is nearest to a question, None if the model has none.

    The same cluster comes first, then the smallest sum of |log| of the ratios of `numbers`, such as batch and tensor.
    """

    def distance(m: Measurement) -> tuple[bool, float]:
        apart = (abs(math.log(max(1, int(m.known.get(name, 1))) / max(1, n))) for name, n in numbers.items())
        return m.cluster != cluster, sum(apart)

    rows = [m for m in measurements() if m.group == group and m.known.get("model") == model]
    return min(rows, key=distance, default=None)


def opened() -> dict[str, Any]:
    """Return `public_opened.json`: all rows when the sealed half was opened, with the commit that predicted them.

    It is a record: a later simulator predicts other values, for rows that are no longer sealed.
    """
    return json.loads(_text("public_opened.json"))
