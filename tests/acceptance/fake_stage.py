"""A stage for tests: what a case may do."""

import os
import signal
import time

from moelab.acceptance.cases import Case


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def lost():
    raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore text")


def fail():
    raise ValueError("expert 3 is not 4\nsecond line")


def cases(context):
    folder = context.setup.out
    if (folder / "slow").exists():
        yield from slow(context)
        return
    (folder / "starts").open("a").write("x")
    yield Case("good", lambda: {"candidate": "a", "finding": "fine"})
    yield Case("absent", lambda: {}, needs=("no_such_package",))
    yield Case("fails", fail if not (folder / "mended").exists() else lambda: [{"x": 1}, {"x": 2}])
    yield Case("loses the device", lost)
    yield Case("dies", die)
    yield Case("after", lambda: {})


def slow(context):
    yield Case("slow", lambda: time.sleep(600))
    yield Case("never", lambda: {})
