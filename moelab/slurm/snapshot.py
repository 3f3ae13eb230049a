"""Copy the code at submission, so that editing the checkout does not change the code of jobs in the queue.

A copy holds all files of the code but hidden and compiled ones. submitit's `RsyncSnapshot` needs rsync, copies only
tracked files (not a new notebook), and makes a copy for each submission. Here equal code has one folder, named by the
hash of its content.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Collection
from pathlib import Path

from moelab import paths
from moelab.files import new_directory, write_json
from moelab.runs.provenance import SNAPSHOT, commit

_PARTS = ("moelab", "kernels", "notebooks", "pyproject.toml", "constraints.txt")
_KEEP_S = 7 * 24 * 3600


def place(root: Path) -> Path | None:
    """Return the folder below `root` for the present code, whether or not it exists yet.

    Inside a job, this is the job's own snapshot. It is None for an installed wheel, which is not copied.
    """
    checkout = paths.checkout()
    if checkout is None or (checkout / SNAPSHOT).exists():  # a snapshot: this is a job that submits
        return checkout
    content = hashlib.sha256(str(commit()).encode())
    for name in _files(checkout):
        content.update(f"{name}\0".encode() + hashlib.sha256((checkout / name).read_bytes()).digest())
    return root / content.hexdigest()[:12]


def take(target: Path) -> None:
    """Copy the checkout's code and its commit to its `place`, unless they are there."""
    checkout = paths.checkout()
    if target.exists() or checkout is None:
        if target != checkout:
            os.utime(target)  # `prune` counts the age from the last submission
        return
    with new_directory(target) as new:
        for name in _files(checkout):
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(checkout / name, new / name)
        # An installation maps kernels/ to moelab.kernels (pyproject.toml); in a plain folder a link does so.
        os.symlink(Path("..") / "kernels", new / "moelab" / "kernels")
        write_json(new / SNAPSHOT, commit())


def prune(root: Path, in_use: Collection[Path]) -> None:
    """Remove the copies below `root` that no job uses and that were last submitted more than a week ago."""
    for copy in root.glob("[!.]*"):
        if copy not in in_use and time.time() - copy.stat().st_mtime > _KEEP_S:
            # Rename first: an incomplete copy must never stand at a snapshot's path.
            copy.rename(gone := copy.with_name(f".{copy.name}-{os.getpid()}"))
            shutil.rmtree(gone, ignore_errors=True)


def _files(checkout: Path) -> list[Path]:
    """Return the files of the code, relative to the checkout; without hidden and compiled ones."""
    parts = (checkout / name for name in _PARTS)
    found = (path.relative_to(checkout) for part in parts for path in (part, *part.rglob("*")) if path.is_file())
    return sorted(path for path in found if not any(name[0] == "." or name == "__pycache__" for name in path.parts))
