"""`bench layer`, `gate` and the parts compare like with like: the candidates compute the same thing."""

import json
from dataclasses import replace
from statistics import median

import pytest
import torch

from moelab.bench import gate as gate_bench
from moelab.bench import layer
from moelab.bench.harness import Timing
from moelab.bench.inputs import HiddenStates
from moelab.bench.layer import LayerSize

QUICK = Timing(3, clock="cpu", warm_up=1)


@pytest.fixture(autouse=True)
def known_rates(monkeypatch):
    """Measuring the machine takes longer than all the rest."""
    monkeypatch.setattr("moelab.bench.harness.product_rate", lambda *_: 2e11)
    monkeypatch.setattr("moelab.bench.harness.copy_rate", lambda *_: 1e10)


@pytest.mark.parametrize(("tokens", "top_k"), [(67, 1), (3, 1), (67, 2)])
@pytest.mark.parametrize("name", [layer.LOOP, layer.GROUPED, layer.EINSUM])
def test_layers_agree_when_nothing_is_dropped(name, tokens, top_k, monkeypatch):
    """Outputs and gradients; 3 tokens leave experts empty."""
    monkeypatch.setattr(layer, "slots", lambda tokens, experts: tokens)
    states = HiddenStates(tokens, 16, 7)
    made = layer.candidates(LayerSize(tokens, 16, 32, 7, top_k=top_k), states.gate_EM, (layer.DROP_FREE, name))
    assert sum(p.numel() for p in made[layer.DENSE][0].parameters()) == (2 * 16 + 1) * 32 * top_k + 16, "equal FLOPs"
    dy = torch.randn(tokens, 16)
    found = []
    for module, call in (made[layer.DROP_FREE], made[name]):
        module.zero_grad()
        x = states(0).x_SM.requires_grad_()
        y, aux_loss = call(x)
        torch.autograd.backward([y, aux_loss], [dy, torch.ones(())])
        found.append([y.detach(), aux_loss.detach(), x.grad, *(p.grad for p in module.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_rows_are_tidy(dtype):
    rows = layer.measure(LayerSize(64, 32, 64, 4, dtype), QUICK) + gate_bench.measure(64, 4, QUICK)
    ours = {layer.DENSE, layer.OURS, layer.DROP_FREE, layer.LOOP, layer.GROUPED, layer.EINSUM, "masks (baseline)"}
    assert ours <= {r.candidate for r in rows}
    assert all(r.min_ms <= r.median_ms <= r.max_ms and r.floor_ms > 0 and r.rounds == 3 for r in rows)
    assert all(r.ratio == 1 for r in rows if r.candidate == r.against)
    assert all("new each round" in r.inputs and r.clock == "cpu" and r.case["busiest_expert"] >= 1 for r in rows)


def test_the_floor_counts_products_and_the_weights_of_experts_with_tokens(monkeypatch):
    weights = 2 * 32 * 64
    for S, E, top_k, backward, passes in ((8, 64, 1, True, 3), (8, 64, 2, False, 1), (500, 4, 1, True, 3)):
        size = LayerSize(S, 32, 64, E, top_k=top_k)
        rows = layer.measure(size, QUICK, backward=backward, only=[layer.OURS, layer.DROP_FREE])
        assert [row.candidate for row in rows] == [layer.DENSE, layer.OURS, layer.DROP_FREE]
        case, (dense, limited, free) = rows[0].case, (row.floor_ms / passes / 1e3 for row in rows)
        states = HiddenStates(S, 32, E)
        loads = [states(i).logits_SE.topk(top_k).indices.flatten().bincount(minlength=E) for i in range(4)]
        assert case["used_experts"] == median(int(load.count_nonzero()) for load in loads), "of all choices"
        assert case["busiest_expert"] == pytest.approx(median(float(load.max() * E / load.sum()) for load in loads))
        products = S * top_k * 2 * weights / 2e11
        assert dense == pytest.approx(max(products, top_k * weights * 4 / 1e10)), "reads its own weights only"
        if S == 8:  # few tokens: the experts that have any are read
            assert limited == free and top_k < free / (weights * 4 / 1e10) <= min(8 * top_k, 64)
        else:
            assert case["kept_share"] < 0.99 and free == pytest.approx(products)
            assert limited == pytest.approx(products * case["kept_share"]), "dropped tokens cost nothing"
    monkeypatch.setattr("moelab.bench.harness.product_rate", lambda *_: 1.0)
    dense, free = layer.measure(size, QUICK, only=[layer.DROP_FREE])
    assert dense.floor_ms == free.floor_ms == dense.min_ms, "the dense layer's fastest round was faster"


@pytest.mark.parametrize("name", [layer.DEEPSPEED, layer.EAGER, layer.MIXTRAL])
def test_peers_take_the_same_tokens_and_gate(name):
    pytest.importorskip("deepspeed" if name == layer.DEEPSPEED else "transformers", reason="needs the extra peers")
    states = HiddenStates(67, 32, 4)
    (_, (module, call)) = layer.candidates(LayerSize(67, 32, 96, 4), states.gate_EM, [name]).values()
    gates = [p for p in module.parameters() if p.shape == states.gate_EM.shape]
    assert any(torch.equal(p, states.gate_EM) for p in gates)
    y, _ = call(states(0).x_SM)
    assert y.shape == (67, 32) and y.abs().sum() > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: layer.measure(LayerSize(8, 32, 64, 4), QUICK, only=["einsum"]),
            "unknown candidate 'einsum'; allowed: dense",
        ),
        (lambda: LayerSize(8, 32, 64, 4, "fp64"), "dtype must be one of fp32, bf16, got 'fp64'"),
        (lambda: layer.measure(LayerSize(8, 32, 0, 4), QUICK), "bench layer: ffn must be at least 1, got 0"),
        (lambda: LayerSize(67, 16, 32, 7, top_k=8), "top_k must be 1 to the 7 experts"),
    ],
)
def test_bad_settings(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_was_too_slow_is_not_tried_with_more_experts(monkeypatch):
    loop, calls = layer.loop, []
    monkeypatch.setattr(layer, "loop", lambda *args: calls.append(1) or loop(*args))
    monkeypatch.setattr("moelab.bench.harness.time.monotonic", lambda: 10.0 * len(calls))
    timing, slow, only = replace(QUICK, warm_up=1, longest_s=0.2), {}, [layer.LOOP, layer.DROP_FREE]
    for experts, expected in ((4, 1), (8, 1), (2, 2)):
        names = [row.candidate for row in layer.measure(LayerSize(8, 32, 64, experts), timing, only=only, slow=slow)]
        assert names == ["dense", layer.DROP_FREE] and len(calls) == expected
    assert slow == {layer.LOOP: 2}


def test_the_command_measures_every_case(tmp_path):
    sizes = [LayerSize(16, 16, 32, E) for E in (4, 8)]
    only = [layer.DROP_FREE, layer.EINSUM]
    layer.main(sizes=sizes, threads=[1, 2], timing=Timing(3, warm_up=0), only=only, out=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "layer.jsonl").read_text().splitlines()]
    assert [(r["threads"], r["experts"]) for r in rows[::3]] == [(1, 4), (1, 8), (2, 4), (2, 8)]
    assert (tmp_path / "layer.svg").stat().st_size > 10_000


