"""The adapters to Liger and triton_kernels, against stubs of both: what they hand over, and what is done with it.

The stubs compute in plain PyTorch what the packages' documentation promises for these arguments, and refuse others. No
kernel of either package runs here, but for Liger's where it is installed, in Triton's interpreter.
"""

import importlib
import importlib.util
import subprocess
import sys
import time
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from moelab.acceptance import speed
from moelab.acceptance.cases import Context
from moelab.acceptance.stages import Setup
from moelab.bench import kernel_peers, layer, peers
from moelab.bench.harness import Timing
from moelab.bench.inputs import HiddenStates
from moelab.bench.layer import LayerSize

QUICK = Timing(3, clock="cpu", warm_up=1)
GPU_PACKAGES = ("liger_kernel", "triton_kernels")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def put(monkeypatch, name: str, **contents) -> None:
    module = ModuleType(name)
    module.__path__ = []
    module.__spec__ = importlib.util.spec_from_loader(name, None)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def liger(monkeypatch):
    """Liger's function; `liger.spoil` changes what it does."""

    def apply(x, gate_up_proj, down_proj, top_k_index, top_k_weights):
        (T, H), (E, two_I, _), K = x.shape, gate_up_proj.shape, top_k_index.shape[1]
        assert down_proj.shape == (E, H, two_I // 2) and top_k_weights.shape == top_k_index.shape == (T, K)
        assert top_k_index.dtype == torch.int32 and top_k_weights.dtype == x.dtype == gate_up_proj.dtype
        gate, up = (gate_up_proj[top_k_index.long()] @ x[:, None, :, None]).squeeze(-1).chunk(2, -1)  # T, K, I
        if "halves" in stub.spoil:
            gate, up = up, gate
        if "row" in stub.spoil:
            down_proj = torch.cat([down_proj[:-1], down_proj[-1:].detach()])  # the last expert learns nothing
        y = (down_proj[top_k_index.long()] @ (F.silu(gate) * up)[..., None]).squeeze(-1)
        y = (y * top_k_weights[..., None]).sum(1)
        return y * float("nan") if "nan" in stub.spoil else y

    stub = SimpleNamespace(spoil=())
    put(monkeypatch, "liger_kernel")
    put(monkeypatch, "liger_kernel.ops", LigerFusedMoEFunction=SimpleNamespace(apply=apply))
    return stub


@dataclass(frozen=True)
class FnSpecs:
    name: str
    fn: object
    fn_arg_names: tuple = ()


@dataclass(frozen=True)
class FusedActivation:
    specs: FnSpecs
    fn_args: tuple = ()


@pytest.fixture
def triton_kernels(monkeypatch):
    """The five functions of triton_kernels; returns the keyword arguments of its products."""
    seen = []

    def topk(x, k, apply_softmax=True):
        assert x.dtype == torch.float32 and x.ndim == 2
        vals, indx = x.topk(k, 1)
        flat = indx.flatten()
        order = flat.argsort(stable=True).to(torch.int32)
        metadata = SimpleNamespace(
            col_sum=torch.bincount(flat, minlength=x.shape[1]).to(torch.int32),
            col_sorted_indx=order,
            row_sorted_indx=order.argsort().to(torch.int32),
        )
        return SimpleNamespace(
            vals=vals.softmax(1) if apply_softmax else vals, indx=indx.to(torch.int16), mask_metadata=metadata
        )

    def make_ragged_tensor_metadata(slice_sizes, n_total_rows):
        assert slice_sizes.dtype == torch.int32 and int(slice_sizes.sum()) == n_total_rows
        return slice_sizes

    def matmul(
        a, b, bias, a_ragged_metadata=None, gather_indx=None, scatter_indx=None, gammas=None, fused_activation=None
    ):
        assert a.dtype == b.dtype and b.stride(-2) == 1 and bias.dtype == torch.float32
        assert all(i is None or i.dtype == torch.int32 for i in (gather_indx, scatter_indx))
        seen.append({"gather": gather_indx is not None, "scatter": scatter_indx is not None})
        rows = a if gather_indx is None else a[gather_indx]
        parts = zip(rows.split(a_ragged_metadata.tolist()), b, bias, strict=True)
        y = torch.cat([part.float() @ w.float() + c for part, w, c in parts])
        if fused_activation is not None:
            assert fused_activation.specs.fn.__name__ == "gelu_tanh" and not fused_activation.fn_args
            y = F.gelu(y, approximate="tanh")
        if gammas is not None:
            y = y * gammas[:, None]
        if scatter_indx is not None:
            y = torch.empty_like(y).index_copy(0, scatter_indx.long(), y)
        return y.to(a.dtype)

    put(monkeypatch, "triton_kernels")
    put(monkeypatch, "triton_kernels.matmul", matmul=matmul, FnSpecs=FnSpecs, FusedActivation=FusedActivation)
    put(monkeypatch, "triton_kernels.reduce", reduce=lambda x, dim: (x.sum(dim), None))
    put(monkeypatch, "triton_kernels.tensor", make_ragged_tensor_metadata=make_ragged_tensor_metadata)
    put(monkeypatch, "triton_kernels.topk", topk=topk)
    return seen


@pytest.fixture
def anywhere(monkeypatch):
    """As if this CPU were a device that their kernels run on, and no other peer installed."""
    installed = peers.has
    monkeypatch.setattr(peers, "has", lambda name: name.split(".")[0] in GPU_PACKAGES and installed(name))
    monkeypatch.setattr(peers, "on_gpu", lambda package, device: peers.has(peers.PEERS[package]))
    monkeypatch.setattr("moelab.bench.harness.product_rate", lambda *_: 1e11)
    monkeypatch.setattr("moelab.bench.harness.copy_rate", lambda *_: 1e10)


def given(tokens, dtype="fp32"):
    states = HiddenStates(tokens, 32, 7)
    x = states(0).x_SM.to(DTYPES[dtype])
    return states.gate_EM, x, torch.randn_like(x)


def ligers(gate_EM, dtype="fp32", top_k=1):
    torch.manual_seed(0)
    return kernel_peers.LigerLayer(32, 96, gate_EM, top_k).to(DTYPES[dtype])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("tokens", "top_k"), [(67, 1), (67, 2), (3, 1)])
