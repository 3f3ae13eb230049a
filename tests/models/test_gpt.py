from dataclasses import replace

import pytest
import torch

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


def test_too_long_a_sequence_is_refused(tiny_model):
    with pytest.raises(ValueError, match="sequence of 33 tokens is longer than the context of 32"):
        build(tiny_model, 0)(torch.zeros(1, 33, dtype=torch.long))