def test_parts_of_both_forms_give_the_same_tokens():
    torch.manual_seed(0)
    x, logits = torch.randn(60, 16), torch.randn(60, 4)
    with torch.no_grad():
        made = [form(x, logits, 60) for form in (gate_bench.our_parts, gate_bench.mask_parts)]
    for part in ("combine", "all three"):
        torch.testing.assert_close(*(calls[part]() for calls in made))
    torch.testing.assert_close(made[0]["combine"](), made[0]["all three"]())


def test_parts_are_timed_round_by_round():
    rows = gate_bench.measure_parts(8, 16, 4, QUICK, calls=2)
    assert [(r["part"], r["candidate"], r["round"]) for r in rows] == [
        (part, name, i)
        for part in gate_bench.PARTS
        for name in (gate_bench.OURS, gate_bench.BASELINE)
        for i in range(3)
    ]
    assert all(r["ms"] > 0 and r["capacity"] == 4 for r in rows)


def broken(*_):
    raise RuntimeError("not on this device\nmore text")


@pytest.mark.parametrize(
    ("owner", "name", "candidate"),
    [(layer, "grouped", layer.GROUPED), (layer.peers, "MixtralLayer", layer.MIXTRAL)],
    ids=["when it runs", "when it is made"],
)
def test_a_candidate_that_raises_is_left_out_and_named(owner, name, candidate, monkeypatch, capsys):
    monkeypatch.setattr(layer.peers, "has", lambda package: package == "transformers")
    monkeypatch.setattr(owner, name, broken)
    size = LayerSize(8, 32, 64, 4, top_k=2)
    rows = layer.measure(size, QUICK)
    assert {layer.DROP_FREE, layer.LOOP} <= {r.candidate for r in rows} and candidate not in {r.candidate for r in rows}
    assert rows[0].case["top_k"] == 2
    assert f"left out: {candidate} raises RuntimeError: not on this device\n" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="not on this device"):  # it was asked for
        layer.measure(size, QUICK, only=[candidate])


def test_another_librarys_gate_that_raises_is_left_out_and_ours_is_not(monkeypatch, capsys):
    monkeypatch.setattr(gate_bench.peers, "gates", lambda: {"theirs": broken})
    assert [r.candidate for r in gate_bench.measure(1, 4, QUICK)] == [gate_bench.OURS, gate_bench.MASKS]
    assert "left out: theirs raises RuntimeError: not on this device" in capsys.readouterr().out
    monkeypatch.setattr(gate_bench, "_ours", broken)
    with pytest.raises(RuntimeError, match="not on this device"):
        gate_bench.measure(1, 4, QUICK)
