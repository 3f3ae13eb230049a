"""The baseline's gate against the kernels' gate: the same choices, slots, weights, losses and gradients."""

import itertools

import pytest
import torch
from moelab.kernels import gate

from moelab.config import RoutingConfig
from moelab.models.baseline import mask_gate
from moelab.models.routing import Router


def assert_same(found, expected):
    for name in ("expert_SK", "slot_SK", "load_E", "kept_E"):
        a, b = getattr(found, name), getattr(expected, name)
        assert a.dtype == b.dtype and torch.equal(a, b), name
    for name in ("weight_SK", "aux_loss", "z_loss"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("rules", [{}, {"seed": 3}, {"normalize": True}, {"seed": 3, "normalize": True}], ids=str)
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_mask_gate_equals_the_kernels_gate(top_k, rules):
    generator = torch.Generator().manual_seed(0)
    for tokens, capacity in itertools.product((0, 1, 67), (None, 1, 5, 1000)):
        logits, noisy = (torch.randn(tokens, 5, generator=generator) for _ in range(2))
        for choice in (None, noisy):
            grads = []
            for function in (mask_gate, gate):
                leaf = logits.clone().requires_grad_()
                routing = function(leaf, top_k, capacity, choice_logits_SE=choice, **rules)
                weights = torch.linspace(-1, 1, tokens * top_k).view(tokens, top_k)
                ((routing.weight_SK * weights).sum() + routing.aux_loss + routing.z_loss).backward()
                grads.append((routing, leaf.grad))
            assert_same(grads[0][0], grads[1][0])
            torch.testing.assert_close(grads[0][1], grads[1][1])


def test_ties_and_all_tokens_to_one_expert():
    logits = torch.zeros(9, 4)
    for capacity, seed in ((None, None), (3, None), (3, 7)):
        assert_same(mask_gate(logits, 2, capacity, seed=seed), gate(logits, 2, capacity, seed=seed))


def test_equal_draws_go_to_the_lower_token(monkeypatch):
    """As the kernels' gate has it, whichever of a token's choices the expert is."""
    monkeypatch.setattr("moelab.models.baseline.priorities", lambda seed, S, K, device: torch.ones(S, K).long())
    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0]])  # expert 0 is token 0's second choice
    assert mask_gate(logits, 2, 1, seed=0).slot_SK.tolist() == [[0, 0], [-1, -1], [-1, -1]]


def test_a_token_that_cannot_be_routed_shows_in_the_loss():
    router = Router(4, 4, 1, RoutingConfig(scores="sigmoid"))
    torch.nn.init.normal_(router.weight)
    x = torch.randn(5, 4)
    assert router(x).loss.isfinite()
    x[2] = torch.inf
    assert router(x).loss.isnan()


@pytest.mark.parametrize(
    "routing", [RoutingConfig(), RoutingConfig(choice_noise="gumbel", input_jitter=0.01, aux_scope="step")]
)
def test_a_router_follows_its_rules_with_either_gate(routing):
    router = Router(8, 4, 2, routing)
    torch.nn.init.normal_(router.weight)
    router.pool = lambda share: share / 2
    x, found = torch.randn(40, 8), []
    for function in (gate, mask_gate):
        torch.manual_seed(1)
        router.gate = function
        found.append(router(x))
    assert_same(*found)
