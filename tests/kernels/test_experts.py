"""The experts against the reference: uneven and empty groups, odd sizes, poisoned memory; the table of activations."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from moelab.kernels import ACTIVATIONS, Activation, _cpp, _experts_triton, activate, expert_ffn, experts, tuning
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.helpers import (
    INTERPRETING,
    TOLERANCE,
    assert_same_bits,
    assert_same_bits_on_any_number_of_threads,
    compare,
    poison,
    refused,
)

NAMES = ("y", "dx", "dw1", "db1", "dw2", "db2")
ODD = [  # rows per expert, spare rows, M, F
    ([1], 0, 1, 1),
    ([3, 0, 4], 2, 13, 7),
    ([0, 67, 0, 1], 0, 67, 33),
    ([0, 0, 13], 5, 40, 130),
    ([0, 0], 3, 8, 8),
    ([1, 2] * (5 if INTERPRETING else 16), 0, 16, 20),  # more tiles than stand beside each other
]
MULTIPLES = [  # of 16, which the C++ takes
    ([1], 0, 16, 16),
    ([0, 0], 3, 16, 32),
    ([0, 0, 0], 0, 16, 32),
    ([3, 0, 4, 0], 2, 32, 48),
    ([5, 9, 31, 17], 0, 64, 48),
]
LARGE = [
    ([7, 64, 1, 65, 128, 129], 0, 32, 128),  # about the rows of a product
    ([0, 600, 0, 9], 1, 80, 1072),  # more than a task has rows and columns, and panels of fewer than 64 columns
    ([1, 2] * 64, 0, 64, 256),
    ([9, 2], 0, 1040, 64),  # longer rows than one product takes, and rows far apart
]
CASES = [*ODD, *MULTIPLES, *([] if INTERPRETING else LARGE)]


def make(counts, spare, M, F, dtype=torch.float32, device="cpu", activation="gelu_tanh", weights=None):
    """(x, offsets, [w1, b1, w2, b2], dy), weights in a dtype of their own"""
    E, R = len(counts), sum(counts) + spare
    offsets = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32, device=device)
    N = 2 * F if ACTIVATIONS[activation].gated else F  # gate and up side by side
    params = [torch.randn(E, M, N) * M**-0.5, torch.randn(E, N), torch.randn(E, F, M) * F**-0.5, torch.randn(E, M)]
    x, dy = torch.randn(2, R, M).to(device, dtype)
    return x, offsets, [t.to(device, weights or dtype) for t in params], dy


def run(x, offsets, params, dy, **kwargs):
    leaves = [None if t is None else t.clone().requires_grad_() for t in (x, *params)]
    y = expert_ffn(leaves[0], offsets, *leaves[1:], **kwargs)
    y.backward(dy)
    return [y.detach(), *(t.grad for t in leaves if t is not None)]


def check(counts, spare, M, F, dtype, activation, target, weights=None):
    """Outputs and gradients, those of float32 with rows and weights of a half's values; "cpp" refuses what "auto" takes."""
    backend, device, _ = target
    x, offsets, params, dy = make(counts, spare, M, F, dtype, device, activation, weights)
    fits = experts._fits(x, params[2], ACTIVATIONS[activation].gated) and ACTIVATIONS[activation].number is not None
    if backend == "cpp" and not fits:
        with refused():
            expert_ffn(x, offsets, *params, activation=activation, backend="cpp")
        backend = "auto"
    poison()
    got = run(x, offsets, params, dy, activation=activation, backend=backend)
    rounded = [p.to(dtype).float() for p in params]
    want = run(x.float(), offsets, rounded, dy.float(), activation=activation, backend="reference")
    assert [t.dtype for t in got] == [dtype] * 2 + [weights or dtype] * 4
    compare(NAMES, [t.float() for t in got], want, TOLERANCE[dtype])
    assert not got[0][sum(counts) :].any() and not got[1][sum(counts) :].any()  # spare rows: zero out, zero gradient


