"""Candidates of a training benchmark in processes of their own."""

import functools
import os
import signal
import time

import pytest

from moelab.bench import apart

pytestmark = pytest.mark.multiprocess


def candidate(seconds):
    return lambda number: time.sleep(seconds * number)


def test_a_process_trains_when_asked():
    with apart.training("sleeper", functools.partial(candidate, 0.05), threads=1) as training:
        turn = training.turn([1, 3])
        assert turn.seconds >= 0.1 and turn.faults >= 0 and turn.peak_bytes > 1 << 20
        training.step(0)
    assert training.process.exitcode == 0


def test_a_process_that_dies_is_told():
    with apart.training("sleeper", functools.partial(candidate, 0.0), threads=1) as training:
        training.step(0)
        os.kill(training.process.pid, signal.SIGKILL)
        with pytest.raises(ValueError, match="the process of 'sleeper' died \\(exit code -9\\)"):
            training.step(1)
    assert not training.process.is_alive()
