"""JupyterLab opens copies of the notebooks, so that those of the repository stay as they are."""

import nbformat
import pytest

from moelab import paths
from moelab.notebook import copies


def write(file, source, outputs=()):
    cell = nbformat.v4.new_code_cell(source, outputs=list(outputs))
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), file)


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setenv("MOELAB_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(paths, "notebooks", lambda: tmp_path / "notebooks")
    write(tmp_path / "notebooks" / "01_a.ipynb", "a = 1")
    return tmp_path


def test_outputs_go_into_the_copy_and_a_new_version_replaces_it(place, capsys):
    source = place / "notebooks" / "01_a.ipynb"
    before = source.read_bytes()
    folder = copies.update()
    assert folder == place / "home" / "notebooks" and (folder / "01_a.ipynb").read_bytes() == before
    write(folder / "01_a.ipynb", "a = 1", [nbformat.v4.new_output("stream", text="1")])  # saved by JupyterLab
    copies.update()
    assert "stream" in (folder / "01_a.ipynb").read_text() and source.read_bytes() == before
    write(source, "a = 2")
    copies.update()
    assert (folder / "01_a.ipynb").read_bytes() == source.read_bytes()
    assert [p.name for p in folder.glob("*.ipynb")] == ["01_a.ipynb"] and not capsys.readouterr().err


@pytest.mark.parametrize("edited", ["a = 7", None])
def test_what_a_user_edited_is_kept_and_the_new_version_put_beside_it(place, capsys, edited):
    copy = copies.update() / "01_a.ipynb"
    if edited:
        write(copy, edited)
    else:
        copy.write_text("{")  # cut short: nobody's to throw away
    mine = copy.read_text()
    write(place / "notebooks" / "01_a.ipynb", "a = 2")
    copies.update()
    assert copy.read_text() == mine and "a = 2" in copy.with_suffix(".new.ipynb").read_text()
    assert "01_a.ipynb was edited and is kept" in capsys.readouterr().err
    copies.update()
    assert copy.read_text() == mine and not capsys.readouterr().err, "said once"
    write(copy.with_suffix(".new.ipynb"), "a = 8")
    write(place / "notebooks" / "01_a.ipynb", "a = 3")
    copies.update()
    assert copy.read_text() == mine and "a = 8" in copy.with_suffix(".new.ipynb").read_text(), "edited, too"
    assert "a = 3" in copy.with_suffix(".new-2.ipynb").read_text()
