"""A router with the baseline's gate and with the kernels' gate."""

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