def each(cases):
    """Every case with an activation without and one with gates; the last case with all, which act number by number."""
    return [(*case, name) for case in cases for name in (ACTIVATIONS if case is cases[-1] else ("gelu_tanh", "swiglu"))]


@pytest.mark.parametrize("counts,spare,M,F,activation", each(CASES))
def test_float32(target, counts, spare, M, F, activation):
    check(counts, spare, M, F, torch.float32, activation, target)


HALVES = [([5, 0, 33, 1], 2, 24, 40), *CASES[len(ODD) :]]


@pytest.mark.slow
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts,spare,M,F,activation", each(HALVES))
def test_bfloat16(target, counts, spare, M, F, activation, weights):
    if INTERPRETING and (activation not in ("gelu_tanh", "swiglu") or weights == torch.float32):
        pytest.skip("slow there")
    check(counts, spare, M, F, torch.bfloat16, activation, target, weights)


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
@pytest.mark.parametrize("counts,spare,M,F", [HALVES[0], MULTIPLES[2]])
def test_float16(target, counts, spare, M, F, activation):
    check(counts, spare, M, F, torch.float16, activation, target)
    check(counts, spare, M, F, torch.float16, activation, target, torch.float32)


@settings(max_examples=10, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40 if INTERPRETING else 90), min_size=1, max_size=6),
    spare=st.integers(0, 3),
    M=st.integers(1, 70) | st.sampled_from([16, 48, 64]),
    F=st.integers(1, 70) | st.sampled_from([32, 96]),
    activation=st.sampled_from(list(ACTIVATIONS)),
)
def test_any_sizes(target, counts, spare, M, F, activation):
    check(counts, spare, M, F, torch.float32, activation, target)


