"""A home for each test, records to pass on, and waiting for processes that train."""

import sys
from pathlib import Path

import pytest

from moelab.runs import records
from moelab.runs.states import Status
from moelab.runs.store import Run, RunStore
from moelab.runs.supervisor import RunProcess
from tests.conftest import until


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """MOELAB_HOME."""
    monkeypatch.setenv("MOELAB_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def theirs(tmp_path) -> RunStore:
    """The empty store of somebody who takes records over."""
    return RunStore(tmp_path / "theirs")


def record(run: Run, directory: Path) -> Path:
    """Pack a run's record, and return it as a file of its own."""
    (pack,) = records.write([run], directory)
    (archive,) = records.archives_in(pack)
    (alone := directory / archive.name).write_bytes(archive.read_bytes())
    pack.unlink()
    return alone


def wait_for_step(run: Run, step: int) -> None:
    """Wait until some process has trained so many steps of a run."""
    until(lambda: (status := Status.read(run.path)) is not None and status.step >= step)


def stand_in(run: Run, code: str, *options: str) -> RunProcess:
    """Start Python code in place of a run's worker."""
    return RunProcess(run, [sys.executable, *options, "-c", code])
