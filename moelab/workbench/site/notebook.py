"""An executed notebook as a page of the site: readable on a phone and in the dark, asking for nothing outside."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from moelab.files import write_text
from moelab.workbench.site import template

if TYPE_CHECKING:
    from nbconvert import HTMLExporter

# Half of what papermill, nbconvert and nbformat take to import: jsonschema, if it can, compiles a grammar of internationalised
# addresses, which nothing in a notebook's format asks for.
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]


def convert(notebook: Path) -> Path:
    """Write `<name>.html` beside an executed notebook of a publication, unless the page there was made from it; returns its path.

    Outputs that need a running kernel (widgets) are shown as the table or text they carry beside. Formulas stay as written.
    """
    page, mark = notebook.with_suffix(".html"), _mark(notebook)
    if not template.is_current(page, mark):
        body, _ = _exporter().from_filename(str(notebook))
        html = template.render("notebook.html", mark=mark, title=_heading(notebook), body=body, name=notebook.name)
        write_text(page, html)
    return page


def is_current(notebook: Path) -> bool:
    """Whether `convert` would have nothing to do."""
    return template.is_current(notebook.with_suffix(".html"), _mark(notebook))


def _mark(notebook: Path) -> str:
    return template.mark(notebook.read_bytes(), names=("notebook.html", "base.html"))


@functools.cache
def _exporter() -> HTMLExporter:
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    kinds = ["text/html", "image/svg+xml", "image/png", "image/jpeg", "text/markdown", "text/latex", "text/plain"]
    # `basic` is the cells alone: the style is the site's, and no library is asked for from a content network.
    return HTMLExporter(
        template_name="basic",
        config=Config({"NbConvertBase": {"display_data_priority": kinds}}),
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        exclude_anchor_links=True,
    )


def _heading(notebook: Path) -> str:
    """The notebook's first heading, else its name."""
    import nbformat

    for cell in nbformat.read(notebook, as_version=4).cells:
        if cell.cell_type == "markdown" and cell.source.startswith("# "):
            return cell.source.splitlines()[0][2:].strip()
    return notebook.stem