@pytest.mark.parametrize("activation", ["none", "gelu_tanh", "swiglu"])
def test_missing_biases_and_frozen_tensors(target, activation):
    """Frozen inputs and weights get no gradient and do not disturb the others; each bias may be missing."""
    backend, device, _ = target
    x, offsets, params, dy = make([4, 0, 20], 1, 16, 32, device=device, activation=activation)
    options = {"activation": activation, "backend": backend}
    full = run(x, offsets, params, dy, **options)
    for free in range(5):
        leaves = [t.clone().requires_grad_(i == free) for i, t in enumerate((x, *params))]
        expert_ffn(leaves[0], offsets, *leaves[1:], **options).backward(dy)
        assert [t.grad is not None for t in leaves] == [i == free for i in range(5)]
        torch.testing.assert_close(leaves[free].grad, full[1 + free])
    with torch.no_grad():
        torch.testing.assert_close(expert_ffn(x, offsets, *params, **options), full[0])
    for without in ((1, 3), (1,), (3,)):
        some, dy = (
            [None if i in without else t for i, t in enumerate(params)],
            torch.ones_like(dy[:1, :1]).expand_as(dy),
        )
        got, want = (run(x, offsets, some, dy, activation=activation, backend=b) for b in (backend, "reference"))
        compare(range(len(got)), got, want, 2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
def test_the_same_bits_on_any_number_of_threads(instructions, dtype, activation):
    """With rows of one expert in several tasks, and inner columns of one in several."""
    args = make([600, 0, 31, 7], 1, 64, 640, dtype, activation=activation)
    assert_same_bits_on_any_number_of_threads(lambda: run(*args, activation=activation, backend="cpp"))


def test_pytorchs_own_products_are_the_same_beside_ours(instructions):
    """Both may use AMX, whose registers have a set-up of their own in each thread."""
    args = make([40, 0, 31, 7], 1, 64, 96, torch.bfloat16)
    a, b = torch.randn(2, 96, 96, dtype=torch.bfloat16)
    theirs = a @ b  # before any of ours
    ours = run(*args, backend="cpp")
    for _ in range(3):
        assert torch.equal(a @ b, theirs)
        assert_same_bits(run(*args, backend="cpp"), ours)


def test_weight_gradients_have_the_same_bits_twice(target):
    backend, device, _ = target
    args = make([40, 3, 21], 0, 48, 32, device=device)
    assert_same_bits(*(run(*args, backend=backend) for _ in range(2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_with_its_expert(target, dtype):
    """Rows and output gradients of one expert; and weights of one that has no rows."""
    backend, device, _ = target
    x, offsets, params, dy = make([5, 6, 0, 3], 0, 32, 64, dtype, device)
    clean = run(x, offsets, params, dy, backend=backend)
    x[5:11], dy[5:11] = math.nan, math.inf
    for t in params:
        t[2] = math.nan
    got = run(x, offsets, params, dy, backend=backend)
    for name, a, b in zip(NAMES, got, clean, strict=True):
        rows = name in ("y", "dx")
        assert torch.equal(*(t[[*range(5), *range(11, 14)] if rows else [0, 3]] for t in (a, b))), name
        assert not a[6 if rows else 1].isfinite().all() and (rows or not a[2].any()), name


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "swiglu"])
def test_activations_and_slopes_are_exact_to_float32(instructions, activation):
    x = torch.cat([torch.linspace(-30, 30, 64000), torch.tensor([-1e9, -300.0, -0.0, 0.0, 1e-30, 300.0, 1e9])])
    up = [torch.ones_like(x)] if ACTIVATIONS[activation].gated else []
    leaf = torch.cat([x, *up]).requires_grad_()
    y = activate(leaf, activation, backend="cpp")
    (slope,) = torch.autograd.grad(y.sum(), leaf)
    wide = x.double().requires_grad_()
    function = {"gelu": F.gelu, "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"), "swiglu": F.silu}[activation]
    want = function(wide)
    (want_slope,) = torch.autograd.grad(want.sum(), wide)
    torch.testing.assert_close(y.double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(slope[: len(x)].double(), want_slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    x, offsets, params, _ = make([2, 0, 3], 0, 4, 6, torch.float64, activation=activation)
    inputs = [t.requires_grad_() for t in (x, *params)]

    def ffn(x, *params):
        return expert_ffn(x, offsets, *params, activation=activation)

    assert torch.autograd.gradcheck(ffn, inputs)


def test_offsets_are_checked(instructions):
    x, offsets, params, _ = make([3, 5], 0, 16, 32)
    wide, strided = offsets.long(), torch.stack([offsets, offsets * 0 + 7], 1)[:, 0]
    same = [expert_ffn(x, o, *params, backend="cpp") for o in (offsets, wide, strided)]
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
    for wrong, name in itertools.product(([0, 3, 9], [0, 5, 3], [1, 3, 8]), (instructions, "none")):
        with _cpp.limited(name), pytest.raises(RuntimeError, match="offsets must rise from 0 to at most 8"):
            expert_ffn(x, torch.tensor(wrong, dtype=torch.int32), *params)
        with pytest.raises(RuntimeError, match="offsets must rise from 0 to at most 8"):
            expert_ffn(x, torch.tensor(wrong, dtype=torch.int32), *params, backend="reference")


def test_offsets_may_not_change_before_the_backward_pass(target):
    """As a buffer that the next step writes; the reference has read them."""
    if target[0] == "auto":
        pytest.skip("the reference keeps numbers, not the tensor")
    x, offsets, params, _ = make([3, 5], 0, 16, 32, device=target[1])
    y = expert_ffn(x, offsets, params[0].requires_grad_(), *params[1:], backend=target[0])
    offsets[1] = 6
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_large_and_empty_experts_are_left_to_the_reference():
    assert experts._fits(torch.zeros(1, 16), torch.empty(1, 64, 16), False)
    assert not experts._fits(torch.zeros(1, 16), torch.empty(1, 1 << 20, 16, device="meta"), False)
    empty = [torch.ones(1, 16, 0), None, torch.ones(1, 0, 16), torch.full((1, 16), 2.0)]
    assert expert_ffn(torch.ones(3, 16), torch.tensor([0, 3]), *empty).eq(2).all(), "the bias alone"


def test_a_counter_of_operations_sees_the_products(target):
    if target[0] == "triton":
        pytest.skip("on a CPU")
    x, offsets, params, _ = make([3, 5], 0, 16, 32)
    with FlopCounterMode(display=False) as counter:
        expert_ffn(x, offsets, *params)
    assert counter.get_total_flops() == 8 * 2 * 2 * 16 * 32


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match=r"^activate: unknown activation 'relu'; know none, gelu,"):
        activate(torch.zeros(2), "relu")


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(activation="relu"), "unknown activation"),
        (dict(w1=torch.zeros(2, 3, 4)), "rows of width 5"),
        (dict(w2=torch.zeros(2, 5, 5)), "rows of width 4"),
        (dict(w2=torch.zeros(2, 4, 8)), r"second weights \(2, 4, 8\) for rows of width 5"),
        (dict(b1=torch.zeros(2, 5)), "bias"),
        (dict(w1=torch.zeros(2, 5, 4, dtype=torch.bfloat16)), "one dtype for all"),
        (dict(offsets=torch.zeros(3)), "offsets must be int32"),
        (dict(offsets=torch.zeros(1, 3, dtype=torch.int32)), "offsets must be int32"),
        (dict(w1=torch.zeros(2, 5, 3), b1=None, activation="swiglu"), "3 columns must be even"),
    ],
)
def test_clear_errors(change, message):
    a = dict(w1=torch.zeros(2, 5, 4), b1=torch.zeros(2, 4), w2=torch.zeros(2, 4, 5), b2=None, activation="gelu")
    a |= change
    offsets = a.pop("offsets", torch.tensor([0, 2, 6]))
    with pytest.raises(ValueError, match=message):
        expert_ffn(torch.zeros(6, 5), offsets, a["w1"], a["b1"], a["w2"], a["b2"], activation=a["activation"])


