"""The MoE layer against a loop over tokens, outputs and gradients."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from moelab.config import ModelConfig, RoutingConfig
from moelab.inference.packing import why_not
from moelab.models import build
from moelab.models.moe import MoE
from moelab.models.routing import LOSSES, Router
from tests.models.test_variants import FREE, MODERN, VARIANTS

BASE = ModelConfig(layers=2, hidden=12, heads=1, experts=(0, 5), vocab=16, context=16, routing=FREE)
LAYERS = {
    "top-1": BASE,
    "top-3": replace(BASE, top_k=3),
    "residual": replace(BASE, residual=True),
    "residual, sum": replace(BASE, residual=True, residual_mix="sum"),
    "dropping": replace(BASE, routing=RoutingConfig(capacity_factor=1.0, min_capacity=1)),
    "top-2, dropping the last": replace(
        BASE, top_k=2, routing=RoutingConfig(min_capacity=1, random_token_selection=False)
    ),
    **{f"modern, {name}": VARIANTS[name] for name in ("shared gate", "swiglu with biases", "sigmoid", "dropping")},
    "modern": MODERN,
}


def layer(config: ModelConfig, dtype=torch.float64) -> MoE:
    torch.manual_seed(0)
    moe = MoE(config, 5).to(dtype)
    for p in moe.parameters():
        torch.nn.init.normal_(p, 0.0, 0.5)
    return moe


def plain_expert(experts, e, x_M):
    up = torch.tensordot(x_M, experts.up[e], 1)  # gate and up if it is gated
    up = up if experts.up_bias is None else up + experts.up_bias[e]
    out = (F.gelu(up, approximate="tanh") if up.dim() == 1 else F.silu(up[0]) * up[1]) @ experts.down[e]
    return out if experts.down_bias is None else out + experts.down_bias[e]


def plain_layer(moe: MoE, x_SM, routing):
    """Token by token, expert by expert."""
    rows = []
    for s, x_M in enumerate(x_SM):
        y = torch.zeros_like(x_M)
        for k, slot in enumerate(routing.slot_SK[s]):
            if slot >= 0:
                y = y + routing.weight_SK[s, k].to(y.dtype) * plain_expert(moe.experts, routing.expert_SK[s, k], x_M)
        if moe.mlp is not None:
            fixed = moe.mlp(x_M)
            if moe.mix is None:
                y = y + fixed
            elif len(moe.mix.weight) == 1:
                y = y + fixed * torch.sigmoid(x_M @ moe.mix.weight[0])
            else:
                a = F.softmax(F.linear(x_M, moe.mix.weight, moe.mix.bias).float(), -1).to(y.dtype)
                y = a[0] * y + a[1] * fixed
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("baseline", [False, True], ids=["local", "baseline"])
@pytest.mark.parametrize("tokens", [1, 7, 67])
@pytest.mark.parametrize("config", LAYERS.values(), ids=LAYERS)
def test_layer_equals_a_loop_over_tokens(tokens, config, baseline):
    moe = layer(config)
    moe.dispatcher = moe.own.baseline() if baseline else moe.own
    x = torch.randn(tokens, config.hidden, dtype=torch.float64)
    found = []
    for forward in (lambda x: moe(x)[0], lambda x: plain_layer(moe, x, moe.router(x))):
        torch.manual_seed(1)  # the same random token selection
        moe.zero_grad()
        leaf = x.clone().requires_grad_()
        y = forward(leaf)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        found.append([y.detach(), leaf.grad, *(p.grad.clone() for p in moe.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 4
    # The gate computes in fp32, so agreement is fp32's.
    for i, (ours, theirs) in enumerate(zip(*found, strict=True)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 if i else 1e-6)


@pytest.mark.parametrize("baseline", [False, True], ids=["local", "baseline"])
@pytest.mark.parametrize("config", [BASE, replace(MODERN, top_k=1), replace(VARIANTS["shared gate"], top_k=1)])
def test_all_tokens_to_one_expert_and_no_tokens(config, baseline):
    moe = layer(config)
    moe.dispatcher = moe.own.baseline() if baseline else moe.own
    with torch.no_grad():
        moe.router.weight.zero_()
    x = torch.randn(9, config.hidden, dtype=torch.float64)
    y, routing = moe(x)
    assert routing.load_E.tolist() == [9, 0, 0, 0, 0], "equal logits go to the lowest expert"
    assert float(routing.aux_loss.detach()) == pytest.approx(1.0)
    torch.testing.assert_close(y, plain_layer(moe, x, routing), rtol=1e-5, atol=1e-6)
    y.sum().backward()
    assert not moe.experts.up.grad[1:].any() and moe.experts.up.grad[0].any()
    y, routing = moe(x[:0])
    assert y.shape == x[:0].shape and routing.load_E.tolist() == [0] * 5 and float(routing.aux_loss.detach()) == 0.0


@pytest.mark.parametrize("noise", ["gumbel", "gumbel_second"])
def test_noise_changes_choices_in_training_only_and_not_the_weights(noise):
    """Of all choices, or of the second one alone."""
    router = Router(8, 6, 2, RoutingConfig(drop_tokens=False, choice_noise=noise, input_jitter=0.0))
    torch.nn.init.normal_(router.weight, 0.0, 0.1)
    x = torch.randn(300, 8)
    clean = router.eval()(x)
    torch.manual_seed(0)
    noisy = router.train()(x)
    assert torch.equal(clean.expert_SK[:, 0], noisy.expert_SK[:, 0]) == (noise == "gumbel_second")
    assert ((clean.expert_SK != noisy.expert_SK).float().mean(0)[noise == "gumbel_second" :] > 0.2).all()
    assert (noisy.expert_SK[:, 0] != noisy.expert_SK[:, 1]).all()
    chosen = F.softmax(F.linear(x, router.weight), -1).gather(1, noisy.expert_SK.long())
    torch.testing.assert_close(noisy.weight_SK, chosen / chosen.sum(1, keepdim=True))
    assert router(torch.zeros(0, 8)).expert_SK.shape == (0, 2)


def test_bf16_autocast_computes_experts_in_bf16_and_routes_in_fp32():
    moe = layer(replace(BASE, residual=True), torch.float32)
    x = torch.randn(40, 12, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, routing = moe(x)
    exact, exact_routing = moe(x)
    assert y.dtype == torch.bfloat16 and torch.equal(routing.expert_SK, exact_routing.expert_SK)
    assert (y.float() - exact).abs().max() < 0.05 * exact.abs().max()
    y.float().sum().backward()
    assert x.grad.isfinite().all() and moe.experts.up.grad.dtype == torch.float32


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


def test_a_router_in_bf16_rounds_input_weights_and_logits_and_is_not_packed():
    router, x = Router(16, 5, 1, RoutingConfig(precision="bf16")), torch.randn(64, 16)
    torch.nn.init.normal_(router.weight)
    expected = (x.bfloat16().float() @ router.weight.bfloat16().float().T).bfloat16().float()
    logits = router.logits(x)
    torch.testing.assert_close(logits, expected, rtol=2**-7, atol=1e-6)
    assert torch.equal(logits, logits.bfloat16().float()) and not torch.equal(logits, x @ router.weight.T)
    logits.sum().backward()
    torch.testing.assert_close(router.weight.grad, x.bfloat16().float().sum(0).expand(5, -1), rtol=0.01, atol=0.1)
    config = replace(BASE, hidden=16, routing=replace(FREE, precision="bf16"))
    assert why_not(build(config, 0).eval()) == "its router computes in bf16"
