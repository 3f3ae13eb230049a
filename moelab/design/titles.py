"""Shorten findings to titles of figures: one line, without what the figure itself shows."""

from __future__ import annotations

import re
from collections.abc import Mapping

WORDS = 12
"""Most words of a figure's title. The headline of a page may be longer."""


def short(headline: str) -> str:
    """Return a headline without its interval and number of seeds, and without what follows them."""
    return re.split(r" \([^()]*\bseeds?\b|;", headline)[0]


def listed(begins: str, values: Mapping[str, float], form: str, unit: str, most: int = WORDS) -> str:
    """Return "BEGINS ARM 1, ARM 2 UNIT", or only the highest and lowest value where that is too long.

    Args:
        values: arm -> value.
        form: how to write a value, as `format` takes it.
        most: words.
    """
    full = f"{begins} {', '.join(f'{arm} {value:{form}}' for arm, value in values.items())} {unit}"
    if len(full.split()) <= most:
        return full
    ends = [key(values, key=values.__getitem__) for key in (max, min)]
    high, low = (f"{values[arm]:{form}} ({arm})" for arm in ends)
    return f"{begins} {high} to {low} {unit}"
