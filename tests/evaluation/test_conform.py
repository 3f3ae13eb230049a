"""Somebody's MoE layer: the reference passes every check, and each broken layer fails the one that is about it."""

import random

import pytest
import torch
from torch import nn

from moelab.config import ModelConfig, RoutingConfig
from moelab.evaluation import conform
from moelab.models import build


class Broken(nn.Module):
    """The reference, with one thing broken."""

    def __init__(self, *sizes):
        super().__init__()
        self.moe = conform.reference(*sizes)

    def forward(self, x):
        return self.moe(x)


class Leaks(Broken):
    """A token's output depends on the other tokens."""

    def forward(self, x):
        y, routing = self.moe(x)
        return y + 0.1 * y.mean((0, 1)), routing


class CountsTwice(Broken):
    """A buffer counts the tokens of each forward pass."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += x[..., 0].numel()
        return self.moe(x)


class Random(Broken):
    """Noise that torch's seed does not decide."""

    def forward(self, x):
        y, routing = self.moe(x)
        return y * (1 + 1e-6 * random.random()), routing


class Detached(Broken):
    """The input's gradient lacks half of the output."""

    def forward(self, x):
        y, routing = self.moe(x)
        return 0.5 * (y + y.detach()), routing


class Unbalances(Broken):
    """The balancing loss has the wrong sign."""

    def forward(self, x):
        y, routing = self.moe(x)
        return y, {"expert_SK": routing.expert_SK, "aux_loss": -routing.aux_loss}


class DropsAtRandom(Broken):
    """Experts drop below the capacity of the busiest one."""

    def forward(self, x):
        y, routing = self.moe(x)
        slot_SK = routing.slot_SK.clone()
        slot_SK[::7] = -1
        return y, {"expert_SK": routing.expert_SK, "slot_SK": slot_SK}


class Scales(Broken):
    """Gradients depend on the number of sequences in the batch."""

    def forward(self, x):
        y, routing = self.moe(x)
        return y / len(x), routing


class Twice(Broken):
    """Both choices are the same expert."""

    def forward(self, x):
        y, routing = self.moe(x)
        return y, {"expert_SK": routing.expert_SK[:, :1].expand(-1, 2)}


class Narrow(Broken):
    """The output lacks a column."""

    def forward(self, x):
        return self.moe(x)[0][..., 1:]


def failed(make):
    return {check.name for check in conform.conform(make) if check.passed is False}


def test_the_reference_passes_every_check():
    assert [check.passed for check in conform.conform(conform.reference)] == [True] * 7
    assert [check.passed for check in conform.conform(conform.reference, 16, 4, 1)] == [True] * 7


@pytest.mark.parametrize(
    ("make", "check"),
    [
        (Leaks, "drops"), (CountsTwice, "recomputation"), (Random, "determinism"), (Detached, "gradients"),
        (Unbalances, "balancing loss"), (DropsAtRandom, "drops"), (Scales, "accumulation"), (Twice, "output and choices"),
    ],
)  # fmt: skip
def test_what_is_broken_fails_its_check(make, check):
    others = {"drops", "accumulation"} if make in (Leaks, Scales) else {check}
    assert check in failed(make) <= others


def test_a_layer_that_raises_or_has_another_shape_fails_and_says_why():
    checks = conform.conform(lambda *_: nn.Linear(3, 3))
    assert not any(check.passed for check in checks) and "shapes cannot be multiplied" in checks[0].found
    assert "output and choices" in failed(Narrow)


def test_what_a_layer_does_not_say_is_not_checked():
    dense = conform.conform(lambda hidden, *_: nn.Linear(hidden, hidden))
    named = {check.name: check.passed for check in dense}
    assert named.pop("balancing loss") is None and all(named.values())


def test_drops_at_one_capacity_pass_and_are_not_accumulated():
    config = ModelConfig(
        layers=1, hidden=32, heads=1, experts=(8,), top_k=2, vocab=16, context=16, init_std=0.2, routing=RoutingConfig()
    )
    limited = conform.conform(lambda *_: build(config, 0).blocks[0].ffn)
    named = {check.name: check for check in limited}
    assert named["drops"].passed and "choices dropped at capacity" in named["drops"].found
    assert named["accumulation"].passed is None and named["gradients"].passed


def test_an_import_path_is_executed_and_errors_are_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_own_layer.py").write_text(
        "class A:\n    value = 3\n    @staticmethod\n    def make(*_): return 7\n"
    )
    assert conform.load("my_own_layer:A.make")() == 7
    for path, said in (
        ("my_own_layer", "expected module:callable"),
        ("my_own_layer:B", "AttributeError"),
        ("my_own_layer:A.value", "is no callable, but int"),
        ("no_such_module_here:B", "ModuleNotFoundError"),
    ):
        with pytest.raises(ValueError, match=said) as error:
            conform.load(path)
        assert "\n" not in str(error.value)
