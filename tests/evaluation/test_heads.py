"""What each head is for is measured as the loss without it, and the model stays as it was."""

import pytest
import torch

from moelab.config import ModelConfig
from moelab.data.batches import PAIRS, pairs, validation_batches
from moelab.evaluation.heads import Head, head_effects
from moelab.models import build


def test_the_effect_of_a_head_is_the_loss_of_the_model_without_it(data):
    config = ModelConfig(3, 32, 2, experts=(0, 4, 0), vocab=data.vocab_size, context=32, init_std=0.3)
    model = build(config, 1).eval()
    before = [p.detach().clone() for p in model.parameters()]
    found = head_effects(model, data, 4, 32, 256)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert [(h.layer, h.head) for h in found] == [(layer, head) for layer in (1, 2, 3) for head in (1, 2)]

    def losses() -> dict[str, float]:
        nats, kinds = [], []
        for _, x, y in validation_batches(data, 4, 32, 256):
            with torch.no_grad():
                nats.append(model(x, targets_BT=y, reduction="none").loss)
            kinds.append(pairs(x, y).flatten())
        nats, kinds = torch.cat(nats).double(), torch.cat(kinds)
        return {kind: float(nats[kinds == i].mean()) for i, kind in enumerate(PAIRS)}

    whole = losses()
    with torch.no_grad():
        model.blocks[1].attention.out.weight[:, 16:] = 0
    without = losses()
    assert found[3].rise == pytest.approx({kind: without[kind] - whole[kind] for kind in PAIRS}, abs=1e-5)
    assert any(abs(rise) > 1e-3 for head in found for rise in head.rise.values())


def test_a_head_copies_where_copyable_tokens_alone_need_it():
    assert Head(1, 1, {"repeated": 1.0, "changed": -0.1, "new": 0.1}).copies
    assert not Head(1, 1, {"repeated": 0.6, "changed": 0.7, "new": 0.6}).copies
    assert not Head(1, 1, {"repeated": 0.2, "changed": -0.1, "new": 0.0}).copies
