"""Files appear whole or not at all, and what killed writers left is swept."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moelab import files
from moelab.files import new_directory, read_json, sweep, write_text


def test_what_a_killed_writer_left_is_swept_and_nothing_else(tmp_path):
    write_text(tmp_path / "status.json", "{}")
    with new_directory(tmp_path / "folder") as new:
        (new / "a").write_text("a")
    kept = {"status.json", "folder", ".lock", ".step-00000005.partial", ".ipynb_checkpoints", ".originals"}
    for name in sorted(kept - {"status.json", "folder"}):
        (tmp_path / name).write_text("")
    killed = """
import os, sys
from pathlib import Path

import pytest
from moelab import files
os.replace = lambda *_: os.kill(os.getpid(), 9)
if sys.argv[2] == "file":
    files.write_text(Path(sys.argv[1], "status.json"), "{}")
with files.new_directory(Path(sys.argv[1], "other")) as new:
    (new / "a").write_text("a")
"""
    for what in ("file", "folder"):
        subprocess.run([sys.executable, "-c", killed, str(tmp_path), what])
    left = {p.name for p in tmp_path.iterdir()} - kept
    assert len(left) == 2
    sweep(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == kept | left, "their writers may still be at it"
    long_ago = time.time() - 4000
    for path in tmp_path.iterdir():
        os.utime(path, (long_ago, long_ago))
    sweep(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == kept
    sweep(Path("/nowhere"))


def test_a_directory_is_replaced_in_one_step(tmp_path, monkeypatch):
    """What is removed file by file has a name that is swept, should the process be killed."""
    removed = []
    monkeypatch.setattr(files.shutil, "rmtree", lambda path, **_: removed.append(Path(path)))
    for text in ("old", "new"):
        with new_directory(tmp_path / "a") as new:
            (new / "b").write_text(text)
    assert (tmp_path / "a" / "b").read_text() == "new"
    assert all(files._TEMPORARY.fullmatch(path.name) for path in removed)
    assert [(path / "b").read_text() for path in removed if path.exists()] == ["old"]


@pytest.mark.parametrize("content", [b"\xf6", b'{"a": ', b"[" * 100_000], ids=["latin-1", "torn", "deep"])
def test_what_is_no_json_is_named(tmp_path, content):
    (file := tmp_path / "spec.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"spec\.json: not valid JSON"):
        read_json(file)
