from dataclasses import replace

import pytest
import torch

from moelab.config import ModelConfig
from moelab.models import build


def test_the_future_does_not_leak(tiny_model):
    model = build(replace(tiny_model, routing=replace(tiny_model.routing, drop_tokens=False)), 0).eval()
    tokens = torch.randint(320, (2, 20), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 12:] = 7
    a, b = model(tokens).logits_BTV, model(changed).logits_BTV
    torch.testing.assert_close(a[:, :12], b[:, :12])
    assert not torch.allclose(a[:, 12:], b[:, 12:])


def test_initial_weights_depend_on_seed_and_name_alone(tiny_model):
    moe = dict(build(tiny_model, 3).named_parameters())
    dense = dict(build(replace(tiny_model, experts=(), residual=False), 3).named_parameters())
    wider = dict(build(replace(tiny_model, experts=(0, 4, 0, 8)), 3).named_parameters())
    other = dict(build(tiny_model, 4).named_parameters())
    shared = moe.keys() & dense.keys()
    assert len(shared) > 20, "arms start from the same shared weights"
    assert all(torch.equal(moe[n], dense[n]) for n in shared)
    up = "blocks.3.ffn.experts.up"
    assert torch.equal(moe[up], wider[up][:4]) and not torch.equal(moe[up][0], moe[up][1])
    assert not torch.equal(moe[up], other[up])


def test_initial_loss_is_that_of_guessing():
    config = ModelConfig.parse("350M+PR-MoE-32/64 twin")
    tokens = torch.randint(config.vocab, (2, 65), generator=torch.Generator().manual_seed(0))
    output = build(config, 0)(tokens[:, :-1], targets_BT=tokens[:, 1:])
    assert float(output.loss.detach()) == pytest.approx(torch.log(torch.tensor(4096.0)).item(), abs=0.15)
    assert len(output.routing) == 4
    aux = float(output.routing_loss().detach())
    assert 0.04 <= aux < 0.12, "0.01 a layer, summed, and a little above its least value at the start"


def test_too_long_a_sequence_is_refused(tiny_model):
    with pytest.raises(ValueError, match="sequence of 33 tokens is longer than the context of 32"):
        build(tiny_model, 0)(torch.zeros(1, 33, dtype=torch.long))
