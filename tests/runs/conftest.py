"""A home for each test, and waiting for processes that train."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moelab.runs.store import Run, Status


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    """MOELAB_HOME."""
    monkeypatch.setenv("MOELAB_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def until(condition: Callable[[], object]) -> None:
    """Wait until a condition holds, for five minutes at most."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def wait_for_step(run: Run, step: int) -> None:
    """Wait until some process has trained so many steps of a run."""
    until(lambda: (status := Status.read(run.path)) is not None and status.step >= step)
