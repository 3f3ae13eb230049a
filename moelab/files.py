"""Write files and directories so that a reader, or a process killed half-way, never sees half of one."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)
"""What a system says to who writes into a read-only file system, or into another user's folder."""


def write_bytes(path: Path, data: bytes, *, durable: bool = False) -> None:
    """Write a file in one step (temporary file, then rename); `durable` also waits for the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as f:
            f.write(data)
            if durable:
                f.flush()
                os.fsync(f.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def write_text(path: Path, text: str) -> None:
    """`write_bytes` for a text, UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any, *, durable: bool = False) -> None:
    """`write_bytes` for a JSON value."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode(), durable=durable)


def read_json(path: Path) -> Any:
    """Return the JSON value in a file, or None when there is no such file.

    Raises:
        ValueError: one line naming the file, when it is not JSON or not a regular file.
    """
    if (data := read_bytes(path)) is None:
        return None
    try:
        return json.loads(data.decode())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    except RecursionError:
        raise ValueError(f"{path}: not valid JSON (nested too deeply)") from None


def read_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file, or None when there is no such file; ValueError as for `read_json`."""
    value = read_json(path)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {str(value)[:40]!r}")
    return value


def read_lines(path: Path) -> list[Any]:
    """Return the JSON values in the lines of a file, none where there is no such file; without lines cut short."""
    values = []
    for line in (read_bytes(path) or b"").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            values.append(json.loads(line))
    return values


def read_bytes(path: Path) -> bytes | None:
    """Return the bytes of a file, or None when there is no such file.

    Raises:
        ValueError: one line: it is not a regular file; reading a FIFO or a device might never end.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError(f"{path}: not a regular file")
        return path.read_bytes()
    except FileNotFoundError:
        return None


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file, or a directory's entries, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


_TEMPORARY = re.compile(r"\..+[.-][a-z0-9_]{8}")
"""Names of the temporary files and folders of moelab: hidden, with eight random characters at the end."""


def sweep(folder: Path, *, older_s: float = 3600.0) -> None:
    """Remove the temporary files and folders in a folder that killed writers left: those older than `older_s`.

    What cannot be removed stays; nothing is raised.
    """
    before = time.time() - older_s
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            with contextlib.suppress(OSError):
                if _TEMPORARY.fullmatch(entry.name) and entry.stat(follow_symlinks=False).st_mtime < before:
                    if entry.is_dir(follow_symlinks=False):
                        shutil.rmtree(entry.path)
                    else:
                        os.unlink(entry.path)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """Fill a directory that appears at `path`, complete, when the block ends, and not at all if it raises.

    A directory already at `path` is replaced; between the two there is none for a moment.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                sync(file)
        os.chmod(temporary, 0o755)
        old = temporary.with_name(temporary.name[:-8] + secrets.token_hex(4))
        if path.exists():  # moved away in one step: a process killed while it removes files would leave half of them
            os.rename(path, old)
        os.replace(temporary, path)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
