"""The process of one run: `python -m moelab.runs.worker RUN_DIRECTORY`.

The same command is a rank's, where torchrun, srun or `moelab.engine.launch` started it as one. A run on several ranks
that is asked for in any other way starts them itself and watches them.

SIGTERM, SIGINT and SIGUSR1 ask it to write a checkpoint and go; it answers after the current step. It also goes when
its parent dies, so no run outlives the notebook that asked for it unseen.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from moelab.engine.launch import process
from moelab.engine.launch.launcher import RankFailed
from moelab.engine.launch.process import FAILED, FINISHED, STOPPED
from moelab.runs.execute import execute
from moelab.runs.store import Run
from moelab.runs.supervisor import supervise

if TYPE_CHECKING:
    from moelab.training.loop import Progress


def main(path: Path) -> int:
    """Execute the run in a directory; return the process's exit code."""
    process.show_stacks_when_asked()
    asked = process.told_by(signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)

    def should_stop() -> bool:
        return asked() or process.launcher_gone()

    try:
        run = Run.at(path)
        if run.spec.parallel.ranks > 1 and process.find() is None:
            return supervise(run, should_stop=should_stop)
    except (RankFailed, OSError, ValueError) as error:
        print(error, file=sys.stderr)  # the details are in the run's log
        return FAILED

    from moelab.training.loop import TrainingStopped

    try:
        execute(run, should_stop=should_stop, on_progress=_print)
    except (TrainingStopped, KeyboardInterrupt) as stop:
        print(stop, file=sys.stderr)
        return STOPPED
    except Exception:
        traceback.print_exc()
        return FAILED
    return FINISHED


def _print(p: Progress) -> None:
    """Print a line of the run's log; flushed, so that the log of a killed run ends with its last step."""
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    print(f"[{now}] step {p.step} of {p.steps}  loss {p.loss:.4f}  {p.tokens_per_s:,.0f} tokens/s", flush=True)


if __name__ == "__main__":
    process.keep_freed_memory()
    code = main(Path(sys.argv[1]))
    if code == FAILED and process.find() is not None:
        # The process group is still there, and its threads may abort or wait for ranks that are gone.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
