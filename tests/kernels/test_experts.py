"""Grouped products and expert networks against the reference: uneven and empty groups, odd sizes, poisoned memory."""

import itertools
import math
import os
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moelab.kernels import ACTIVATIONS, Activation, _experts_triton, tuning
from moelab.kernels._cpu import buffers, pool
from moelab.kernels._cpu import experts as experts_cpu
from moelab.kernels._cpu import layout as layouts
from moelab.kernels._cpu.gelu import Gelu
from moelab.kernels.experts import expert_ffn

CASES = [  # rows per expert, spare rows, K or M, N or F
    ([1], 0, 1, 1),
    ([3, 0, 4], 2, 13, 7),
    ([0, 67, 0, 1], 0, 67, 33),
    ([0, 0, 13], 5, 40, 130),
    ([5, 9, 31, 17], 0, 64, 48),
    ([0, 0], 3, 8, 8),
    ([1, 2] * 16, 0, 16, 20),
]


def make(counts, spare, *dims, dtype, device, activation="gelu_tanh"):
    """(x, offsets, [w, b, …], dy)"""
    E, R = len(counts), sum(counts) + spare
    offsets = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32, device=device)
    layers = []
    for i, (a, b) in enumerate(itertools.pairwise(dims)):
        wide = 2 * b if ACTIVATIONS[activation].gated and i == 0 else b  # gate and up side by side
        layers += [torch.randn(E, a, wide) * a**-0.5, torch.randn(E, wide)]
    tensors = [t.to(device, dtype) for t in (torch.randn(R, dims[0]), *layers, torch.randn(R, dims[-1]))]
    return tensors[0], offsets, tensors[1:-1], tensors[-1]


def run(x, offsets, params, dy, **kwargs):
    leaves = [t.clone().requires_grad_() for t in (x, *params)]
    y = expert_ffn(leaves[0], offsets, *leaves[1:], **kwargs)
    y.backward(dy)
    return [y.detach(), *(t.grad for t in leaves)]


def poison():
    for shape in ((1 << 18,), (1 << 20,)):
        held = [buffers.empty(shape, torch.float32).fill_(float("nan")) for _ in range(3)]
        held += [torch.full(shape, float("nan")) for _ in range(3)]
        del held
    held = [torch.full((n,), float("nan")) for n in (64, 512, 4096, 32768) for _ in range(6)]
    del held


def check(counts, spare, dims, dtype, activation, target):
    backend, device = target
    x, offsets, params, dy = make(counts, spare, *dims, dtype=dtype, device=device, activation=activation)
    poison()
    got = run(x, offsets, params, dy, activation=activation, backend=backend)
    want = run(x, offsets, params, dy, activation=activation, backend="reference")
    tolerance = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for name, a, b in zip(("y", "dx", "dw1", "db1", "dw2", "db2"), got, want, strict=False):
        assert a.dtype == b.dtype == dtype and a.shape == b.shape, name
        scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * scale, msg=lambda m, n=name: f"{n}: {m}")
    assert not got[0][sum(counts) :].any() and not got[1][sum(counts) :].any()  # spare rows: zero out, zero gradient


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("counts,spare,M,F", CASES)
def test_expert_ffn(target, counts, spare, M, F, activation):
    check(counts, spare, (M, F, M), torch.float32, activation, target)


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(target, dtype, activation):
    check([5, 0, 33, 1], 2, (24, 40, 24), dtype, activation, target)


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
        check(counts, spare, (M, F, M), dtype, activation, target)
    assert len(made) == 6 and all(
        programs <= 2 * multiprocessors and config["PERSISTENT"] for (programs,), config in made
    )


