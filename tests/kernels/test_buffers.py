"""Pooled memory: reused only when free, bounded by what was once in use."""

import threading

import pytest
import torch
from moelab.kernels._cpu import buffers

MIB = 1 << 20


@pytest.fixture(autouse=True)
def pool():
    """The pool, without buffers of earlier tests."""
    buffers.release()
    yield buffers._pool
    buffers.release()


def test_buffers_are_reused_only_when_free():
    a = buffers.empty((1 << 20,), torch.bfloat16)
    assert a.data_ptr() % 64 == 0 and a.shape == (1 << 20,) and a.dtype == torch.bfloat16
    address, part = a.data_ptr(), a[5:9]
    b = buffers.empty((1 << 20,), torch.bfloat16)
    assert b.data_ptr() != address
    del a
    assert buffers.empty((1 << 20,), torch.bfloat16).data_ptr() != address  # a view keeps it
    del part
    assert buffers.empty((1 << 19,), torch.float32).data_ptr() == address
    del b
    assert buffers.release() > 0


def test_sizes_that_vary_stay_within_what_was_in_use(pool):
    torch.manual_seed(0)
    most = 0
    for rows in torch.randint(2048, 16384, (60,)).tolist():
        held = [buffers.empty((rows, 256), torch.float32) for _ in range(4)]
        most = max(most, sum(t.nbytes for t in held))
        pool.collect()
        assert pool.used_bytes + pool.free_bytes <= 2 * most
        del held
    pool.collect()
    assert pool.used_bytes == 0 and 0 < pool.free_bytes <= 2 * most
    assert buffers.release() > 0 and pool.free_bytes == pool.most_bytes == 0


def test_what_does_not_fit_is_given_back(pool):
    small = [buffers.empty((MIB,), torch.uint8) for _ in range(8)]
    del small
    large = buffers.empty((6 * MIB,), torch.uint8)  # small buffers do not serve it
    assert pool.used_bytes == 6 * MIB and pool.free_bytes == 2 * MIB and pool.most_bytes == 8 * MIB
    del large
    for _ in range(3):
        assert buffers.empty((5 * MIB,), torch.uint8).untyped_storage().nbytes() == 6 * MIB  # a larger one does
    pool.collect()
    assert pool.used_bytes == 0 and pool.free_bytes == 8 * MIB


def test_threads_share_the_pool(pool):
    def work():
        for rows in range(1, 40):
            t = buffers.empty((rows, MIB // 4), torch.float32)
            t.fill_(rows)
            assert t.min() == rows

    threads = [threading.Thread(target=work) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    pool.collect()
    assert pool.used_bytes == 0 and sum(len(b) for same in pool.free.values() for b in same) == pool.free_bytes
