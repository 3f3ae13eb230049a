"""The parts of the CPU's experts: where rows are laid, and the activation."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from moelab.kernels._cpu import layout as layouts
from moelab.kernels._cpu.gelu import _BLOCK, Gelu


@settings(max_examples=150, deadline=None)
@given(
    counts=st.lists(st.integers(0, 200), min_size=1, max_size=40),
    spare=st.integers(0, 3),
    width=st.sampled_from([1, 32, 512]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    pad=st.booleans(),
    converts=st.booleans(),
)
@example([20, 1, 1, 1, 0, 1], 0, 32, torch.bfloat16, True, False)  # one busy, others nearly idle
@example([40, 0, 10, 30, 1, 1, 1, 1, 70, 0, 1] * 4, 2, 32, torch.bfloat16, True, True)  # sorted blocks
def test_every_row_has_a_slot_in_a_task_of_its_expert(counts, spare, width, dtype, pad, converts):
    bounds = np.concatenate([[0], np.cumsum(counts)]).tolist()
    layout = layouts.plan(bounds, bounds[-1] + spare, width, 4 * width, dtype, pad, converts)
    owner = np.full(layout.slots, -1)  # the expert that computes a slot
    end = 0
    for task in layout.tasks:
        assert task.start == end < task.end
        slot = task.start
        for e in range(task.first, task.last):
            owner[slot : slot + task.base] = e if layout.order_N is None else layout.order_N[e]
            slot += task.base
        for e, size in zip(task.experts, task.sizes, strict=True):
            owner[slot : slot + size] = e
            slot += size
        assert slot == task.end
        end = slot
    assert end == layout.slots
    expert_R = np.repeat(np.arange(len(counts)), counts)
    slot_R = np.arange(bounds[-1] + spare) if layout.slot_R is None else layout.slot_R
    assert np.array_equal(owner[slot_R[: bounds[-1]]], expert_R)
    if layout.row_P is not None:
        assert np.array_equal(layout.row_P[slot_R[: bounds[-1]]], np.arange(bounds[-1]))
        assert (layout.row_P >= 0).sum() == bounds[-1] and (layout.slot_R[bounds[-1] :] == -1).all()
    if not pad:
        assert layout.row_P is None and layout.slots == bounds[-1]
    if layout.cut:
        assert sum(j - i for _, i, j in layout.groups) == layout.slots
    else:
        owners = [set(owner[t.start : t.end]) for t in layout.tasks]
        assert sum(map(len, owners)) == len(set().union(*owners)), "an expert is the work of one task"
    assert layout.idle == tuple(np.flatnonzero(np.array(counts) == 0))


def test_layouts_follow_shapes():
    def plan(counts, width, dtype):
        return layouts.plan([0, *np.cumsum(counts).tolist()], sum(counts), width, 4 * width, dtype)

    even, uneven = [32] * 128, [20, 44] * 64
    layout = plan(even, 32, torch.float32)
    assert {t.base for t in layout.tasks} == {32}, "narrow experts: batched products"
    assert layout.row_P is None and layout.order_N is None, "slots are rows where none is unused"
    layout = plan(uneven, 32, torch.float32)
    assert all(t.base for t in layout.tasks) and layout.row_P is not None
    assert not any(t.base for t in plan(uneven, 512, torch.float32).tasks), "wide experts: a product each"
    layout = plan([4096] + [0] * 127, 32, torch.float32)
    assert not any(t.base for t in layout.tasks) and layout.cut
    if layouts.onednn(torch.bfloat16):
        sizes = {n for t in plan([500 + 3 * e for e in range(8)], 512, torch.bfloat16).tasks for n in t.sizes}
        assert all(n % 32 == 0 for n in sizes) and len(sizes) <= 3


def test_a_new_routing_brings_few_new_shapes():
    """oneDNN generates code for every new shape of a product: over 50 routings there are few."""
    if not layouts.onednn(torch.bfloat16):
        pytest.skip("needs bfloat16 products by oneDNN")
    rng, shapes = np.random.default_rng(0), set()
    for _ in range(50):
        counts = rng.multinomial(4096, rng.dirichlet(np.full(8, 20.0)))
        layout = layouts.plan([0, *np.cumsum(counts).tolist()], 4096, 512, 2048, torch.bfloat16)
        shapes |= {n for t in layout.tasks for n in t.sizes} | {j - i for _, i, j in layout.groups}
    assert len(shapes) <= 20


def test_sorted_blocks_have_few_shapes_and_little_padding():
    rng, shapes = np.random.default_rng(0), set()
    for _ in range(50):
        counts = rng.multinomial(4096, rng.dirichlet(np.full(128, 3.0)))
        bounds = [0, *np.cumsum(counts).tolist()]
        layout = layouts.plan(bounds, 4096, 32, 128, torch.float32, True, True)
        assert layout.order_N is not None and layout.slots < 1.5 * 4096 and len(layout.tasks) < 40
        shapes |= {(t.last - t.first, t.base) for t in layout.tasks}
    assert len(shapes) <= 40


@pytest.mark.parametrize("approximate", ["tanh", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(0, 3), (7, 13), (3, _BLOCK // 2 + 5)])
def test_gelu(shape, dtype, approximate):
    x = (torch.randn(shape, dtype=torch.float64) * 3).to(dtype)
    if x.numel() > 20:
        x.view(-1)[:6] = torch.tensor([0.0, -0.0, 60.0, -60.0, 1e4, -1e4], dtype=dtype)
    d = torch.randn(shape, dtype=torch.float64).to(dtype)
    leaf = x.double().clone().requires_grad_()
    want = F.gelu(leaf, approximate=approximate)
    want.backward(d.double())
    gelu, out, h = Gelu(dtype, approximate), torch.empty_like(x), torch.empty_like(x)
    gelu.forward(x, out)
    alone, both = d.clone(), d.clone()
    gelu.backward(x, alone, None)
    gelu.backward(x, both, h)
    rtol = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(out.double(), want.detach(), rtol=rtol, atol=rtol)
    torch.testing.assert_close(both.double(), leaf.grad, rtol=rtol, atol=rtol * 4)
    assert torch.equal(out, h) and torch.equal(alone, both)
    if approximate == "tanh":
        slope, again = x.clone(), torch.empty_like(x)
        gelu.forward_with_slope(slope, again)
        assert torch.equal(again, out)
        torch.testing.assert_close((slope * d).double(), leaf.grad, rtol=2 * rtol, atol=rtol * 4)