# -- Triton's programs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "counts,spare,M,F,dtype,activation",
    [
        ([3, 0, 4], 2, 13, 7, torch.float32, "gelu"),
        ([0, 67, 0, 1], 0, 67, 33, torch.float32, "swiglu"),
        ([0, 0, 70], 21, 40, 130, torch.float32, "gelu_tanh"),
        ([0, 0], 3, 8, 8, torch.float32, "none"),
        ([5, 0, 33, 1], 2, 24, 40, torch.bfloat16, "gelu_tanh"),
    ],
)
@pytest.mark.parametrize("multiprocessors", [1, 50], ids=["few programs", "many programs"])
def test_persistent(target, monkeypatch, multiprocessors, counts, spare, M, F, dtype, activation):
    """Two programs for all places, and more programs than places."""
    if target[0] != "triton":
        pytest.skip("persistent programs are Triton's")
    made, grid = [], _experts_triton._grid
    monkeypatch.setattr(_experts_triton, "multiprocessors", lambda device: multiprocessors)
    monkeypatch.setattr(_experts_triton, "_grid", lambda *args: made.append(grid(*args)) or made[-1])
    with tuning.persistent(2):
        check(counts, spare, M, F, dtype, activation, target)
    assert len(made) == 6 and all(
        programs <= 2 * multiprocessors and config["PERSISTENT"] for (programs,), config in made
    )


def test_the_alignment_of_the_lists_of_tiles_does_not_change(target):
    """A pointer that is aligned for some numbers of rows only would compile the kernels twice."""
    if target[0] != "triton":
        pytest.skip("tiles are Triton's")
    for R in range(16, 16 * 9, 16):
        x, offsets, _, _ = make([R], 0, 8, 8, device=target[1])
        plan = _experts_triton._plan(x, offsets)
        assert plan.row.storage_offset() % 4 == 0 and len(plan.row) > plan.tiles


# -- the table of activations ------------------------------------------------------------------------------------------

NEW = [
    Activation("relu2", lambda p: p.relu().square(), lambda p: 2 * p.relu()),
    Activation(
        "bilinear",
        lambda p: p.chunk(2, -1)[0] * p.chunk(2, -1)[1],
        lambda p: torch.cat(p.chunk(2, -1)[::-1], -1),
        gated=True,
    ),
]


