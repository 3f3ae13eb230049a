"""Give SVGs the colours of dark pages: one file, whose colours are CSS variables."""

from __future__ import annotations

import colorsys
import re

GROUND, INK = "#14181d", "#e4e8ee"
"""Colours of the ground and of the text on dark pages."""

_COLOR = re.compile(r"(fill|stroke): (#[0-9a-fA-F]{6})\b")


def themed(svg: str) -> str:
    """Return an SVG of matplotlib's with a style sheet in which each of its colours is a CSS variable.

    The variable of ``#0072b2`` is ``--c0072b2``; it has a value where dark colours are preferred, by the system or by
    the page that shows the file, and else the colour itself stands. The elements keep their literal colours for
    programs that read no style sheet. Pictures inside the SVG, such as a heat map's pixels, stay as they are.
    """
    used = sorted(set(_COLOR.findall(svg)))
    values = "".join(f"--c{c[1:]}:{dark_color(c)};" for c in sorted({"#000000", *(c for _, c in used)}))
    rules = "".join(f'[style*="{what}: {c}"]{{{what}:var(--c{c[1:]},{c})!important}}' for what, c in used)
    # What has no colour of its own is black by default.
    sheet = f"@media (prefers-color-scheme:dark){{svg{{{values}}}}}svg{{fill:var(--c000000,#000000)}}{rules}"
    return svg.replace("<defs>", f"<style>{sheet}</style>\n <defs>", 1)


def dark_color(color: str) -> str:
    """Return the colour of dark pages in place of a colour such as ``#56b4e9``.

    Greys are inverted (white becomes the dark ground, black the light ink); other colours keep their hue and are
    lightened until their contrast with the ground is 4.5 to 1 (WCAG's ratio for text).
    """
    from matplotlib.colors import to_hex, to_rgb

    rgb = to_rgb(color)
    hue, lightness, saturation = colorsys.rgb_to_hls(*rgb)
    if max(rgb) - min(rgb) < 0.06:
        red, green, blue = (i + (g - i) * lightness for g, i in zip(to_rgb(GROUND), to_rgb(INK), strict=True))
        return to_hex((red, green, blue))
    while contrast(color, GROUND) < 4.5 and lightness < 1:
        lightness = min(1.0, lightness + 0.02)
        color = to_hex(colorsys.hls_to_rgb(hue, lightness, saturation))
    return color


def contrast(one: str, other: str) -> float:
    """Return WCAG's contrast ratio of two colours, 1 to 21."""
    high, low = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _luminance(color: str) -> float:
    from matplotlib.colors import to_rgb

    red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in to_rgb(color))
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
