"""How many cores a process may use."""

from types import SimpleNamespace

import pytest

from moelab import machine


@pytest.mark.parametrize(("quota", "cores"), [("200000 100000", 2), ("50000 100000", 1), ("max 100000", 8), ("", 8)])
def test_a_containers_share_of_the_cores_counts(quota, cores, monkeypatch):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(machine, "Path", lambda path: SimpleNamespace(read_text=lambda: quota))
    assert machine.cores() == cores
