"""What holds for every op: any strides, any mix of backends, PyTorch's modes and defaults."""

import contextlib
import os
import sys
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from moelab.kernels import (
    Gate,
    RowTable,
    _common,
    combine,
    dispatch,
    expert_ffn,
    experts,
    gate,
    gating,
    permute,
    residual,
    residual_mix,
    row_table,
)
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.helpers import assert_same_bits, refused

S, E, K, M = 67, 5, 2, 13
WIDTH, F = 16, 32  # of the experts, multiples of 16 for the C++


def strided(t):
    """The same values with neither of the last two dims contiguous, for vectors every second element."""
    if t.dim() < 2:
        return torch.stack([t, torch.zeros_like(t)], 1)[:, 0]
    wide = torch.stack([t.mT, torch.zeros_like(t.mT)], -1)
    return wide[..., 0].mT


def ops(backend, device):
    """Each op as (function of its tensors, tensors); the function returns what is differentiated."""
    g = Gate(*(t.detach() for t in gate(torch.randn(S, E, device=device), K, 30, seed=1, backend=backend)))
    table = row_table(g, backend=backend)
    R = len(table.entry_R)
    random = dict(device=device)
    ffn = [torch.randn(*s, **random) for s in ((R, WIDTH), (E, WIDTH, F), (E, F), (E, F, WIDTH), (E, WIDTH))]
    mix = [torch.randn(*s, **random) for s in ((S, M), (S, M), (S, M), (2, M), (2,))]

    def gated(logits, choice):
        got = gate(logits, K, 30, seed=3, choice_logits_SE=choice, backend=backend)
        return (got.weight_SK * torch.arange(K, device=device)).sum(1) + got.aux_loss + got.z_loss

    def tabled(expert, slot, kept):
        return torch.cat(
            [t.flatten() for t in row_table(Gate(expert, slot, None, None, kept, None, None), backend=backend)]
        )

    def dispatched(x, row, entry):
        return dispatch(x, RowTable(row, entry, None), backend=backend)

    def combined(rows, weight, row, entry):
        return combine(rows, RowTable(row, entry, None), weight, backend=backend)

    return dict(
        gate=(gated, [torch.randn(S, E, **random), torch.randn(S, E, **random)]),
        row_table=(tabled, [g.expert_SK, g.slot_SK, g.kept_E]),
        dispatch=(dispatched, [torch.randn(S, M, **random), table.row_SK, table.entry_R]),
        combine=(combined, [torch.randn(R, M, **random), g.weight_SK, table.row_SK, table.entry_R]),
        expert_ffn=(partial(expert_ffn, backend=backend), [ffn[0], table.offsets_E1, *ffn[1:]]),
        residual=(partial(residual_mix, backend=backend), mix),
    )


OPS = ["gate", "row_table", "dispatch", "combine", "expert_ffn", "residual"]
DIFFERENTIABLE = [op for op in OPS if op != "row_table"]


def results(function, tensors):
    """Outputs and gradients of the floating-point inputs that have one."""
    leaves = [t.detach().requires_grad_() if t.is_floating_point() else t for t in tensors]
    y = function(*leaves)
    if y.requires_grad:
        y.backward(strided(torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view(y.shape)))
    return [y.detach(), *(t.grad for t in leaves if t.grad is not None)]


@pytest.mark.parametrize("op", OPS)
def test_strided_tensors(target, op):
    """Outputs and gradients are those of contiguous tensors."""
    function, tensors = ops(*target[:2])[op]
    apart = [strided(t) for t in tensors]
    assert all(torch.equal(a, b) and not a.is_contiguous() for a, b in zip(apart, tensors, strict=True))
    want, got = results(function, tensors), results(function, apart)
    assert len(want) == len(got) > (op in DIFFERENTIABLE)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("first,second", [("reference", None), (None, "reference")])