@pytest.mark.parametrize("new", NEW, ids=lambda a: a.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_activation_of_the_table_alone_is_computed_everywhere(target, dtype, new, monkeypatch):
    monkeypatch.setitem(ACTIVATIONS, new.name, new)
    for case in (*ODD[1:3], MULTIPLES[2]):
        check(*case, dtype, new.name, target)


EVERY_ACTIVATION = pytest.mark.parametrize("activation", [*ACTIVATIONS.values(), *NEW], ids=lambda a: a.name)


@EVERY_ACTIVATION
@pytest.mark.parametrize("shape", [(6,), (5, 26), (2, 3, 64), (0, 4)])
def test_slopes_are_the_derivatives(activation, shape):
    p = (3 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    h = activation.forward(p)
    assert h.shape == (*shape[:-1], shape[-1] // 2 if activation.gated else shape[-1])
    d = torch.randn_like(h)
    (want,) = torch.autograd.grad(h, p, d)
    torch.testing.assert_close(activation.backward(p.detach(), d), want)
    assert activation.slope(p.detach()).shape == p.shape and torch.autograd.gradcheck(activation.forward, p)


@EVERY_ACTIVATION
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_slopes_keep_the_dtype_and_are_finite(activation, dtype):
    p = torch.tensor([0.0, -0.0, 1e-30, -30.0, 30.0, 1e4, -1e4, -1e-30], dtype=dtype)
    for found in (activation.forward(p), activation.slope(p)):
        assert found.dtype == dtype and found.isfinite().all()


@EVERY_ACTIVATION
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_activate(target, activation, dtype, monkeypatch):
    """Values and gradients of any shape and strides, and not finite ones, against double precision."""
    monkeypatch.setitem(ACTIVATIONS, activation.name, activation)
    backend, device, _ = target
    known = dtype != torch.float16 and activation.number is not None
    if backend == "cpp" and not known and activation.name != "none":
        with refused():
            activate(torch.zeros(2, dtype=dtype), activation.name, backend="cpp")
        backend = "auto"
    for shape in ((0, 4), (6,), (5, 26), (2, 7, 66), (300, 128)):
        x = (3 * torch.randn(shape)).to(device, dtype)
        if len(shape) > 1 and len(x):
            x[0, 0], x[-1, 1] = math.nan, -math.inf
        leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
        poison()
        y, want = activate(leaf, activation.name, backend=backend), activation.forward(wide)
        d = torch.linspace(-1, 1, y.numel(), device=device).view(y.shape).to(dtype)
        y.backward(d)
        want.backward(d.double())
        for a, b in ((y, want), (leaf.grad, wide.grad)):
            assert a.dtype == dtype and a.shape == b.shape
            tolerance = 2e-6 if dtype == torch.float32 else TOLERANCE[dtype]
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance, equal_nan=True)
        apart = torch.stack([x, x], -1)[..., 0]
        exact = 0 if backend == "cpp" else TOLERANCE[dtype]  # PyTorch has other code for what is not contiguous
        again = activate(apart, activation.name, backend=backend)
        torch.testing.assert_close(again, y, rtol=exact, atol=exact, equal_nan=True)


def test_activate_takes_one_number(target):
    for name in ("gelu", "gelu_tanh"):
        one = activate(torch.tensor(0.5, device=target[1]), name)
        torch.testing.assert_close(one, activate(torch.full((3,), 0.5, device=target[1]), name)[1])


def test_activate_has_the_same_bits_on_any_number_of_threads(instructions):
    x = torch.randn(1001, 82)
    assert_same_bits_on_any_number_of_threads(lambda: [activate(x, name, backend="cpp") for name in ACTIVATIONS])


def test_numbers_are_those_of_one_entry():
    numbers = [activation.number for activation in ACTIVATIONS.values() if activation.number is not None]
    assert sorted(numbers) == list(range(len(numbers)))
