"""The helper that runs functions on ranks: results in order, failures named, time bounded, nothing left behind."""

import os
import subprocess
import sys
import time

import psutil
import pytest
import torch
import torch.distributed as dist

from moelab.engine.testing import RankError, Ranks

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
        if how == "stays away":
            return
    dist.barrier()  # never complete


def test_ranks_are_reused_and_replaced_after_a_failure():
    with Ranks(2) as ranks:
        first, second = ranks.run(add_up, 1), ranks.run(add_up, 2.5)
        assert [r[:2] for r in first] == [r[:2] for r in second] and [r[1] for r in first] == [0, 1]
        assert [r[2].item() for r in first + second] == [3, 3, 6, 6]
        for how, words, timeout_s in (
            ("raises", r"rank 1 of 2 (.|\n)*one is odd", 300),
            ("dies", r"rank 1 of 2 .*exit code 7", 300),
            ("stays away", r"ranks \[0\] of 2 did not answer in time", 5),
        ):
            started = time.monotonic()
            with pytest.raises(RankError, match=words):
                ranks.run(misbehave, how, timeout_s=timeout_s)
            assert time.monotonic() - started < 120
            again = ranks.run(add_up, 1)
            assert [r[2].item() for r in again] == [3, 3]
            assert not {r[0] for r in first} & set(psutil.pids())
            first = again
    assert not {r[0] for r in again} & set(psutil.pids())


def test_a_function_of_a_notebook_is_refused_before_a_rank_starts(monkeypatch):
    def function():
        """Do nothing."""

    monkeypatch.setattr(function, "__module__", "__main__")
    monkeypatch.delattr(sys.modules["__main__"], "__file__", raising=False)
    with pytest.raises(ValueError, match=r"function is of this notebook; put it into a module$"):
        Ranks(2).run(function)


def test_a_script_runs_its_own_functions(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import torch.distributed as dist\n"
        "from moelab.engine.testing import Ranks\n"
        "def plus_rank(number):\n"
        "    return number + dist.get_rank()\n"
        "if __name__ == '__main__':\n"
        "    with Ranks(2) as ranks:\n"
        "        print(ranks.run(plus_rank, 3))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.stdout == "[3, 4]\n", done.stderr
