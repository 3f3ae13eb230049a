"""Clean the HTML of notebooks, which results of others may bring along: text, tables and pictures stay, code goes.

Scripts, styles, frames, forms and handlers of events are dropped, and addresses that run code or load from elsewhere.
`POLICY` makes browsers refuse what would be left.
"""

from __future__ import annotations

import base64
import functools
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bleach.sanitizer import Cleaner
    from nbformat import NotebookNode

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'self'"
)
"""Content-Security-Policy of the pages."""
OF_FILES = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; sandbox"
"""The same of other files, such as SVG: they run nothing and load nothing."""

_TAGS = """
a abbr b blockquote br caption code col colgroup dd del details div dl dt em figcaption figure h1 h2 h3 h4 h5 h6 hr i
img ins kbd li ol p pre q s samp section small span strong sub summary sup table tbody td tfoot th thead tr tt u ul var
math menclose mfenced mfrac mi mmultiscripts mn mo mover mpadded mphantom mprescripts mroot mrow ms mspace msqrt mstyle
msub msubsup msup mtable mtd mtext mtr munder munderover none
"""
_ATTRIBUTES = """
align alt border class colspan dir display halign height id lang open role rowspan scope span start style title valign
width xmlns accent columnalign columnlines columnspacing depth fence form frame linebreak linethickness lspace
mathvariant maxsize minsize movablelimits notation rowlines rowspacing rspace scriptlevel separator stretchy symmetric
voffset
"""
_STYLES = """
color background-color font-weight font-style font-family text-align text-decoration vertical-align white-space
line-height overflow-x width max-width height padding margin
"""
_PICTURE = re.compile(r"(?!//)(data:image/(png|jpeg|gif|webp|svg\+xml);base64,[A-Za-z0-9+/=\s]*|[\w./ -]+)")
_CODE = re.compile(r"<(script|style)\b.*?</\1\s*>", re.IGNORECASE | re.DOTALL)
"""What would be left of these elements as text."""


def clean(html: str) -> str:
    """Return HTML without what runs code or loads from elsewhere."""
    return _cleaner().clean(_CODE.sub("", html))


def frame_pictures(notebook: NotebookNode) -> None:
    """Make each SVG of a notebook's outputs a picture, in which nothing runs."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if svg := output.get("data", {}).pop("image/svg+xml", None):
                data = base64.b64encode(svg.encode()).decode()
                output.data["text/html"] = f'<img alt="Figure" src="data:image/svg+xml;base64,{data}">'


@functools.cache
def _cleaner() -> Cleaner:
    from bleach.css_sanitizer import CSSSanitizer
    from bleach.sanitizer import Cleaner

    attributes = frozenset(_ATTRIBUTES.split())

    def allowed(tag: str, name: str, value: str) -> bool:
        if (tag, name) == ("img", "src"):
            return _PICTURE.fullmatch(value) is not None
        if (tag, name) == ("a", "href"):
            return not value.strip().lower().startswith("data:")
        return name in attributes or name.startswith("aria-")

    return Cleaner(
        tags=frozenset(_TAGS.split()),
        attributes=allowed,
        protocols={"http", "https", "mailto", "data"},
        strip=True,
        css_sanitizer=CSSSanitizer(allowed_css_properties=_STYLES.split()),
    )
