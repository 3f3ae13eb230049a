"""Layers that grow from fewer experts, without a training."""

from dataclasses import replace

import pytest
import torch

from moelab.config import ModelConfig, RoutingConfig, UpcycleConfig
from moelab.engine.checkpoint.upcycling import Copies, sources
from moelab.models import GPT, build


def grown(few: GPT, config: ModelConfig, upcycle: UpcycleConfig) -> GPT:
    """Return a model of more experts whose weights are another's and their copies."""
    model = build(config, 7)
    stored = {name: p.detach() for name, p in few.named_parameters()}
    wanted = {name: tuple(p.shape) for name, p in model.named_parameters()}
    copied = sources({name: tuple(t.shape) for name, t in stored.items()}, wanted)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if (source := copied.get(name)) is None:
                p.copy_(stored[name])
            else:
                copies = Copies(stored[source], source, name, wanted[name], upcycle, 3, config.routing.scores)
                p.copy_(copies.part(tuple(slice(0, n) for n in wanted[name])))
    return model.eval()


@pytest.mark.parametrize(("scores", "scale"), [("softmax", 3.0), ("sigmoid", 1.0)])
def test_the_balance_bias_of_a_layer_that_grows_keeps_its_choices(scores, scale):
    routing = RoutingConfig(drop_tokens=False, normalize_weights=False, balance_rate=0.01, scores=scores)
    config = ModelConfig(
        layers=1, hidden=32, heads=2, experts=(4,), vocab=61, context=32, init_std=0.3, routing=routing
    )
    few = build(config, 1).eval()
    with torch.no_grad():
        few.blocks[0].ffn.router.balance_bias.copy_(torch.tensor([0.1, -0.1, 0.05, -0.05]))
    more = grown(few, replace(config, experts=(12,)), UpcycleConfig(noise=1e-5, scale=scale))
    tokens = torch.randint(61, (16, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before, after = few(tokens), more(tokens)
    chosen, copies = before.routing[0].expert_SK, after.routing[0].expert_SK
    assert len(chosen.unique()) > 1 and (copies >= 4).any()
    assert torch.equal(copies % 4, chosen)
    torch.testing.assert_close(after.logits_BTV, before.logits_BTV, rtol=1e-3, atol=1e-3)
