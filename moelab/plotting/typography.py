"""Typeset text: a true minus sign, and no line break between a number and its per cent sign."""

from __future__ import annotations

import re

_MINUS = re.compile(r"(?<![\w.,)\]-])-(?=\.?\d)")
_PERCENT = re.compile(r"(?<=\d) ?%")


def typeset(text: str) -> str:
    """Return `text` with "-0.05" as "−0.05" and a space that does not break in "95 %" (or "95%").

    Names such as MoE-128, ranges and dates stay as they are.
    """
    return _PERCENT.sub("\u00a0%", _MINUS.sub("−", text))