def test_the_alignment_of_the_lists_of_tiles_does_not_change(target):
    """A pointer that is aligned for some numbers of rows only would compile the kernels twice."""
    if target[0] != "triton":
        pytest.skip("tiles are Triton's")
    for R in range(16, 16 * 9, 16):
        x, offsets, _, _ = make([R], 0, 8, dtype=torch.float32, device=target[1])
        plan = _experts_triton._plan(x, offsets)
        assert plan.row.storage_offset() % 4 == 0 and len(plan.row) > plan.tiles


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
def test_without_bias(target, activation):
    backend, device = target
    options = {"dtype": torch.float32, "device": device, "activation": activation}
    x, offsets, (w1, _, w2, _), dy = make([4, 0, 7], 0, 10, 12, 10, **options)
    leaves = [[t.clone().requires_grad_() for t in (x, w1, w2)] for _ in range(2)]
    for (a, b, c), name in zip(leaves, (backend, "reference"), strict=True):
        expert_ffn(a, offsets, b, None, c, None, activation=activation, backend=name).backward(dy)
    for a, b in zip(*leaves, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
def test_partial_gradients(target, activation):
    """Frozen inputs and weights get no gradient and do not disturb the others."""
    backend, device = target
    x, offsets, params, dy = make([4, 2], 0, 6, 8, 6, dtype=torch.float32, device=device, activation=activation)
    options = {"activation": activation, "backend": backend}
    full = run(x, offsets, params, dy, **options)
    for free in range(5):
        leaves = [t.clone().requires_grad_(i == free) for i, t in enumerate((x, *params))]
        expert_ffn(leaves[0], offsets, *leaves[1:], **options).backward(dy)
        assert [t.grad is not None for t in leaves] == [i == free for i in range(5)]
        torch.testing.assert_close(leaves[free].grad, full[1 + free])
    with torch.no_grad():
        torch.testing.assert_close(expert_ffn(x, offsets, *params, **options), full[0])


def test_no_rows(target):
    backend, device = target
    x, offsets, params, dy = make([0, 0, 0], 0, 6, 8, 6, dtype=torch.float32, device=device)
    got = run(x, offsets, params, dy, backend=backend)
    assert got[0].shape == (0, 6) and not any(t.any() for t in got[1:])


@settings(max_examples=15, deadline=None)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    spare=st.integers(0, 3),
    M=st.integers(1, 70),
    F=st.integers(1, 70),
    activation=st.sampled_from(list(ACTIVATIONS)),
)
def test_expert_ffn_hypothesis(target, counts, spare, M, F, activation):
    check(counts, spare, (M, F, M), torch.float32, activation, target)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(backend, activation):
    x, offsets, params, _ = make([2, 0, 3], 0, 3, 4, 3, dtype=torch.float64, device="cpu", activation=activation)
    inputs = [t.requires_grad_() for t in (x, *params)]

    def ffn(x, *params):
        return expert_ffn(x, offsets, *params, activation=activation, backend=backend)

    assert torch.autograd.gradcheck(ffn, inputs)


def test_weight_gradient_is_deterministic(target):
    backend, device = target
    args = make([40, 3, 21], 0, 33, 29, 33, dtype=torch.float32, device=device)
    first, second = (run(*args, backend=backend) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


LAYOUTS = {  # how the CPU lays rows out: (slots per expert in the base, rounding by oneDNN, cut into parts; sorted)
    "rows": (0, False, False),
    "rounded": (0, True, False),
    "base": (8, False, False),
    "base, rounded": (16, True, False),
    "all in the base": (160, True, False),
    "cut": (0, False, True),
    "cut, rounded": (0, True, True),
    "sorted": (None, False, False),
    "sorted, rounded": (None, True, False),
}


@pytest.fixture(params=LAYOUTS)
def layout(request, monkeypatch):
    """Force a layout on the CPU's experts, with tasks small enough that there are many."""
    base, rounded, cut = LAYOUTS[request.param]
    ns = 0.0 if base is not None else math.inf  # of blocks that are not sorted
    monkeypatch.setattr(layouts, "_base", lambda *args: layouts._Blocks(ns, base or 0))
    monkeypatch.setattr(layouts, "_LARGEST", 1 << 60)
    monkeypatch.setattr(layouts, "onednn", lambda dtype: rounded)
    for module in (layouts, experts_cpu):
        monkeypatch.setattr(module, "tiles", lambda dtype: rounded)
    monkeypatch.setattr(layouts, "_ELEMENTS", 2048)
    monkeypatch.setattr(layouts, "_ROWS", 24)
    monkeypatch.setattr(layouts, "_CUT", 10**9 if cut else 0)
    monkeypatch.setattr(experts_cpu, "_LARGE", 1000)
    return request.param


@pytest.mark.parametrize("activation", ["none", "gelu_tanh", "swiglu"])
@pytest.mark.parametrize("counts,spare,M,F", [*CASES[1:4], ([0, 150, 0], 1, 13, 7), ([33] * 20, 0, 24, 48)])
def test_every_layout(layout, counts, spare, M, F, activation):
    check(counts, spare, (M, F, M), torch.float32, activation, ("torch", "cpu"))


@pytest.mark.parametrize(
    "counts,spare,M,F", [([5, 0, 33, 1], 2, 24, 40), ([0, 150, 0], 1, 13, 7), ([33] * 20, 0, 24, 48)]
)
@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
def test_every_layout_in_bfloat16(layout, counts, spare, M, F, activation):
    check(counts, spare, (M, F, M), torch.bfloat16, activation, ("torch", "cpu"))


@pytest.mark.parametrize("counts", [[5, 0, 33, 1, 2, 2], [0, 0, 0]])
@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
def test_weights_in_float32_with_rows_in_bfloat16(layout, activation, counts):
    """The same bits as with weights that the caller converts, in the results and in the gradients; also without rows."""
    x, offsets, params, dy = make(counts, 2, 24, 40, 24, dtype=torch.float32, device="cpu")
    if activation == "swiglu":
        params = make(counts, 2, 24, 40, 24, dtype=torch.float32, device="cpu", activation="swiglu")[2]
    x, dy = x.bfloat16(), dy.bfloat16()
    for weights in (params, [params[0], None, params[2], None]):
        found = []
        for convert in (False, True):
            leaves = [None if t is None else t.clone().requires_grad_() for t in (x, *weights)]
            used = [t.bfloat16() if convert and t is not None else t for t in leaves[1:]]
            y = expert_ffn(leaves[0], offsets, *used, activation=activation)
            y.backward(dy)
            found.append([y.detach(), *(t.grad for t in leaves if t is not None)])
        for a, b in zip(*found, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_weights_in_float32_with_half_rows(backend, dtype):
    x, offsets, params, dy = make([5, 0, 33, 1], 2, 24, 40, 24, dtype=torch.float32, device="cpu")
    x, dy = x.to(dtype), dy.to(dtype)
    want = run(x, offsets, [t.to(dtype) for t in params], dy, backend=backend)
    got = run(x, offsets, params, dy, backend=backend)
    assert [t.dtype for t in got] == [dtype] * 2 + [torch.float32] * 4
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=1e-2, atol=2e-2)


def test_unused_slots_change_nothing(layout):
    """An expert without rows whose weights are not finite: no gradient of its own, no effect on others."""
    x, offsets, params, dy = make([5, 0, 33, 1], 2, 24, 40, 24, dtype=torch.float32, device="cpu")
    want = run(x, offsets, params, dy, backend="reference")
    for t in params:
        t[1] = float("nan")
    got = run(x, offsets, params, dy, backend="torch")
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=1e-4)
    assert all(not t[1].any() for t in got[2:])