def test_ligers_layer_is_what_its_reference_computes(tokens, top_k, dtype, liger):
    """Outputs and gradients; 3 tokens leave experts empty."""
    gate_EM, x, dy = given(tokens, dtype)
    module = ligers(gate_EM, dtype, top_k)
    assert module.gate_up.shape == (7, 2 * 64, 32), "two thirds of 96"
    kernel_peers.check(module, x, dy)
    kernel_peers.check(module, x)
    assert all(p.grad is None for p in module.parameters()) and x.grad is None


@pytest.mark.parametrize(
    ("spoil", "part"),
    [
        ("halves", r"wrong result: the output is [0-9.]+ of a row's norm from the reference, 0\.01 allowed"),
        ("row", "wrong result: the gradient of down is"),
        ("nan", "wrong result: the output is nan of a row's norm"),
    ],
)
def test_a_wrong_result_is_named(spoil, part, liger):
    gate_EM, x, dy = given(67)
    liger.spoil = (spoil,)
    with pytest.raises(ValueError, match=part):
        kernel_peers.check(ligers(gate_EM), x, dy)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("tokens", "top_k"), [(67, 1), (67, 2), (3, 1)])
def test_triton_kernels_gets_our_weights(tokens, top_k, dtype, triton_kernels):
    """It gathers, applies GELU, weights and scatters; the result is our drop-free layer's."""
    gate_EM, x, _ = given(tokens, dtype)
    torch.manual_seed(0)
    w = layer.Weights(32, 96, gate_EM).to(DTYPES[dtype])
    with torch.no_grad():
        w.b1.normal_()
        w.b2.normal_()
        module = kernel_peers.TritonKernelsLayer(w.gate, w.w1, w.b1, w.w2, w.b2, top_k)
        kernel_peers.check(module, x)
        assert triton_kernels == [{"gather": True, "scatter": False}, {"gather": False, "scatter": True}]
        ours, _ = layer.ours(w, x, None, top_k)
        assert kernel_peers._difference(module(x)[0], ours) < kernel_peers.TOLERANCE[x.dtype]


def test_both_are_timed_where_they_are_right(liger, triton_kernels, anywhere):
    size, failed = LayerSize(67, 32, 96, 7, top_k=2), {}
    forward = layer.measure(size, QUICK, backward=False, only=layer.GPU_ONLY, on_failure=failed.__setitem__)
    assert [r.candidate for r in forward] == [layer.DENSE, layer.LIGER, layer.TRITON_KERNELS] and not failed
    both = layer.measure(size, QUICK, on_failure=failed.__setitem__)
    assert layer.LIGER in {r.candidate for r in both} and layer.TRITON_KERNELS not in {r.candidate for r in both}
    with pytest.raises(ValueError, match="triton_kernels has no backward pass"):
        layer.measure(size, QUICK, only=[layer.TRITON_KERNELS])


