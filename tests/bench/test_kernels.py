"""The benchmarks compare like with like: the candidates compute the same thing."""

import pytest
import torch

from moelab.bench import gate as gate_bench
from moelab.bench import harness as common
from moelab.bench import layer, parts


def test_layers_agree_when_nothing_is_dropped():
    torch.manual_seed(0)
    forms = [layer._ours(None), layer._loop]
    x = torch.randn(60, 16)
    module = layer.Layer(16, 32, 4, forms[0])
    outputs, grads = [], []
    for form in forms:
        module.form = form
        module.zero_grad()
        y, aux_loss = module(x)
        (y.square().sum() + aux_loss).backward()
        outputs.append(y.detach())
        grads.append([p.grad.clone() for p in module.parameters()])
    torch.testing.assert_close(*outputs)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        y, _ = layer._einsum(module, x, capacity=60)
    torch.testing.assert_close(y, outputs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_rows_are_tidy(dtype):
    rows = layer.measure(64, 32, 64, 4, dtype, 3, "cpu") + gate_bench.measure(64, 4, 3, "cpu")
    assert {"dense", "ours, drop-free", "einsum (baseline)", "masks (baseline)"} <= {r["candidate"] for r in rows}
    assert all(r["min_ms"] <= r["median_ms"] <= r["max_ms"] and r["floor_ms"] > 0 and r["rounds"] == 3 for r in rows)
    assert all(r["ratio"] == 1 for r in rows if r["candidate"] == r["against"])


def test_candidates_take_turns():
    order = []
    common.in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 3, "cpu")
    assert order == ["a", "a", "b", "b"] + ["a", "b"] * 3


def test_parts_of_both_forms_give_the_same_tokens():
    torch.manual_seed(0)
    x, logits = torch.randn(60, 16), torch.randn(60, 4)
    with torch.no_grad():
        made = [form(x, logits, 60) for form in (parts.ours, parts.masks)]
    for part in ("combine", "all three"):
        torch.testing.assert_close(*(calls[part]() for calls in made))
    torch.testing.assert_close(made[0]["combine"](), made[0]["all three"]())


def test_parts_are_timed_round_by_round():
    rows = parts.measure(8, 16, 4, 3, "cpu", calls=2)
    assert len(rows) == len(parts.PARTS) * 2 * 3 and all(r["ms"] > 0 and r["capacity"] == 4 for r in rows)
    assert {(r["part"], r["candidate"], r["round"]) for r in rows} == {
        (p, c, i) for p in parts.PARTS for c in (parts.OURS, parts.BASELINE) for i in range(3)
    }


def test_layer_forward_only_and_a_choice_of_candidates():
    only = ("ours, drop-free", "einsum (baseline)")
    rows = layer.measure(8, 32, 64, 4, "fp32", 3, "cpu", backward=False, only=only)
    assert [r["candidate"] for r in rows] == ["dense", *only]
    with pytest.raises(ValueError, match="unknown candidate 'einsum'; allowed: dense"):
        layer.measure(8, 32, 64, 4, "fp32", 3, "cpu", only=["einsum"])
