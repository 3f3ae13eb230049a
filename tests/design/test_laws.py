"""Laws of the loss over size and data."""

import math

import numpy as np
import pandas as pd
import pytest

from moelab.design import laws

LAW = laws.Law(floor=1.8, a=0.9, alpha=0.35, b=0.6, beta=0.45, flops0=2e6, tokens0=4e6)
FLOPS, TOKENS = (1e6, 2e6, 4e6), (1e6, 2e6, 4e6, 8e6, 16e6)


def points(noise=0.0, seeds=3, law=LAW, flops=FLOPS, tokens=TOKENS):
    draw = np.random.default_rng(3)
    rows = []
    for size in flops:
        for seed in range(seeds):
            shift = draw.normal(0, noise)  # the budgets of a trunk share it
            rows += [(size, seed, t, float(law.loss(size, t)) + shift + draw.normal(0, noise / 4)) for t in tokens]
    return pd.DataFrame(rows, columns=["flops", "seed", "tokens", "loss"])


def test_the_least_compute_of_a_loss_is_the_least_over_all_sizes():
    flops = np.geomspace(1e4, 1e9, 200_001)
    size = LAW.a * (flops / LAW.flops0) ** -LAW.alpha
    left = (2.9 - LAW.floor) ** (1 / LAW.beta) - size ** (1 / LAW.beta)
    flops, data = flops[left > 0], left[left > 0] ** LAW.beta
    tokens = LAW.tokens0 * (LAW.b / data) ** (1 / LAW.beta)
    assert LAW.loss(flops, tokens) == pytest.approx(2.9)
    assert LAW.compute(2.9) == pytest.approx((flops * tokens).min(), rel=1e-6)
    assert LAW.compute(1.8) == LAW.compute(1.0) == math.inf
    low, high = LAW.compute(2.4), LAW.compute(2.3)
    assert math.log(0.6 / 0.5) / math.log(high / low) == pytest.approx(LAW.exponent), "of the loss above the floor"


def test_the_larger_term_decides():
    """With endless tokens the size's term is left, and the reverse; between them the loss is above both."""
    size = LAW.a * (1e6 / LAW.flops0) ** -LAW.alpha
    assert LAW.loss(1e6, 1e30) == pytest.approx(LAW.floor + size)
    assert LAW.loss(1e40, 1e6) == pytest.approx(LAW.floor + LAW.b * (1e6 / LAW.tokens0) ** -LAW.beta)
    wider = [float(LAW.loss(1e6, tokens) - LAW.loss(4e6, tokens)) for tokens in TOKENS]
    assert wider == sorted(wider), "a wider model gains more, the more tokens there are"


def test_a_law_is_found_again_from_exact_points():
    found = laws.fit(points())
    assert len(found.draws) == laws.DRAWS
    assert found.law.floor == pytest.approx(1.8, abs=0.01)
    assert found.law.exponent == pytest.approx(LAW.exponent, abs=0.01)
    assert found.law.compute(2.6) == pytest.approx(LAW.compute(2.6), rel=0.02)
    (value, low, high), *_ = found.predict(8e6, TOKENS, seeds=3)
    assert low - 1e-9 <= value <= high + 1e-9 and value == pytest.approx(float(LAW.loss(8e6, TOKENS[0])), abs=0.002)
    assert high - low < 0.002


@pytest.mark.slow
def test_intervals_hold_the_truth_and_widen_with_the_noise():
    quiet, loud, again = (laws.fit(points(noise), draws=150) for noise in (0.003, 0.02, 0.02))
    assert len(loud.draws) == 150
    assert again.predict(8e6, TOKENS, 3) == loud.predict(8e6, TOKENS, 3), "the same points give the same numbers"
    for found in (quiet, loud):
        for value in (lambda law: law.floor, lambda law: law.exponent, lambda law: law.compute(2.6)):
            mean, low, high = found.interval(value)
            assert low <= mean <= high and low <= value(LAW) <= high

    def width(found, seeds, at):
        _, low, high = found.predict(8e6, TOKENS, seeds)[at]
        return high - low

    assert 2 * width(quiet, 3, -1) < width(loud, 3, -1) and width(loud, 9, 0) < width(loud, 1, 0)


def test_trunks_with_a_missing_or_infinite_loss_are_left_out():
    table = points()
    broken = table.assign(loss=table["loss"].where((table["seed"] > 0) | (table["flops"] > 1e6), math.inf)).drop(10)
    found = laws.fit(broken, draws=1)
    assert len(found.residuals) == 7 and found.law.floor == pytest.approx(1.8, abs=0.01)


@pytest.mark.parametrize("lacks", [{"flops": FLOPS[:2]}, {"tokens": TOKENS[:2]}, {"seeds": 0}])
def test_too_few_points_are_refused(lacks):
    with pytest.raises(ValueError, match=r"^a law of 5 numbers needs three sizes and three budgets, got \d and \d$"):
        laws.fit(points(**lacks))
