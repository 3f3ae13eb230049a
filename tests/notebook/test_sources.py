"""What a reader sees of a notebook before it runs: what is asked and measured, and no page of code that only draws."""

import nbformat
import pytest

from moelab import paths
from moelab.design.parameters import parameters
from moelab.experiments import EXPERIMENTS

NOTEBOOKS = sorted(paths.notebooks().glob("*.ipynb"), key=lambda path: path.name)
WIDEST = 100
"""Characters of a parameter's line, which JupyterLab shows without scrolling beside a folder's list."""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_no_outputs_says_what_it_asks_and_hides_the_cells_that_draw_and_no_others(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert all(part in notebook.cells[0].source for part in ("**Question", "**The paper's answer", "**Ours"))
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        source, hidden = cell.source, cell.metadata.get("jupyter", {}).get("source_hidden", False)
        assert not cell.outputs and cell.execution_count is None
        draws = "publication.figure(" in source or "widgets.interactive_output(" in source or "widgets.HBox(" in source
        assert hidden == draws, source
        assert not draws or "lab.measure" not in source, "what is measured is to be read"
        if "parameters" in cell.metadata.get("tags", ()):
            assert max(map(len, source.splitlines())) <= WIDEST, source


def test_parameters_have_types_and_comments():
    for experiment in EXPERIMENTS.values():
        for p in parameters(experiment).values():
            assert p.type not in ("None", "") and p.help, f"{experiment.name}: {p.name} needs a type and a comment"