def test_backends_mix(target, first, second):
    """What one backend's gate and table return, another's table, dispatch and combine take."""
    backend, device, _ = target
    first, second = first or backend, second or backend
    logits, x = torch.randn(S, E, device=device), torch.randn(S, M, device=device)
    found = []
    for a, b in ((first, second), ("reference", "reference")):
        leaves = [t.clone().requires_grad_() for t in (logits, x)]
        g = gate(leaves[0], K, 20, seed=1, normalize=True, backend=a)
        assert all(t.is_contiguous() for t in g)
        table = row_table(g, rows=S * K, backend=b)
        y = combine(dispatch(leaves[1], table, backend=b), table, g.weight_SK, backend=b)
        y.square().sum().backward()
        found.append([*table, y.detach(), *(t.grad for t in leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
def test_second_derivatives_raise(target, op):
    if target[0] == "auto":
        pytest.skip("plain PyTorch has them")
    function, tensors = ops(*target[:2])[op]
    leaves = [t.requires_grad_() if t.is_floating_point() else t for t in tensors]
    x = next(t for t in leaves if t.is_floating_point())
    (dx,) = torch.autograd.grad(function(*leaves).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("op", OPS)
def test_the_default_dtype_does_not_matter(target, op):
    backend, device, _ = target
    halves = [False, True] if backend != "triton" else [False]  # the interpreter's bfloat16 arithmetic is wrong
    for half in halves:
        function, tensors = ops(backend, device)[op]
        if half:
            narrow = tensors[:1] if op == "combine" else tensors  # the weights stay float32
            tensors = [t.bfloat16() if t.is_floating_point() else t for t in narrow] + tensors[len(narrow) :]
        want = results(function, tensors)
        torch.set_default_dtype(torch.bfloat16)
        try:
            got = results(function, tensors)
        finally:
            torch.set_default_dtype(torch.float32)
        assert_same_bits(got, want)


@pytest.fixture
def picked(monkeypatch):
    """The backends that are picked."""
    found = []
    for module in (experts, gating, permute, residual):
        monkeypatch.setattr(
            module, "pick_backend", lambda *a, **k: found.append(_common.pick_backend(*a, **k)) or found[-1]
        )
    return found


@pytest.mark.parametrize("op", OPS)
def test_auto_leaves_to_the_reference_what_the_code_does_not_take(instructions, op, picked):
    """float16 and float64, which "cpp" refuses, and calls whose operations are counted."""
    auto, tensors = ops("auto", "cpu")[op]
    forced, reference = (ops(backend, "cpu")[op][0] for backend in ("cpp", "reference"))
    picked.clear()
    results(auto, tensors)
    assert set(picked) == {"cpp"}
    for dtype in (torch.float16, torch.float64) if op != "row_table" else ():
        other = [t.to(dtype) if t.is_floating_point() else t for t in tensors]
        picked.clear()
        got = results(auto, other)
        assert set(picked) == {"reference"}
        if op != "expert_ffn":  # for which it is another text
            assert_same_bits(got, results(reference, other))
        with refused():
            forced(*other)
    picked.clear()
    with FlopCounterMode(display=False):
        auto(*tensors)
    assert set(picked) == {"reference"}


@pytest.mark.parametrize("op", OPS)
def test_without_gradients_nothing_is_kept(target, op, monkeypatch):
    """Parameters that require gradients, under no_grad: the same output, and no memory for a backward pass."""
    function, tensors = ops(*target[:2])[op]
    leaves = [t.requires_grad_() if t.is_floating_point() else t for t in tensors]
    want = function(*leaves).detach()
    shapes = []
    new_empty = torch.Tensor.new_empty

    def recording(self, *args, **kwargs):
        t = new_empty(self, *args, **kwargs)
        shapes.append(tuple(t.shape))
        return t

    monkeypatch.setattr(torch.Tensor, "new_empty", recording)
    with torch.no_grad():
        got = function(*leaves)
    assert not got.requires_grad
    torch.testing.assert_close(got, want)
    if op == "expert_ffn" and target[0] == "triton":
        assert shapes.count((len(leaves[0]), F)) == 1, "the activation, and no pre-activation beside it"


def test_without_triton_its_backend_is_refused_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)  # as on macOS
    monkeypatch.delitem(sys.modules, "moelab.kernels._triton", raising=False)
    _common.triton_interprets.cache_clear()
    try:
        with pytest.raises(
            ValueError, match=r"^gate: backend 'triton' needs the triton package, which this platform lacks$"
        ):
            gate(torch.randn(S, E), K, backend="triton")
        assert gate(torch.randn(S, E), K).load_E.sum() == S * K
    finally:
        _common.triton_interprets.cache_clear()


def test_dot_precision_follows_either_switch():
    matmul, on_cpu = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = matmul.fp32_precision, on_cpu.fp32_precision
    try:
        torch.set_float32_matmul_precision("high")
        assert _common.dot_precision(torch.float32) == "tf32"
        torch.set_float32_matmul_precision("highest")
        assert _common.dot_precision(torch.float32) == "ieee"
        matmul.fp32_precision = "tf32"
        assert _common.dot_precision(torch.float32) == "tf32" and _common.dot_precision(torch.bfloat16) == "ieee"
        matmul.fp32_precision = "ieee"
        assert _common.dot_precision(torch.float32) == "ieee"
    finally:
        torch.set_float32_matmul_precision("highest")  # also sets the CPU's, which is "none" by default
        matmul.fp32_precision, on_cpu.fp32_precision = before


def test_a_forked_child_computes(instructions):
    """After a parent that used several threads, as a data loader's workers do, with one thread."""
    function, tensors = ops("cpp", "cpu")["expert_ffn"]
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        want = results(function, tensors)
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(BaseException):
                torch.set_num_threads(1)
                assert_same_bits(results(function, tensors), want)
                code = 0
            os._exit(code)
    finally:
        torch.set_num_threads(before)
    assert os.waitpid(child, 0)[1] == 0


@dataclass
class OnGPU:
    """What `pick_backend` asks of a tensor on the second of two GPUs."""

    dtype: torch.dtype = torch.float32

    @property
    def device(self):
        return torch.device("cuda:1")

    def is_floating_point(self):
        return self.dtype.is_floating_point


def test_triton_takes_the_tensors_of_the_current_gpu_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert _common.pick_backend("gate", "auto", OnGPU(), OnGPU(torch.int64)) == "triton"
    assert _common.pick_backend("gate", "auto", OnGPU(torch.float64)) == "reference", "kernels compute in fp32"
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(ValueError, match="gate: tensors are on cuda:1, the current device is cuda:0"):
        _common.pick_backend("gate", "auto", OnGPU())
