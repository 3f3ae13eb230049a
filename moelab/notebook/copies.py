"""Keep copies of the notebooks in the workspace for JupyterLab, which saves outputs into what it opens.

.moelab/notebooks/<name>.ipynb              the copy that a user runs and edits
                  .originals/<name>.ipynb   the notebook that it was copied from
"""

from __future__ import annotations

import sys
from pathlib import Path

from moelab import paths
from moelab.files import read_json, write_bytes

ORIGINALS = ".originals"


def update() -> Path:
    """Copy notebooks that are missing or have changed, and return the folder of the copies.

    A copy whose cells a user has edited is kept; the new notebook is put beside it as ``<name>.new.ipynb``, or, where
    a user has edited that too, as ``<name>.new-2.ipynb`` and so on, and one line on standard error says so.
    """
    folder = paths.home() / "notebooks"
    for source in sorted(paths.notebooks().glob("*.ipynb")):
        original, copy = folder / ORIGINALS / source.name, folder / source.name
        content = source.read_bytes()
        if copy.exists() and original.exists() and original.read_bytes() == content:
            continue
        known = (_cells(original), _cells(source))
        if copy.exists() and _cells(copy) not in known:
            beside, count = copy.with_suffix(".new.ipynb"), 1
            while beside.exists() and _cells(beside) not in known:
                count += 1
                beside = copy.with_suffix(f".new-{count}.ipynb")
            print(f"{paths.short(copy)} was edited and is kept; the new notebook is {beside.name}", file=sys.stderr)
            copy = beside
        write_bytes(copy, content)
        write_bytes(original, content)
    return folder


def _cells(notebook: Path) -> list[tuple[str, str]] | None:
    """Return type and source of a notebook's cells, without outputs; None for a file that is not a notebook."""
    try:
        cells = read_json(notebook)["cells"]
        return [(cell["cell_type"], "".join(cell["source"])) for cell in cells]
    except (ValueError, TypeError, KeyError, OSError):
        return None
