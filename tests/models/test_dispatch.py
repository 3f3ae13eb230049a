"""The ways to the experts and back on hand-written arrays, and what a layer does with them."""

import pytest
import torch
from moelab.kernels import gate
from torch.utils._python_dispatch import TorchDispatchMode

from moelab.models.baseline import mask_gate
from moelab.models.dispatch import LocalDispatch

WAYS = [LocalDispatch(), LocalDispatch().baseline(), LocalDispatch().baseline(static_tokens=100)]


@pytest.mark.parametrize("way", WAYS, ids=["local", "einsum", "einsum, static"])
def test_rows_lie_in_expert_order_and_come_back_weighted(way):
    """Three tokens: the second to expert 2, the others to expert 0; expert 1 is empty."""
    logits = torch.tensor([[9.0, 0, 0], [0, 0, 9.0], [9.0, 0, 0]])
    routing = gate(logits, 1)
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    rows, offsets, state = way.dispatch(x, routing)
    groups = [rows[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    assert offsets.dtype == torch.int32 and rows.dtype == x.dtype
    assert torch.equal(groups[0][:2], x[[0, 2]]) and torch.equal(groups[2][0], x[1])
    assert all(not g[n:].any() for g, n in zip(groups, (2, 0, 1), strict=True)), "slots that nobody uses are zeros"
    torch.testing.assert_close(way.combine(rows * 2, state), 2 * x * logits.softmax(1).amax(1)[:, None])


class NoAnswers(TorchDispatchMode):
    """Refuses operations that hand a tensor's values to the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "nonzero", "masked_select", "equal"), func
        return func(*args, **(kwargs or {}))


def test_static_slots_read_nothing_from_the_device():
    x, routing = torch.randn(8, 4), gate(torch.randn(8, 3), 1)
    static, reading = LocalDispatch().baseline(static_tokens=8), LocalDispatch().baseline()
    assert not static.reads_device(8) and static.reads_device(9) and reading.reads_device(1)
    with NoAnswers():
        mask_gate(torch.randn(8, 3), 2, 4, seed=1, normalize=True)
        static(x, routing, lambda rows, offsets: rows)
    with pytest.raises(AssertionError), NoAnswers():
        reading.dispatch(x, routing)
