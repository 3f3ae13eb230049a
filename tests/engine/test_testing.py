"""The helper that runs functions on ranks: results in order, failures named, nothing left behind."""

import os
import time

import psutil
import pytest
import torch
import torch.distributed as dist

from moelab.engine.testing import RankError, Ranks, run_on_ranks

pytestmark = pytest.mark.multiprocess


def add_up(x):
    total = torch.tensor([dist.get_rank() + x])
    dist.all_reduce(total)
    return os.getpid(), dist.get_rank(), total


def misbehave(how):
    if dist.get_rank() == 1:
        if how == "raises":
            raise ValueError("one is odd")
        if how == "dies":
            os._exit(7)
    dist.barrier()  # never complete


def test_ranks_are_reused_and_replaced_after_a_failure():
    with Ranks(2) as ranks:
        first, second = ranks.run(add_up, 1), ranks.run(add_up, 2.5)
        assert [r[:2] for r in first] == [r[:2] for r in second] and [r[1] for r in first] == [0, 1]
        assert [r[2].item() for r in first + second] == [3, 3, 6, 6]
        for how, words in (("raises", "one is odd"), ("dies", "exit code 7")):
            started = time.monotonic()
            with pytest.raises(RankError, match=rf"rank 1 of 2 (.|\n)*{words}"):
                ranks.run(misbehave, how)
            assert time.monotonic() - started < 120
            again = ranks.run(add_up, 1)
            assert [r[2].item() for r in again] == [3, 3]
    gone = {r[0] for r in first + again}
    assert not gone & set(psutil.pids())


def hang_on_one():
    if dist.get_rank() == 0:
        dist.barrier()
    time.sleep(0 if dist.get_rank() else 600)


def test_time_is_bounded():
    with Ranks(2) as ranks:
        pids = [r[0] for r in ranks.run(add_up, 0)]
        started = time.monotonic()
        with pytest.raises(RankError, match=r"ranks \[0\] of 2 did not answer in time"):
            ranks.run(hang_on_one, timeout_s=5)
        assert time.monotonic() - started < 120
        assert not set(pids) & set(psutil.pids())


def test_one_shot():
    assert [r[2].item() for r in run_on_ranks(3, add_up, 0)] == [3, 3, 3]