def test_a_wrong_one_is_reported_and_not_timed(liger, anywhere):
    liger.spoil = ("halves",)
    size, failed = LayerSize(67, 32, 96, 7), {}
    rows = layer.measure(size, QUICK, only=[layer.DROP_FREE, layer.LIGER], on_failure=failed.__setitem__)
    assert [r.candidate for r in rows] == [layer.DENSE, layer.DROP_FREE] and list(failed) == [layer.LIGER]
    assert "wrong result" in str(failed[layer.LIGER])
    with pytest.raises(ValueError, match="wrong result"):
        layer.measure(size, QUICK, only=[layer.LIGER])


def test_a_package_that_cannot_be_imported_costs_its_own_row_alone(liger, anywhere, monkeypatch):
    monkeypatch.delattr(sys.modules["liger_kernel.ops"], "LigerFusedMoEFunction")
    size, failed = LayerSize(8, 32, 96, 4), {}
    rows = layer.measure(size, QUICK, only=[layer.DROP_FREE, layer.LIGER], on_failure=failed.__setitem__)
    assert [r.candidate for r in rows] == [layer.DENSE, layer.DROP_FREE]
    assert isinstance(failed[layer.LIGER], ImportError)


def test_on_a_cpu_they_are_no_candidates(liger, triton_kernels):
    gate_EM, _, _ = given(8)
    made = layer.candidates(LayerSize(8, 32, 96, 7), gate_EM, [layer.DROP_FREE, *layer.GPU_ONLY])
    assert list(made) == [layer.DENSE, layer.DROP_FREE]


def test_another_package_of_that_name_is_not_taken_for_it(tmp_path, monkeypatch):
    assert not peers.has("nosuch.matmul")
    (tmp_path / "triton_kernels").mkdir()
    (tmp_path / "triton_kernels" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert peers.has("triton_kernels") and "triton_kernels" not in peers.installed()
    (tmp_path / "triton_kernels" / "matmul.py").touch()
    importlib.invalidate_caches()
    assert peers.installed()["triton_kernels"] == ""
    for name in [name for name in sys.modules if name.startswith("triton_kernels")]:
        monkeypatch.delitem(sys.modules, name)


def test_the_stage_times_them_last(liger, triton_kernels, anywhere, tmp_path, monkeypatch):
    environment = {}
    monkeypatch.setattr(speed.os, "environ", environment)
    context = Context(Setup(tmp_path, "cpu"), time.monotonic() + 60)
    *_, both, forward, other, last = speed.cases(context)
    size = "layer S64 M32 F64 E4 K2 bf16"
    assert both.name == f"{size}, forward + backward, liger" and forward.name == f"{size}, forward, liger"
    assert other.name == f"{size}, forward, triton_kernels" and last.name == "peers"
    assert environment == {"LIGER_FUSED_MOE_AUTOTUNE": "0"}
    rows = other.run()
    assert [r["candidate"] for r in rows] == [layer.DENSE, layer.DROP_FREE, layer.TRITON_KERNELS]
    assert "triton_kernels, drop-free" in rows[0]["finding"]
    assert {"liger_kernel", "triton_kernels"} <= set(last.run()["installed"])


INTERPRET = {"TRITON_INTERPRET": "1", "LIGER_FUSED_MOE_AUTOTUNE": "0"}

GELU = """
import torch, triton, triton.language as tl
from moelab.bench._gelu import gelu_tanh

@triton.jit
def kernel(x_p, y_p, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_p + i, gelu_tanh(tl.load(x_p + i)))

x = torch.linspace(-12, 12, 512)
y = torch.empty_like(x)
kernel[(1,)](x, y, 512)
torch.testing.assert_close(y, torch.nn.functional.gelu(x, approximate="tanh"))
"""

LIGER = """
import torch
from moelab.bench import kernel_peers

torch.manual_seed(0)
for tokens, top_k in ((67, 1), (67, 2), (3, 1)):
    layer = kernel_peers.LigerLayer(32, 96, torch.randn(7, 32) / 4, top_k)
    kernel_peers.check(layer, torch.randn(tokens, 32), torch.randn(tokens, 32))
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["gelu", "liger"])
def test_in_tritons_interpreter(name, tmp_path, monkeypatch):
    pytest.importorskip("triton" if name == "gelu" else "liger_kernel", reason="not installed")
    for key, value in INTERPRET.items():
        monkeypatch.setenv(key, value)
    (tmp_path / "script.py").write_text(GELU if name == "gelu" else LIGER)  # the interpreter reads its source
    ended = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
