"""Build the pages of a user's workspace, which show his own results beside the published ones."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

from moelab import paths
from moelab.files import sweep
from moelab.report.site.pages import Built, build
from moelab.report.summary import find_results


def update(*, publish: bool = False) -> Built:
    """Bring the pages up to date: those in the workspace, of all results, or those of the published results alone.

    Args:
        publish: write into the folder of published results, and show only these.
    """
    if publish:
        return build(paths.results())
    gather(paths.pages(), paths.all_results())
    return build(paths.pages())


def gather(pages: Path, roots: Sequence[Path]) -> None:
    """Put the files of all results, benchmarks and packed runs into one folder, in which pages can be built.

    Files are hard links, and copies where the file system has none. What is rewritten in `pages` takes the place of the
    link, so the results themselves stay as they are. What is gone from the results is removed.
    """
    folders = find_results(*roots)
    for old in set(find_results(pages)) - set(folders):
        shutil.rmtree(pages / old, ignore_errors=True)
    for path, folder in folders.items():
        # A page that was copied with a result may run scripts, so it is made here from the notebook. Those of the
        # published results are as trusted as the code beside them.
        _link_files(folder, pages / path, leave=() if folder.is_relative_to(roots[0]) else (".html", ".js"))
    packs: set[str] = set()
    for root in roots:
        for folder in (root / "benchmarks", *(root / "benchmarks").glob("[!.]*/")):
            if folder.is_dir():
                _link_files(folder, pages / folder.relative_to(root))
        if (folder := root / "runs").is_dir():
            prefix = "" if root == roots[0] else "own-"  # a model's packs have one name in all roots
            packs |= _link_files(folder, pages / "runs", prefix)
    # Not hidden files: another process may be about to move one into its place.
    for file in (pages / "benchmarks").rglob("[!.]*"):
        if file.is_file() and not any((root / file.relative_to(pages)).exists() for root in roots):
            file.unlink(missing_ok=True)
    for file in (pages / "runs").glob("[!.]*"):
        if file.name not in packs:
            file.unlink(missing_ok=True)


def _link_files(source: Path, target: Path, prefix: str = "", leave: tuple[str, ...] = ()) -> set[str]:
    """Link files that are missing in another folder or older there, but for some suffixes; return their names there."""
    target.mkdir(parents=True, exist_ok=True)
    sweep(target)
    shown = (entry for entry in os.scandir(target) if not entry.name.startswith("."))  # others may vanish meanwhile
    there = {entry.name: entry.stat().st_mtime_ns for entry in shown}
    files = [e for e in os.scandir(source) if e.is_file() and not (e.name.startswith(".") or e.name.endswith(leave))]
    for entry in files:
        if there.get(name := prefix + entry.name, -1) < entry.stat().st_mtime_ns:
            _link(Path(entry.path), target / name)
    return {prefix + entry.name for entry in files}


def _link(source: Path, target: Path) -> None:
    """Put a link to a file, or a copy of it, in the place of another in one step."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        try:
            os.link(source, temporary)
        except OSError:  # another disk, a file of another owner, or a file system without links
            shutil.copy2(source, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)  # renaming one link of a file to another does nothing
