"""Convert an executed notebook to a page of the site, which loads nothing from other sites."""

from __future__ import annotations

import base64
import functools
import html
import re
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moelab.files import write_text
from moelab.plotting.typography import typeset
from moelab.report.site import sanitize, template
from moelab.report.site.results import Picture
from moelab.report.summary import FigureRow

if TYPE_CHECKING:
    from nbconvert import HTMLExporter
    from nbformat import NotebookNode

# jsonschema, if it finds this package, compiles a grammar of internationalised addresses, which takes half of the time
# that papermill, nbconvert and nbformat need to be imported. The format of notebooks does not use it.
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]  # as if it could not be imported


def convert(notebook: Path, figures: Sequence[FigureRow] = ()) -> bool:
    """Write `<name>.html` beside the executed notebook of a result unless that is current; return whether it wrote.

    Code of markdown cells and outputs is dropped, see `sanitize`. Published figures, SVG files next to the notebook,
    take the place of the notebook's pictures of them.

    Widgets, which need a running kernel, are shown as the table or text that is stored with them; where that is only a
    name, a line refers to JupyterLab. Formulas become MathML, which browsers draw themselves. Code of more than 12
    lines, and of cells whose source JupyterLab hides, is folded.

    Args:
        figures: those of the result.
    """
    page = notebook.with_suffix(".html")
    code = (Path(str(module)).read_bytes() for module in (__file__, sanitize.__file__))
    named = [f"{figure.name}\n{figure.title}".encode() for figure in figures]
    mark = template.mark(notebook.read_bytes(), *named, *code, names=("notebook.html", "base.html", "cells.html"))
    if template.is_current(page, mark):
        return False
    import nbformat

    node = nbformat.read(notebook, as_version=4)
    _describe_figures(node)
    _show_files(node, figures, notebook.parent)
    sanitize.frame_pictures(node)
    _name_widgets(node)
    _fold_tables(node)
    body = sanitize.clean(_exporter().from_notebook_node(node)[0])
    body = _OTHER_NOTEBOOK.sub(lambda link: f'href="../../../figures.html#{link[1].replace("_", "-")}"', body)
    title = _heading(node, notebook.stem)
    write_text(page, template.render("notebook.html", mark=mark, title=title, body=body, name=notebook.name))
    return True


def load() -> None:
    """Import and compile all that `convert` needs, before other processes are forked from this one."""
    from nbformat import v4

    cells = [v4.new_markdown_cell("# Title"), v4.new_code_cell("1")]
    _exporter().from_notebook_node(v4.new_notebook(cells=cells))


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
    """Return a LaTeX formula as MathML, or as code if it cannot be read. `display` is "inline" or "block"."""
    from latex2mathml.converter import convert as to_mathml

    try:
        return to_mathml(formula.strip(), display=display)
    except Exception:  # the library raises an exception of its own for each thing it does not know
        return f"<code>{html.escape(formula.strip())}</code>"


def _describe_figures(notebook: NotebookNode) -> None:
    """Describe each picture that has no description by the heading above it, and say its size."""
    heading = ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            found = [line.lstrip("#").strip() for line in cell.source.splitlines() if line.startswith("#")]
            heading = found[-1] if found else heading
        for output in cell.get("outputs", []):
            if data := output.get("data", {}).get("image/png"):
                about = output.metadata.setdefault("image/png", {})
                about.setdefault("alt", f"Figure: {heading}")
                width, height = struct.unpack(">II", base64.b64decode(data[:64])[16:24])  # of the PNG's first chunk
                about |= {"width": about.get("width", width), "height": about.get("height", height)}


def _show_files(notebook: NotebookNode, figures: Sequence[FigureRow], folder: Path) -> None:
    """Replace the pictures of each cell that publishes as many figures as it shows by the figures' files and titles.

    Args:
        figures: of which a cell that publishes one names it in its code.
        folder: with their files.
    """
    files = {figure.name: Picture.of(folder / f"{figure.name}.svg") for figure in figures}
    titles = {figure.name: html.escape(typeset(figure.title)) for figure in figures}
    for cell in notebook.cells:
        shown = [output for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
        names = sorted((at, name) for name in files if (at := cell.source.find(f'"{name}"')) >= 0)
        if len(shown) != len(names) or not all(files[name].width for _, name in names):  # not drawn by us, or missing
            continue
        for output, (_, name) in zip(shown, names, strict=True):
            file, title = files[name], titles[name]
            del output.data["image/png"]
            size = f'width="{file.width}" height="{file.height}"'
            output.data["text/html"] = (
                f'<p><strong>{title}</strong></p><img class="picture" src="{file.file}" alt="{title}" {size}>'
            )


def _name_widgets(notebook: NotebookNode) -> None:
    """Replace widgets, which have no kernel on a page, by a line of text, and drop progress bars that are done."""
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


LONG = 16
"""Rows from which a table of a notebook is folded."""


def _fold_tables(notebook: NotebookNode) -> None:
    """Fold the output of long tables behind a line that says how long they are; empty heads become cells."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            text = _EMPTY_HEAD.sub(r"<td\1></td>", output.get("data", {}).get("text/html", ""))
            if "<table" in text:
                output.data["text/html"] = text
            if "<table" in text and (rows := text.count("<tr") - text.count("<thead")) >= LONG:
                summary = f"<summary>Table of {rows} rows</summary>"
                output.data["text/html"] = f'<details class="table">{summary}<div>{text}</div></details>'


_OTHER_NOTEBOOK = re.compile(r'href="\d\d_(\w+)\.ipynb"')
"""A link between the notebooks of a folder; on a page it leads to the other experiment's figures."""

_EMPTY_HEAD = re.compile(r"<th([^>]*)>\s*(?:&nbsp;)?\s*</th>")
_WIDGET = re.compile(r"[A-Z]\w+\(.*[)…]", re.S)
"""The text of a widget, which may be cut off."""


def _heading(notebook: NotebookNode, name: str) -> str:
    """Return the notebook's first heading, else its name."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and cell.source.startswith("# "):
            return cell.source.splitlines()[0][2:].strip()
    return name
