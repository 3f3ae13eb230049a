"""What logs and stacks of dead or hanging ranks say, also those of NCCL, of which these lines are what it writes."""

import subprocess
import sys

import pytest

from moelab.engine.launch import postmortem

ABORT = """[rank1]:[E1129 12:00:00 ProcessGroupNCCL.cpp:683] [Rank 1] Watchdog caught collective operation timeout: WorkNCCL(1)
terminate called after throwing an instance of 'c10::DistBackendError'
  what():  [PG ID 0 PG GUID 0(default_pg) Rank 1] Process group watchdog thread terminated with exception: [Rank 1] """
TIMEOUT = (
    "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=5, OpType=ALLREDUCE) ran for 600050 milliseconds."
)
FAULT = "CUDA error: an illegal memory access was encountered"
NCCL = "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:77, "
REMOTE = f"{NCCL}remote process exited or there was a network error, NCCL version 2.27"
TWICE = f"{NCCL}invalid usage (run with NCCL_DEBUG=WARN for details), NCCL version 2.27"


@pytest.mark.parametrize(
    ("log", "error", "lost"),
    [
        (ABORT + TIMEOUT, TIMEOUT, True),
        (ABORT + FAULT, FAULT, False),
        (f"[rank0]: {REMOTE}\n[rank0]: Last error:\n[rank0]: socketProgress: peer closed", REMOTE, True),
        (f"[rank0]: {TWICE}\n[rank0]: Last error:\n[rank0]: Duplicate GPU detected", TWICE, False),
        ("RuntimeError: gloo/transport/tcp/pair.cc:547] Connection closed by peer", None, True),
        ("Timeout (0:10:00)!\nThread 0x1 (most recent call first):", "Timeout (0:10:00)!", True),
        ("step 5 of 9, this took long", "", False),
    ],
)
def test_a_rank_that_only_waited_is_told_from_one_that_failed(log, error, lost):
    found = postmortem.last_error(log)
    assert found == (log if error is None else error) and postmortem.lost_connection(found) == lost


@pytest.mark.parametrize(
    ("line", "waits"),
    [
        ("counts = received.cpu()", True),
        ("work.wait()", True),
        ("loss = float(total)", True),
        ("rows = chosen.nonzero()", True),
        ("f.read(4)", False),
    ],
)
def test_a_rank_that_fetches_a_result_waits_for_others(line, waits, tmp_path):
    file = tmp_path / "step.py"
    file.write_text(f"{line}\n")
    dump = f'Thread 0x1 (most recent call first):\n  File "{file}", line 1 in step\n'
    assert postmortem.in_collective(postmortem.stacks(dump)) == waits


def test_code_beyond_its_limit_ends_the_process_with_its_stacks():
    code = (
        "import sys, time\nfrom datetime import timedelta\nfrom moelab.engine.launch.process import within\n"
        "with within(timedelta(seconds=60)):\n    pass\n"
        "with within(timedelta(seconds=0.2)):\n    time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    error = postmortem.last_error(done.stderr)
    assert done.returncode == 1 and error.startswith("Timeout (0:00:00") and postmortem.stacks(done.stderr)
    assert postmortem.lost_connection(error)
