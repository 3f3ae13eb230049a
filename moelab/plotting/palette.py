"""Choose colours: safe for colour blindness, and the same for an arm in every figure and on every page.

Arms of one family share a colour: a model on bases of several sizes, and the variants of an arm ("Shared, fine" has the
colour of "Shared"). Markers and dashes distinguish them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

# Okabe and Ito's colours, with grey (for the dense base, the first arm) instead of the yellow, which is too light on
# white, and the wine red of Tol's muted ones as a ninth. Dash patterns carry the same distinction in print.
COLORS = ("#6E6E6E", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#0072B2", "#CC79A7", "#000000", "#882255")
_OF_ARM = {
    name: color
    for color, names in zip(
        COLORS,
        (
            ("Dense", "350M", "1.3B", "6.7B", "1 (dense)", "flat", "two bare all-to-alls"),
            ("MoE-32", "350M+MoE-32", "32"),
            ("Pyramid-MoE-32/64", "Upcycled, top-1, scaled", "coordinated + hierarchical"),
            ("Residual-MoE-32", "Residual", "Grown"),
            ("PR-MoE-32/64", "PR-MoE", "1.3B+PR-MoE-64/128", "Teacher", "Upcycled", "coordinated"),
            ("MoE-128", "350M+MoE-128", "1.3B+MoE-128", "128", "Shared", "hierarchical"),
            ("Top2-MoE-32", "Top-2"),
        ),
        strict=False,
    )
    for name in names
}
OURS = COLORS[5]
"""Colour of our values where a figure has no arms, or names them beside their rows."""
DASHES: tuple[tuple[float, ...], ...] = (
    (),
    (4, 1.5),
    (1, 1),
    (6, 1.5, 1, 1.5),
    (7, 2),
    (5, 1, 1, 1, 1, 1),
    (2, 2),
    (8, 2),
    (1, 3),
)


def colors(arms: Sequence[str]) -> dict[str, str]:
    """Return arm -> colour: named arms and ways of exchange have a fixed one, the others get the rest by position."""
    families = {arm: next((name for name in (arm, arm.partition(", ")[0]) if name in _OF_ARM), "") for arm in arms}
    fixed = {arm: _OF_ARM[family] for arm, family in families.items() if family}
    free = [color for color in COLORS if color not in fixed.values()] or list(COLORS)
    others = [arm for arm in arms if arm not in fixed]
    fixed |= {arm: free[i % len(free)] for i, arm in enumerate(others)}
    return {arm: fixed[arm] for arm in arms}


def ranks(palette: Mapping[str, str]) -> dict[str, int]:
    """Return arm -> how many arms before it have its colour, by which those of one colour get different marks."""
    before = list(palette.values())
    return {arm: before[:i].count(color) for i, (arm, color) in enumerate(palette.items())}
