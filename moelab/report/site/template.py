"""Render the page templates; the page of a notebook carries a digest of what it was made from."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moelab.design.verdicts import STYLES
from moelab.plotting.typography import typeset
from moelab.report.site.glossary import explain
from moelab.report.site.sanitize import POLICY

if TYPE_CHECKING:
    from jinja2 import Environment

    from moelab.paper import Claim

_PREFIX = "<!-- made from "


def render(name: str, /, **values: Any) -> str:
    """Return the text of a page."""
    return _environment().get_template(name).render(**values)


def mark(*parts: str | bytes, names: Sequence[str]) -> str:
    """Return a digest of what a page is made from: `parts` and the templates of these names."""
    digest = hashlib.sha256()
    for part in (*parts, *(asset(name) for name in names)):
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()[:32]


def is_current(page: Path, mark: str) -> bool:
    """Return whether the page at this path carries this mark; a missing page does not."""
    try:
        with open(page, encoding="utf-8", errors="replace") as f:
            return f"{_PREFIX}{mark} " in f.read(200)
    except FileNotFoundError:
        return False


@functools.cache
def asset(name: str) -> str:
    """Return the text of a file in `templates/`; the style sheet gets the colours of verdicts."""
    text = (files("moelab.report") / "templates" / name).read_text(encoding="utf-8")
    colours = (f"--{name}: light-dark({s.light}, {s.dark});" for name, s in STYLES.items() if s.light)
    return text.replace("/* the colours of verdicts */", "\n  ".join(colours))


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("moelab.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["policy"] = POLICY
    environment.filters |= {
        "quantity": quantity,
        "cell": cell,
        "typeset": typeset,
        "parted": parted,
        "explain": explain,
        "json": lambda value: json.dumps(value, ensure_ascii=False),
    }
    return environment


WORDS = 12
"""A heading has at most so many words where its text can be parted."""


def parted(title: str) -> tuple[str, str]:
    """Return a finding as a heading and what stands below it: its interval, other findings, or its list of values.

    A text that cannot be parted is the heading as a whole.
    """
    if len(title.split()) <= WORDS:
        return title, ""
    head = re.split(r" \(95.% interval|; (?![^()]*\))", title, maxsplit=1)[0]
    if len(head.split()) > WORDS and (listed := re.match(r"([^(]*)(?<! base): [^:,]+,[^:,]+,", head)):
        head = listed[1]
    return head, re.sub(r"^\((.*?)\)", r"\1", title[len(head) :].lstrip(";: "))


def number(value: float | None, claim: Claim) -> str:
    """Return a claim's value as text: differences with their sign, ratios and limits without; a dash for None."""
    if value is None:
        return "–"
    if abs(value) >= 1000:
        return typeset(f"{value:,.0f}")
    if claim.kind == "ratio":
        return f"{value:.3g}"
    if claim.kind == "bound":
        return f"{value:.4g}" if abs(value) >= 100 else f"{value:.3g}"
    return typeset(f"{value:+.3f}" if abs(value) < 10 else f"{value:+.1f}")


def quantity(value: float | None, claim: Claim) -> str:
    """Return `number` with its unit: the claim's, or that of the quantity that it orders."""
    if value is None:
        return "–"
    unit = claim.unit or next((unit for word, unit in ORDERED.items() if word in claim.quantity), "")
    return number(value, claim) + _SHORT.get(unit, f" {unit}" if unit else "")


ORDERED = {"loss": "nats/token", "latency": "ms"}
"""Word in the quantity of a claim that has no unit -> unit of our values."""
_SHORT = {"x": "×", "percentage points": " points"}


def cell(value: Any) -> str:
    """Return a value of a data table as text."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return str(value)
    if value == int(value):
        return f"{int(value):,}"
    return typeset(f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}")
