"""Find the folders of moelab: the checkout, the home (`.moelab/`), the results, the pages, the notebooks.

The home is a user's workspace, which git ignores: runs, prepared tokens, measurements, drafts, his own results and the
pages that show them beside the published ones. Nothing is written into the published results unless that is asked for.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from moelab import environment


def checkout() -> Path | None:
    """Return the source checkout that this package runs from, or None for an installed wheel."""
    root = Path(__file__).resolve().parents[1]
    return root if (root / "pyproject.toml").is_file() and (root / "notebooks").is_dir() else None


def _named(value: str) -> Path:
    """Return the folder that a variable names; not every shell and file of settings replaces a ~ in it."""
    return Path(os.path.expanduser(value)).resolve()


def home() -> Path:
    """Return the workspace: `MOELAB_HOME`, else `.moelab` in the checkout or the current folder."""
    if value := environment.HOME.get():
        return _named(value)
    return (checkout() or Path.cwd()) / ".moelab"


def results() -> Path:
    """Return the folder of published results: `MOELAB_RESULTS`, else `results` in the checkout or current folder."""
    if value := environment.RESULTS.get():
        return _named(value)
    return (checkout() or Path.cwd()) / "results"


def own_results() -> Path:
    """Return the folder of the user's own results, in the workspace."""
    return home() / "results"


def all_results() -> tuple[Path, Path]:
    """Return the folders of results: the published ones, then the user's own."""
    return results(), own_results()


def results_for(publish: bool) -> Path:
    """Return the folder for a new result: the published ones if that is asked for, else the user's own."""
    return results() if publish else own_results()


def pages() -> Path:
    """Return the folder of the pages that show all results, in the workspace."""
    return home() / "pages"


def notebooks() -> Path:
    """Return the folder of the experiments' notebooks; they ship in the wheel, too."""
    if root := checkout():
        return root / "notebooks"
    spec = find_spec("moelab.notebooks")
    places = list(spec.submodule_search_locations or []) if spec else []
    if not places:
        raise ValueError("the notebooks are not installed with this copy of moelab; run it from a checkout")
    return Path(places[0])


def short(path: Path) -> str:
    """Return a path relative to the current folder where it lies below it, else as it is."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
