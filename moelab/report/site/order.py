"""Order references such as "Fig 4" as the paper does."""

from __future__ import annotations

import re

_ORDER = (
    *("Fig 1", "Table 2", "Table 3", "Fig 2", "Fig 3", "Fig 4", "Table 4", "Fig 5", "Table 5", "Fig 6", "Fig 7"),
    *("Fig 8", "sec 5.3", "Fig 9", "sec 5.4", "Table 6", "Fig 10", "Fig 11", "sec 5.5", "Fig 12", "Fig 13", "Fig 14"),
    "Fig 15",
)  # fmt: skip
BEYOND = len(_ORDER)
"""The position of a reference that is not in the paper."""


def position(reference: str) -> int:
    """Return the place in the paper of a reference such as ``section 4.1.4, Fig 4``.

    Its first figure or table decides, else its section.
    """
    found = re.search(r"\b(Fig|Table)(?:ure)?s?\.?\s*(\d+)", reference)
    if found and (name := f"{found[1]} {found[2]}") in _ORDER:
        return _ORDER.index(name)
    if section := re.search(r"\bsec(?:tion)?\.?\s*(\d+\.\d+)", reference):
        name = f"sec {section[1]}"
        return _ORDER.index(name) if name in _ORDER else BEYOND
    return BEYOND
