"""Copy the code at submission, so that editing the checkout does not change the code of jobs in the queue.

submitit's `RsyncSnapshot` needs rsync, copies only tracked files (not a new notebook), and makes a copy for each
submission. Here equal code has one folder, named by the hash of its content.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
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
    for name in _names(checkout):
        content.update(f"{name}\0".encode() + hashlib.sha256((checkout / name).read_bytes()).digest())
    return root / content.hexdigest()[:12]


def take(target: Path) -> None:
    """Copy the checkout's code to its `place`, unless it is there: files that git does not ignore, and the commit.

    Where git does not answer (a downloaded archive, a folder of another user), all files but hidden and compiled ones.
    """
    checkout = paths.checkout()
    if target.exists() or checkout is None:
        if target != checkout:
            os.utime(target)  # `prune` counts the age from the last submission
        return
    with new_directory(target) as new:
        for name in _names(checkout):
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


def _names(checkout: Path) -> list[str]:
    try:
        listed = subprocess.run(
            ["git", "-C", str(checkout), "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *_PARTS],
            capture_output=True,
            text=True,
            check=True,
        )
        names = listed.stdout.split("\0")
    except (OSError, subprocess.CalledProcessError):
        below = (
            path.relative_to(checkout) for part in _PARTS for path in (checkout / part, *(checkout / part).rglob("*"))
        )
        names = [str(n) for n in below if not any(p.startswith(".") or p == "__pycache__" for p in n.parts)]
    return sorted({n for n in names if n and (checkout / n).is_file()})
