"""The MoE layer against a loop over tokens, outputs and gradients."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from moelab.config import ModelConfig, RoutingConfig
from moelab.models.moe import MoE
from moelab.models.routing import LOSSES, Router

BASE = ModelConfig(
    layers=2, hidden=12, heads=1, experts=(0, 5), vocab=16, context=16, routing=RoutingConfig(drop_tokens=False)
)


def layer(config: ModelConfig, experts: int, dtype=torch.float64) -> MoE:
    torch.manual_seed(0)
    moe = MoE(config, experts).to(dtype)
    for p in moe.parameters():
        torch.nn.init.normal_(p, 0.0, 0.5)
    return moe


def reference(moe: MoE, x_SM, routing):
    """Token by token, expert by expert."""
    rows = []
    for s in range(len(x_SM)):
        y = torch.zeros_like(x_SM[s])
        for k in range(routing.expert_SK.shape[1]):
            if routing.slot_SK[s, k] >= 0:
                e = routing.expert_SK[s, k]
                h = F.gelu(x_SM[s] @ moe.experts.up[e] + moe.experts.up_bias[e], approximate="tanh")
                y = y + routing.weight_SK[s, k].to(y.dtype) * (h @ moe.experts.down[e] + moe.experts.down_bias[e])
        if moe.mlp is not None:
            fixed = moe.mlp(x_SM[s])
            if moe.mix is None:
                y = y + fixed
            else:
                a = F.softmax(F.linear(x_SM[s], moe.mix.weight, moe.mix.bias).float(), -1).to(y.dtype)
                y = a[0] * y + a[1] * fixed
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("dispatch", ["local", "einsum"])
@pytest.mark.parametrize("tokens", [1, 7, 13, 67])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"top_k": 2},
        {"top_k": 3},
        {"residual": True},
        {"residual": True, "residual_mix": "sum"},
        {"routing": RoutingConfig(capacity_factor=1.0, min_capacity=1)},
        {"top_k": 2, "routing": RoutingConfig(min_capacity=1, random_token_selection=False)},
    ],
    ids=lambda change: "-".join(change) or "plain",
)
def test_layer_equals_a_loop_over_tokens(tokens, change, dispatch):
    config = replace(BASE, dispatch=dispatch, **change)
    moe = layer(config, 5)
    x = torch.randn(tokens, 12, dtype=torch.float64)
    grads = []
    for forward in (lambda x: moe(x), lambda x: (reference(moe, x, moe.router(x)), None)):
        torch.manual_seed(1)  # the same random token selection
        moe.zero_grad()
        leaf = x.clone().requires_grad_()
        y, _ = forward(leaf)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        grads.append((y.detach(), leaf.grad, [p.grad.clone() for p in moe.parameters() if p.grad is not None]))
    # The gate computes in fp32, so agreement is fp32's.
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads[0][1], grads[1][1], rtol=1e-5, atol=1e-5)
    assert len(grads[0][2]) == len(grads[1][2])
    for ours, theirs in zip(grads[0][2], grads[1][2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_all_tokens_to_one_expert_and_the_others_empty():
    moe = layer(BASE, 5)
    with torch.no_grad():
        moe.router.weight.zero_()
    x = torch.randn(9, 12, dtype=torch.float64)
    y, routing = moe(x)
    assert routing.load_E.tolist() == [9, 0, 0, 0, 0], "equal logits go to the lowest expert"
    assert float(routing.aux_loss.detach()) == pytest.approx(1.0)
    torch.testing.assert_close(y, reference(moe, x, routing), rtol=1e-5, atol=1e-6)
    y.sum().backward()
    assert not moe.experts.up.grad[1:].any() and moe.experts.up.grad[0].any()


def test_no_tokens_at_all():
    moe = layer(BASE, 5)
    y, routing = moe(torch.zeros(0, 12, dtype=torch.float64))
    assert y.shape == (0, 12) and routing.load_E.tolist() == [0] * 5
    assert float(routing.aux_loss.detach()) == 0.0


def test_noise_changes_choices_in_training_only_and_not_the_weights():
    config = RoutingConfig(drop_tokens=False, choice_noise="gumbel", input_jitter=0.0)
    router = Router(8, 4, 1, config)
    torch.nn.init.normal_(router.weight, 0.0, 0.1)
    x = torch.randn(200, 8)
    clean = router.eval()(x)
    torch.manual_seed(0)
    noisy = router.train()(x)
    assert (clean.expert_SK != noisy.expert_SK.long()).float().mean() > 0.2
    probs = F.softmax(F.linear(x, router.weight), -1)
    torch.testing.assert_close(noisy.weight_SK, probs.gather(1, noisy.expert_SK.long()))


def test_the_second_expert_can_be_sampled_while_the_first_stays():
    router = Router(8, 6, 2, RoutingConfig(drop_tokens=False, choice_noise="gumbel_second"))
    torch.nn.init.normal_(router.weight, 0.0, 0.1)
    x = torch.randn(300, 8)
    clean = router.eval()(x)
    torch.manual_seed(0)
    sampled = router.train()(x)
    assert torch.equal(clean.expert_SK[:, 0], sampled.expert_SK[:, 0])
    assert (clean.expert_SK[:, 1] != sampled.expert_SK[:, 1]).float().mean() > 0.2
    assert (sampled.expert_SK[:, 0] != sampled.expert_SK[:, 1]).all()
    torch.testing.assert_close(sampled.weight_SK.sum(1), torch.ones(300))
    assert router(torch.zeros(0, 8)).expert_SK.shape == (0, 2)


def test_bf16_autocast_computes_experts_in_bf16_and_routes_in_fp32():
    moe = layer(replace(BASE, residual=True), 5, torch.float32)
    x = torch.randn(40, 12, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, routing = moe(x)
    exact, exact_routing = moe(x)
    assert y.dtype == torch.bfloat16 and torch.equal(routing.expert_SK, exact_routing.expert_SK)
    assert (y.float() - exact).abs().max() < 0.05 * exact.abs().max()
    y.float().sum().backward()
    assert x.grad.isfinite().all() and moe.experts.up.grad.dtype == torch.float32


def test_routing_logits_is_routing_activations():
    router = Router(8, 4, 2, RoutingConfig(capacity_factor=0.5, min_capacity=1, choice_noise="gumbel"))
    torch.nn.init.normal_(router.weight)
    x = torch.randn(60, 8)
    for training in (True, False):
        router.train(training)
        found = []
        for route in (lambda: router(x), lambda: router.route(F.linear(x, router.weight))):
            torch.manual_seed(2)
            found.append(route())
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        assert 0 < found[0].kept_E.sum() < 120


def test_a_router_weighs_its_losses_and_computes_none_at_weight_zero(monkeypatch):
    calls = []
    monkeypatch.setitem(LOSSES, "z_loss", lambda logits_SE, routing: calls.append(len(logits_SE)) or routing.z_loss)
    for weight in (0.0, 0.5):
        router = Router(12, 5, 1, RoutingConfig(aux_loss=0.1, z_loss=weight))
        torch.nn.init.normal_(router.weight)
        found = router(torch.randn(7, 12))
        torch.testing.assert_close(found.loss, 0.1 * found.aux_loss + weight * found.z_loss)
    assert calls == [7]
    nowhere = Router(12, 5, 1, RoutingConfig(aux_loss=0.0, z_loss=0.0))
    torch.nn.init.constant_(nowhere.weight, torch.nan)
    assert nowhere(torch.randn(7, 12)).loss.isnan(), "tokens that cannot be routed are noticed at weight 0, too"