@pytest.fixture
def shared(monkeypatch):
    """Two threads, and the calls of the pool counted."""
    calls, share, before = [], pool.share, torch.get_num_threads()
    monkeypatch.setattr(pool, "share", lambda *args: (calls.append(1), share(*args)))
    torch.set_num_threads(2)
    yield calls
    torch.set_num_threads(before)


def many(dtype=torch.float32, activation="gelu_tanh"):
    counts = [80, 0, 3, 150, 97, 0, 128, 64] * 4
    return make(counts, 3, 64, 256, 64, dtype=dtype, device="cpu", activation=activation)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_threads_do_not_change_the_bits(shared, layout, activation, dtype):
    x, offsets, params, dy = many(dtype, activation)
    found, regions = [], 3 if "cut" in layout else 2
    for threads, calls in ((1, 0), (2, regions), (2, regions)):
        torch.set_num_threads(threads)
        poison()
        shared.clear()
        found.append(run(x, offsets, params, dy, activation=activation, backend="torch"))
        assert torch.get_num_threads() == threads and len(shared) == calls
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("counts", [[700, 300], [0, 4000, 0, 0], [37] * 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_the_bits_of_real_layouts(shared, counts, dtype):
    args = make(counts, 0, 48, 192, 48, dtype=dtype, device="cpu")
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(run(*args, backend="torch"))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and shared


def test_threads_leave_no_trace(shared):
    x, offsets, params, dy = many()
    run(x, offsets, params, dy, backend="torch")
    seen = []
    newcomer = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    newcomer.start()
    newcomer.join()
    assert seen == [2] == [torch.get_num_threads()]
    for _ in range(20):
        expert_ffn(x, offsets, *params, backend="torch")
    assert sum(t.name.startswith("moelab-kernels") for t in threading.enumerate()) <= os.cpu_count()
    with torch.inference_mode():
        assert expert_ffn(x, offsets, *params, backend="torch").is_inference()
    with torch.no_grad():
        y = expert_ffn(x, offsets, *params, backend="torch")
    assert not y.is_inference() and (y.requires_grad_() * y).sum().requires_grad


def test_without_gradients_no_pre_activation_is_kept():
    x, offsets, params, _ = make([512, 512], 0, 16, 4096, 16, dtype=torch.float32, device="cpu")
    leaves = [t.requires_grad_() for t in params]
    buffers.release()
    kept = []
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            y = expert_ffn(x, offsets, *leaves, backend="torch")
        buffers._pool.collect()
        kept.append(buffers._pool.used_bytes)
        del y
    assert kept[0] == 0 and kept[1] == 2 * 1024 * 4096 * 4  # the activation and its slope


def test_an_exception_in_a_thread_propagates(shared, monkeypatch):
    x, offsets, params, dy = many()
    want = run(x, offsets, params, dy, backend="torch")

    def fail(*args, **kwargs):
        raise ArithmeticError("from the thread")

    with monkeypatch.context() as patch:
        patch.setattr(Gelu, "forward", fail)
        with pytest.raises(ArithmeticError, match="from the thread"):
            expert_ffn(x, offsets, *params, backend="torch")
    leaf = x.clone().requires_grad_()
    y = expert_ffn(leaf, offsets, *params, backend="torch", activation="gelu")
    with monkeypatch.context() as patch:
        patch.setattr(Gelu, "backward", fail)
        with pytest.raises(ArithmeticError, match="from the thread"):
            y.backward(dy)
    got = run(x, offsets, params, dy, backend="torch")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_flop_counter_sees_all(shared):
    from torch.utils.flop_counter import FlopCounterMode

    x, offsets, params, _ = many()
    with FlopCounterMode(display=False) as counter:
        expert_ffn(x, offsets, *params, backend="torch")
    assert counter.get_total_flops() == int(offsets[-1]) * 2 * 2 * 64 * 256 and not shared


@pytest.mark.multiprocess
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_starts_threads_of_its_own():
    found = []
    pool.share(found.extend, range(10), 2)
    assert sorted(found) == list(range(10))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            found.clear()
            pool.share(found.extend, range(10), 2)
            code = int(sorted(found) != list(range(10)))
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    "change,message",
    [
        (dict(activation="relu"), "unknown activation"),
        (dict(w1=torch.zeros(2, 3, 4)), "rows of width 5"),
        (dict(w2=torch.zeros(2, 5, 5)), "rows of width 4"),
        (dict(b1=torch.zeros(2, 5)), "bias"),
        (dict(w1=torch.zeros(2, 5, 4, dtype=torch.bfloat16)), "one dtype for all"),
        (dict(offsets=torch.zeros(3)), "offsets must be int32"),
        (dict(offsets=torch.zeros(1, 3, dtype=torch.int32)), "offsets must be int32"),
    ],
)
def test_clear_errors(change, message):
    a = (
        dict(w1=torch.zeros(2, 5, 4), b1=torch.zeros(2, 4), w2=torch.zeros(2, 4, 5), b2=None, activation="gelu")
        | change
    )
    offsets = a.pop("offsets", torch.tensor([0, 2, 6]))
    with pytest.raises(ValueError, match=message):
        expert_ffn(torch.zeros(6, 5), offsets, a["w1"], a["b1"], a["w2"], a["b2"], activation=a["activation"])


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
    for counts, spare, M, F in CASES[1:4]:
        check(counts, spare, (M, F, M), dtype, new.name, target)


SLOPES = pytest.mark.parametrize("activation", [*ACTIVATIONS.values(), *NEW], ids=lambda a: a.name)


@SLOPES
@pytest.mark.parametrize("shape", [(6,), (5, 26), (2, 3, 64), (0, 4)])
def test_slopes_are_the_derivatives(activation, shape):
    p = (3 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    h = activation.forward(p)
    assert h.shape == (*shape[:-1], shape[-1] // 2 if activation.gated else shape[-1])
    d = torch.randn_like(h)
    (want,) = torch.autograd.grad(h, p, d)
    torch.testing.assert_close(activation.backward(p.detach(), d), want)
    assert activation.slope(p.detach()).shape == p.shape and torch.autograd.gradcheck(activation.forward, p)


@SLOPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_slopes_keep_the_dtype_and_are_finite(activation, dtype):
    p = torch.tensor([0.0, -0.0, 1e-30, -30.0, 30.0, 1e4, -1e4, -1e-30], dtype=dtype)
    for found in (activation.forward(p), activation.slope(p)):
        assert found.dtype == dtype and found.isfinite().all()


def test_names_and_numbers_are_those_of_one_entry():
    assert all(name == activation.name for name, activation in ACTIVATIONS.items())
    numbers = [activation.number for activation in ACTIVATIONS.values() if activation.number is not None]
    assert sorted(numbers) == list(range(len(numbers)))
