"""An executed notebook as a page of the site: readable on a phone and in the dark, asking for nothing outside."""

from __future__ import annotations

import functools
import html
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moelab.files import write_text
from moelab.report.site import template

if TYPE_CHECKING:
    from nbconvert import HTMLExporter
    from nbformat import NotebookNode

# Half of what papermill, nbconvert and nbformat take to import: jsonschema, if it can, compiles a grammar of internationalised
# addresses, which nothing in a notebook's format asks for.
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]


def convert(notebook: Path) -> Path:
    """Write `<name>.html` beside an executed notebook of a publication, unless the page there was made from it; returns its path.

    Outputs that need a running kernel (widgets) are shown as the table or text they carry beside, and where that is only a name, a line says so. Formulas become MathML, which browsers draw
    themselves; long code is folded.
    """
    page, mark = notebook.with_suffix(".html"), _mark(notebook)
    if not template.is_current(page, mark):
        import nbformat

        node = nbformat.read(notebook, as_version=4)
        _describe_figures(node)
        _name_widgets(node)
        body, _ = _exporter().from_notebook_node(node)
        text = template.render(
            "notebook.html", mark=mark, title=_heading(node, notebook.stem), body=body, name=notebook.name
        )
        write_text(page, text)
    return page


def load() -> None:
    """Import and compile all that `convert` needs, in the process that others are forked from."""
    from nbformat import v4

    cells = [v4.new_markdown_cell("# Title"), v4.new_code_cell("1")]
    _exporter().from_notebook_node(v4.new_notebook(cells=cells))


def is_current(notebook: Path) -> bool:
    """Whether `convert` would have nothing to do."""
    return template.is_current(notebook.with_suffix(".html"), _mark(notebook))


def _mark(notebook: Path) -> str:
    return template.mark(notebook.read_bytes(), names=("notebook.html", "base.html", "cells.html"))


@functools.cache
def _exporter() -> HTMLExporter:
    from jinja2 import pass_context
    from nbconvert import HTMLExporter
    from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
    from traitlets.config import Config

    class Renderer(IPythonRenderer):
        def block_math(self, body: str) -> str:
            return mathml(body, "block")

        def inline_math(self, body: str) -> str:
            return mathml(body, "inline")

    class Exporter(HTMLExporter):
        @pass_context
        def markdown2html(self, context: Any, source: str) -> str:
            attachments = context.get("cell", {}).get("attachments", {})
            renderer = Renderer(escape=False, attachments=attachments, exclude_anchor_links=True)
            return MarkdownWithMath(renderer=renderer).render(source)

    kinds = ["text/html", "image/svg+xml", "image/png", "image/jpeg", "text/markdown", "text/latex", "text/plain"]
    # `basic` is the cells alone: the style is the site's, and no library is asked for from a content network.
    return Exporter(
        template_name="basic",
        raw_template=template.asset("cells.html"),
        config=Config({"NbConvertBase": {"display_data_priority": kinds}}),
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        exclude_anchor_links=True,
    )


def mathml(formula: str, display: str) -> str:
    """A LaTeX formula as MathML, or as it was written where it cannot be read. `display` is "inline" or "block"."""
    from latex2mathml.converter import convert as to_mathml

    try:
        return to_mathml(formula.strip(), display=display)
    except Exception:  # the library raises an exception of its own for each thing it does not know
        return f"<code>{html.escape(formula.strip())}</code>"


def _describe_figures(notebook: NotebookNode) -> None:
    """Say for each picture without a description under which heading it stands."""
    heading = ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            found = [line.lstrip("#").strip() for line in cell.source.splitlines() if line.startswith("#")]
            heading = found[-1] if found else heading
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.metadata.setdefault("image/png", {}).setdefault("alt", f"Figure: {heading}")


def _name_widgets(notebook: NotebookNode) -> None:
    """Put a line in the place of widgets, which have no kernel on a page, and nothing in the place of progress bars that are done."""
    for cell in notebook.cells:
        kept = []
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if any(kind.startswith("application/vnd.jupyter.widget-view") for kind in data) and "text/html" not in data:
                if (text := data.get("text/plain", "")) == "Output()":
                    continue
                if _WIDGET.fullmatch(text):
                    data["text/plain"] = "Controls to play with: open this notebook in JupyterLab."
            kept.append(output)
        if "outputs" in cell:
            cell.outputs = kept


_WIDGET = re.compile(r"[A-Z]\w+\(.*\)", re.S)
"""How a widget prints itself."""


def _heading(notebook: NotebookNode, name: str) -> str:
    """The notebook's first heading, else its name."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and cell.source.startswith("# "):
            return cell.source.splitlines()[0][2:].strip()
    return name
