"""Layers that grow from fewer experts, without a training."""

from dataclasses import replace

import pytest
import torch

from moelab.config import ModelConfig, RoutingConfig, UpcycleConfig
from moelab.engine import checkpoint
from moelab.models import build


@pytest.mark.parametrize(("scores", "scale"), [("softmax", 3.0), ("sigmoid", 1.0)])
def test_the_balance_bias_of_a_layer_that_grows_keeps_its_choices(scores, scale, tmp_path):
    routing = RoutingConfig(drop_tokens=False, normalize_weights=False, balance_rate=0.01, scores=scores)
    config = ModelConfig(
        layers=1, hidden=32, heads=2, experts=(4,), vocab=61, context=32, init_std=0.3, routing=routing
    )
    few = build(config, 1).eval()
    with torch.no_grad():
        few.blocks[0].ffn.router.balance_bias.copy_(torch.tensor([0.1, -0.1, 0.05, -0.05]))
    with checkpoint.Writer(tmp_path) as checkpoints:
        checkpoints.save(1, few, torch.optim.AdamW(few.parameters()), {})
    more = build(replace(config, experts=(12,)), 7).eval()
    checkpoint.load(
        checkpoint.latest(tmp_path), more, torch.optim.AdamW(more.parameters()),
        upcycle=UpcycleConfig(noise=1e-5, scale=scale), seed=3, scores=scores,
    )  # fmt: skip
    tokens = torch.randint(61, (16, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = few(tokens), more(tokens)
    chosen, copies = before.routing[0].expert_SK, after.routing[0].expert_SK
    assert len(chosen.unique()) > 1 and (copies >= 4).any()
    assert torch.equal(copies % 4, chosen)
    torch.testing.assert_close(after.logits_BTV, before.logits_BTV, rtol=1e-3, atol=1e-3)
