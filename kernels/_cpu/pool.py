"""Compute independent parts of a CPU op in parallel, each part on one thread.

PyTorch splits each operation over its threads. For many small operations this is slow: the threads synchronise after
each, and each gets a small piece of a matrix. Here each thread computes whole parts (tasks of experts) with PyTorch's
own threading switched off, so that a part's result is bitwise the same for any number of threads.
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
    """Reset the pool in a forked child, which inherits none of the threads."""
    global _executor, _lock
    _executor, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _enter() -> None:
    """Limit PyTorch's operations in this thread to one thread."""
    default = torch.get_num_threads()
    torch.set_num_threads(1)  # also for threads that start later: a helper thread restores their default
    helper = threading.Thread(target=torch.set_num_threads, args=(default,))
    helper.start()
    helper.join()


def _submit(call: Callable[[], None]) -> Future[None] | None:
    """Submit a call to the pool; return None where no thread can start (at interpreter shutdown)."""
    global _executor
    with _lock:
        if _executor is None:
            _executor = ThreadPoolExecutor(os.cpu_count() or 1, "moelab-kernels", _enter)
        try:
            return _executor.submit(call)
        except RuntimeError:
            return None


def share(work: Callable[[Iterable[T]], None], parts: Sequence[T], threads: int) -> None:
    """Run ``work`` on ``threads`` threads, each with an iterator over the parts that they share, and wait for all.

    A thread that finishes a part takes the next one, in the order given. ``work`` must write its results in place, into
    memory that differs from part to part. It runs without autograd and without the caller's modes and autocast. The
    exception of the first failing thread, in the order in which the threads were started, is raised again.
    """
    left = deque(parts)

    def take() -> Iterator[T]:
        while True:
            try:
                yield left.popleft()
            except IndexError:
                return

    def call() -> None:
        with torch.inference_mode():  # results are the caller's tensors, so none becomes an inference tensor
            try:
                work(take())
            except BaseException:
                left.clear()
                raise

    futures = [f for f in (_submit(call) for _ in range(min(threads, len(parts)))) if f is not None]
    try:
        for future in futures:
            future.result()
    except BaseException:  # also on an interrupt: no thread may write to the buffers afterwards
        left.clear()
        wait(futures)
        raise
    if left:
        work(take())
