"""Where things are: the checkout, the workshop (`.moelab/`: runs, tokens, drafts), the results, the notebooks."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path


def checkout() -> Path | None:
    """The source checkout this package runs from, or None for an installed wheel."""
    root = Path(__file__).resolve().parents[1]
    return root if (root / "pyproject.toml").is_file() and (root / "notebooks").is_dir() else None


def home() -> Path:
    """The workshop: runs, prepared tokens, drafts of results. `MOELAB_HOME`, else `.moelab` in the checkout or the current folder."""
    if value := os.environ.get("MOELAB_HOME"):
        return Path(value).resolve()
    return (checkout() or Path.cwd()) / ".moelab"


def results() -> Path:
    """Where results are published: `MOELAB_RESULTS`, else `results` in the checkout or the current folder."""
    if value := os.environ.get("MOELAB_RESULTS"):
        return Path(value).resolve()
    return (checkout() or Path.cwd()) / "results"


def notebooks() -> Path:
    """The folder of the experiments' notebooks; they ship in the wheel, too."""
    if root := checkout():
        return root / "notebooks"
    spec = find_spec("moelab.notebooks")
    places = list(spec.submodule_search_locations or []) if spec else []
    if not places:
        raise ValueError("the notebooks are not installed with this copy of moelab; run it from a checkout")
    return Path(places[0])


def short(path: Path) -> str:
    """A path as people read it: relative to the current folder where it lies below it."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
