"""Make figures for dark pages: invert the colours of an SVG."""

from __future__ import annotations

import colorsys
import re

GROUND, INK = "#14181d", "#e4e8ee"
"""Colours of the page and of the text in the dark variant."""


def dark(svg: str) -> str:
    """Return the dark variant of an SVG that matplotlib wrote.

    Greys are inverted (white becomes the dark ground, black the light ink); other colours keep their hue and are
    lightened until their contrast with the ground is 4.5 to 1 (WCAG's ratio for text). Pictures inside the SVG, such as
    a heat map's pixels, stay as they are.
    """
    text = re.sub(r"#[0-9a-fA-F]{6}\b", lambda found: dark_color(found[0]), svg)
    # What has no colour of its own is black by default.
    return re.sub(r"<svg\b", f'<svg fill="{INK}"', text, count=1)


def dark_color(color: str) -> str:
    """Return the colour of the dark variant in place of a colour such as ``#56b4e9``."""
    rgb = _rgb(color)
    hue, lightness, saturation = colorsys.rgb_to_hls(*rgb)
    if max(rgb) - min(rgb) < 0.06:
        ground, ink = _rgb(GROUND), _rgb(INK)
        return _hex(tuple(i + (g - i) * lightness for g, i in zip(ground, ink, strict=True)))
    while contrast(color, GROUND) < 4.5 and lightness < 1:
        lightness = min(1.0, lightness + 0.02)
        color = _hex(colorsys.hls_to_rgb(hue, lightness, saturation))
    return color


def contrast(one: str, other: str) -> float:
    """Return WCAG's contrast ratio of two colours, 1 to 21."""
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _luminance(color: str) -> float:
    red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in _rgb(color))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _rgb(color: str) -> tuple[float, float, float]:
    red, green, blue = (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue


def _hex(rgb: tuple[float, ...]) -> str:
    return "#" + "".join(f"{round(255 * v):02x}" for v in rgb)
