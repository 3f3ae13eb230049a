"""Threads that compute a CPU op's independent parts side by side, each part on one thread.

PyTorch splits every single operation over its threads. For many small ones that costs more than it brings: the threads
meet after each, and each gets a sliver of a matrix. Here every thread takes a part (an expert) of its own, with
PyTorch's own threading off in it, so a part's result has the same bits however many threads share the work.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

import torch

T = TypeVar("T")
_lock = threading.Lock()
_executor: ThreadPoolExecutor | None = None


def _forget() -> None:
    """A forked child has none of the threads."""
    global _executor, _lock
    _executor, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _enter() -> None:
    """One thread for this thread's operations. PyTorch makes that the default of threads yet to start, too, so a helper
    thread puts back the number that this one started with."""
    default = torch.get_num_threads()
    torch.set_num_threads(1)
    helper = threading.Thread(target=torch.set_num_threads, args=(default,))
    helper.start()
    helper.join()


def _submit(call: Callable[[], None]) -> Future[None] | None:
    """None where no thread can be had (at the interpreter's end)."""
    global _executor
    with _lock:
        if _executor is None:
            _executor = ThreadPoolExecutor(os.cpu_count() or 1, "moelab-kernels", _enter)
        try:
            return _executor.submit(call)
        except RuntimeError:
            return None


def share(work: Callable[[Iterable[T]], None], parts: Sequence[T], threads: int) -> None:
    """``work(some of the parts)`` on each of ``threads`` threads, which take the next part as they finish one, in the
    order given; the caller waits. Returns when all are done; raises what the first failing one raised.

    ``work`` must write its results in place, into memory that differs from part to part. It runs without autograd and
    without the caller's modes and autocast.
    """
    left = deque(parts)

    def take() -> Iterator[T]:
        while True:
            try:
                yield left.popleft()
            except IndexError:
                return

    def call() -> None:
        with torch.inference_mode():  # the caller's own tensors stay normal ones
            try:
                work(take())
            except BaseException:
                left.clear()
                raise

    futures = [f for f in (_submit(call) for _ in range(min(threads, len(parts)))) if f is not None]
    try:
        for future in futures:
            future.result()
    except BaseException:  # an interrupt as well: the buffers must not be written after this
        left.clear()
        wait(futures)
        raise
    if left:
        work(take())
