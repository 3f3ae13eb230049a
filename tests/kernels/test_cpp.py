"""Where the library of the C++ comes from: compiled once, found again, there as a whole or not at all, never replaced.

A script stands for the compiler, and a list for what is loaded, so that nothing is compiled or loaded here.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from filelock import FileLock
from moelab.kernels import _cpp, gate, version

NAME = "baseline"
COMPILER = """#!/bin/sh
echo "$@" >> {log}
{also}
while [ "$1" != -o ]; do shift || exit 3; done
echo made > "$2"
"""


class Place:
    """Folders, a compiler, and what was loaded."""

    def __init__(self, root: Path):
        self.root, self.folder, self.sources = root, root / "folder", root / "sources"
        self.loaded, self.refuse = [], ""

    def compiler(self, also=""):
        path = self.root / "compiler"
        path.write_text(COMPILER.format(log=self.root / "log", also=also))
        path.chmod(0o755)
        return str(path)

    def calls(self):
        log = self.root / "log"
        return len(log.read_text().splitlines()) if log.exists() else 0

    def load_library(self, path):
        if self.refuse:
            raise OSError(f"Could not load this library: {path}") from OSError(self.refuse)
        assert Path(path).read_text() == "made\n"
        self.loaded.append(Path(path))

    def load(self):
        _cpp._load.__wrapped__(NAME)
        return self.loaded[-1]


ONCE = len(_cpp.SOURCES) + 1  # calls of the compiler: one links


@pytest.fixture
def place(tmp_path, monkeypatch):
    place = Place(tmp_path)
    shutil.copytree(_cpp._HERE, place.sources, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(place.folder))
    monkeypatch.setenv("CXX", place.compiler())
    monkeypatch.setattr(_cpp, "_HERE", place.sources)
    monkeypatch.setattr(torch.ops, "load_library", place.load_library)
    _cpp._key.cache_clear()
    with _cpp.limited(NAME):
        yield place
    _cpp._key.cache_clear()


def test_it_is_compiled_once_with_one_line(place, monkeypatch, capfd):
    path = place.load()
    assert path.parent.parent == place.folder and place.calls() == ONCE
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"moelab: compiling the CPU kernels for {NAME} with {place.root}")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert place.load() == path and place.calls() == ONCE and capfd.readouterr() == ("", "")
    made = {p for p in place.folder.rglob("*") if p.suffix != ".lock"}
    assert made == {path.parent, path, path.with_suffix(".sha256")}
    assert place.folder.stat().st_mode & 0o077 == 0


def test_who_waits_for_another_compilation_says_so(place, capfd):
    place.folder.mkdir(mode=0o700)
    other = FileLock(place.folder / f"moelab-kernels-{NAME}.lock")
    other.acquire()
    with ThreadPoolExecutor() as pool:
        path, said = pool.submit(place.load), ""
        while not path.done() and "waiting" not in said:
            said += capfd.readouterr().err
            time.sleep(0.01)
        other.release()
        assert said == "moelab: waiting for another process, which compiles the CPU kernels\n"
        assert path.result().exists()


@pytest.mark.parametrize("remove", [Path.unlink, lambda path: shutil.rmtree(path.parent)], ids=["file", "folder"])
def test_what_was_removed_is_compiled_again(place, remove):
    path = place.load()
    remove(path)
    assert place.load() == path and path.exists() and place.calls() == 2 * ONCE


@pytest.mark.parametrize("damage", ["library.so", "library.sha256"])
def test_a_damaged_library_is_not_loaded_but_compiled_again_and_said(place, monkeypatch, capfd, damage):
    path = place.load()
    file = path.with_name(damage)
    file.write_text(file.read_text()[:-2])
    loaded = len(place.loaded)
    with monkeypatch.context() as other:
        other.setenv("CXX", "no-such-compiler")
        with pytest.raises(RuntimeError, match=f"{path} is damaged, and there is no C\\+\\+ compiler"):
            place.load()
    assert len(place.loaded) == loaded
    capfd.readouterr()
    assert place.load() == path and place.calls() == 2 * ONCE
    said = capfd.readouterr().err.splitlines()
    assert said[0].startswith(f"moelab: {path} is damaged: ") and "compiling" in said[1]
    assert [p for p in place.folder.iterdir() if p.suffix != ".lock"] == [path.parent], "nothing is left over"


def test_what_another_node_compiled_meanwhile_is_not_replaced(place):
    path = place.load()
    before = path.stat()
    _cpp._compile_now(NAME)
    assert place.calls() == 2 * ONCE and path.stat() == before
    assert [p for p in place.folder.iterdir() if p.suffix != ".lock"] == [path.parent]


def test_other_sources_or_flags_are_another_library(place, monkeypatch):
    path = place.load()
    for change in (
        lambda: (place.sources / "vectors.h").open("a").write("// changed\n"),
        lambda: monkeypatch.setattr(_cpp, "_FLAGS", (*_cpp._FLAGS, "-g")),
        lambda: (place.sources / "new.h").write_text(""),
    ):
        before = place.calls()
        change()
        _cpp._key.cache_clear()
        assert place.load() != path and place.calls() == before + ONCE
        assert path.exists()


def test_sources_that_change_meanwhile_make_no_library(place, monkeypatch):
    monkeypatch.setenv("CXX", place.compiler(f"echo >> {place.sources}/vectors.h"))
    with pytest.raises(RuntimeError, match="the sources of the CPU kernels changed while they were compiled"):
        place.load()
    assert [p.suffix for p in place.folder.iterdir()] == [".lock"] and not place.loaded


@pytest.mark.parametrize("why", ["no folder", "noexec", "no home"])
def test_where_it_cannot_be_kept_one_line_says_so(place, monkeypatch, capfd, why):
    reason = f"the compiled code cannot be kept in {place.folder} ("
    if why == "no folder":
        place.folder.touch()
    elif why == "noexec":
        place.refuse = "Operation not permitted"
        reason += "Operation not permitted); set TORCH_EXTENSIONS_DIR to "
    else:
        monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("no home")))
        reason = "there is no home directory to keep the compiled code in; set TORCH_EXTENSIONS_DIR."
    monkeypatch.setattr(_cpp, "_load", _cpp._load.__wrapped__)  # which keeps what this process has loaded
    assert not _cpp.available() and version()["instructions"] == "none"
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith(f"moelab: no CPU kernels: {reason}") and "; set TORCH_EXTENSIONS_DIR" in line
    assert "Plain PyTorch computes instead" in line


def test_a_compiler_may_have_arguments_and_fail(place, monkeypatch):
    monkeypatch.setenv("CXX", f"{place.compiler()} -B /some/where")
    place.load()
    assert all(line.startswith("-B /some/where -") for line in (place.root / "log").read_text().splitlines())
    shutil.rmtree(place.folder)
    for said, line in (
        ("x.cpp:1: error: made up\\nand more\\nmore\\nmore", "x.cpp:1: error: made up"),
        ("a\\nb\\nc\\nd", "b | c | d"),
        ("", "exit code 4"),
    ):
        monkeypatch.setenv("CXX", place.compiler(f"printf '{said}' >&2; exit 4"))
        with pytest.raises(RuntimeError) as caught:
            place.load()
        assert str(caught.value).endswith(f"failed: {line}")
        assert [p.suffix for p in place.folder.iterdir()] == [".lock"]


COMPILERS = ["g++", "clang++", *(f"clang++-{n}" for n in range(14, 30))]


@pytest.mark.slow
@pytest.mark.parametrize("compiler", [name for name in COMPILERS if shutil.which(name)])
def test_compilers_accept_the_sources_without_a_warning(compiler, tmp_path):
    """What all sources include is compiled once: PyTorch's headers take most of the time."""
    include = Path(torch.__file__).parent / "include"
    strict = [compiler, *_cpp._flags(NAME), "-Wall", "-Wextra", "-Werror", "-isystem", str(include)]
    (header := tmp_path / "all.h").write_text(f'#include "{_cpp._HERE}/operation.h"\n')
    command = [*strict, "-include", str(header), "-fsyntax-only"]
    for what in (
        ["-x", "c++-header", header, "-o", f"{header}.gch"],
        *([_cpp._HERE / source] for source in _cpp.SOURCES),
    ):
        done = subprocess.run([*(strict if header in what else command), *what], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_names_of_instruction_sets(monkeypatch):
    names = [*_cpp.supported(), "none"]
    monkeypatch.setenv(_cpp.VARIABLE, "sse9")
    with pytest.raises(ValueError) as caught:
        _cpp.available()
    assert str(caught.value) == f"MOELAB_INSTRUCTIONS must be one of {', '.join(names)} here, got 'sse9'"
    monkeypatch.delenv(_cpp.VARIABLE)
    assert _cpp.instructions() == names[0] and names[-2:] == ["baseline", "none"]
    with _cpp.limited("none"):
        assert version()["instructions"] == "none" and not _cpp.available()
        with pytest.raises(RuntimeError, match=r"^MOELAB_INSTRUCTIONS is 'none'$"):
            _cpp.operations()
    assert _cpp.VARIABLE not in os.environ


def test_version(instructions):
    assert version() == {"sources": _cpp._key("")[:12], "instructions": instructions}


@pytest.mark.parametrize("compiler", ["none", "fails"])
def test_without_a_compiler_plain_pytorch_computes(place, monkeypatch, capfd, compiler):
    cxx = "no-such-compiler" if compiler == "none" else place.compiler("echo an error >&2; exit 1")
    monkeypatch.setenv("CXX", cxx)
    monkeypatch.setattr(_cpp, "_load", _cpp._load.__wrapped__)  # which keeps what this process has loaded
    for _ in range(2):
        assert gate(torch.eye(4), 1).expert_SK.flatten().tolist() == [0, 1, 2, 3]
    assert version()["instructions"] == "none"
    *before, line = capfd.readouterr().err.splitlines()
    assert len(before) == (compiler == "fails") and line.startswith("moelab: no CPU kernels: ")
    missing = (
        f"there is no C++ compiler '{cxx}'; install it, or set CXX." if compiler == "none" else "failed: an error."
    )
    assert missing in line and "Plain PyTorch computes instead" in line


@pytest.mark.multiprocess
def test_processes_at_the_same_time_compile_once_and_do_not_wait_for_a_killed_one(tmp_path):
    place = Place(tmp_path)
    code = f"from moelab.kernels import _cpp; _cpp._compile({NAME!r}); print(_cpp._library({NAME!r}))"

    def start(also):
        env = os.environ | {"CXX": place.compiler(also), "TORCH_EXTENSIONS_DIR": str(place.folder)}
        options = dict(env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        return subprocess.Popen([sys.executable, "-c", code], **options)

    slow = start("sleep 100")
    try:
        until = time.monotonic() + 300
        while place.calls() < min(os.cpu_count(), len(_cpp.SOURCES)):  # all that it starts at once
            assert time.monotonic() < until and slow.poll() is None
            time.sleep(0.02)
        slow.kill()  # its compilers live on
        slow.wait()
        (tmp_path / "log").unlink()
        both = [start("sleep 0.2") for _ in range(2)]
        outputs = [process.communicate(timeout=300) for process in both]
    finally:
        os.killpg(slow.pid, signal.SIGKILL)
    (first, said), (second, said_second) = outputs
    assert first == second and Path(first.strip()).read_text() == "made\n", outputs
    lines = (said + said_second).splitlines()
    assert sum("compiling" in line for line in lines) == 1 and len(lines) <= 2, lines  # the other one may have to wait
    assert place.calls() == ONCE
    assert len(list(place.folder.glob("*/library.so"))) == 1
