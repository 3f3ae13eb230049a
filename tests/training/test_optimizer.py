"""The optimizer is torch's AdamW, step for step."""

import torch

from moelab.training.optimizer import AdamW


def test_it_is_torchs_adamw_bit_for_bit():
    torch.manual_seed(0)
    start, gradients = [torch.randn(5, 3), torch.randn(3)], [[torch.randn(5, 3), torch.randn(3)] for _ in range(4)]
    found = []
    for kind in (AdamW, torch.optim.AdamW):
        parameters = [torch.nn.Parameter(t.clone()) for t in start]
        groups = [{"params": parameters[:1], "weight_decay": 0.1}, {"params": parameters[1:], "weight_decay": 0.0}]
        optimizer = kind(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8, fused=True)
        for step, values in enumerate(gradients):
            for parameter, value in zip(parameters, values, strict=True):
                parameter.grad = value.clone()
            optimizer.step()
            optimizer.zero_grad()
            if step == 1:
                state = optimizer.state_dict()
                optimizer = kind(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8, fused=True)
                optimizer.load_state_dict(state)
        found.append([*parameters, *(t for p in parameters for t in optimizer.state[p].values())])
    assert len(found[0]) == 2 + 2 * 3
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(parameter.requires_grad for parameter in found[0][:2])
