"""Runs the ops' tests once more in a process in which Triton interprets its kernels on CPU tensors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process is the interpreting one")
def test_interpreted():
    names = [f"test_{name}" for name in ("gating", "permute", "experts", "residual", "contracts", "tuning")]
    files = [str(HERE / f"{name}.py") for name in names]
    command = [sys.executable, "-m", "pytest", "-q", "-rp", "-p", "no:cacheprovider", "--maxfail=5", *files]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=HERE.parents[1], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = {Path(line.split("::")[0]).stem for line in done.stdout.splitlines() if line.startswith("PASSED ")}
    assert passed == set(names)
