"""What a reader sees of a notebook before it runs: what is asked and measured, and no page of code that only draws."""

import json
from pathlib import Path

import pytest

from moelab import paths

NOTEBOOKS = sorted(paths.notebooks().glob("*.ipynb"), key=lambda path: path.name)
WIDEST = 100
"""Characters of a parameter's line, which JupyterLab shows without scrolling beside a folder's list."""


def code(path: Path) -> list[tuple[str, dict]]:
    cells = json.loads(path.read_text())["cells"]
    return [("".join(cell["source"]), cell["metadata"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_that_draw_or_hold_controls_hide_their_source_and_no_others_do(path):
    for source, metadata in code(path):
        draws = "publication.figure(" in source or "widgets.interactive_output(" in source or "widgets.HBox(" in source
        assert metadata.get("jupyter", {}).get("source_hidden", False) == draws, source
        assert not draws or "lab.measure" not in source, "what is measured is to be read"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_parameters_do_not_run_off_the_edge(path):
    for source, metadata in code(path):
        if "parameters" in metadata.get("tags", ()):
            assert max(map(len, source.splitlines())) <= WIDEST, source
