"""Laws of the loss over size and experts."""

import math

import numpy as np
import pandas as pd
import pytest

from moelab.design import expert_laws
from moelab.design.expert_laws import DenseCurve, Law, fit, fit_dense, saturated

LAWS = [
    Law("separable", -0.1, -0.04, 0.0, 1.2, 0.0, 1.0, math.inf),
    Law("bilinear", -0.09, -0.11, 0.009, 1.1, 0.0, 2.0, 300.0),
    Law("effective", -0.3, 0.35, 0.0, 0.3, 1.5, 2.0, 100.0),
    Law("regression", -0.3, -0.05, 0.004, 0.3, 1.5, 1.0, math.inf),
]
SIZES, EXPERTS = (1e5, 4e5, 1.6e6), tuple(2**i for i in range(9))


def runs(law, noise=0.0, experts=EXPERTS, seeds=2):
    draw = np.random.default_rng(5)
    keys = [(size, e) for size in SIZES for e in experts for _ in range(seeds)]
    losses = [float(law.loss(size, e)) * math.exp(draw.normal(0, noise)) for size, e in keys]
    return pd.DataFrame(keys, columns=["parameters", "experts"]).assign(loss=losses)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.form)
def test_a_law_is_found_again_from_exact_losses(law):
    found = fit(runs(law), law.form, draws=3)
    for name in ("a", "b", "c", "d", "floor", "start", "most"):
        assert getattr(found.law, name) == pytest.approx(getattr(law, name), abs=1e-3, rel=1e-3), name
    assert found.scatter < 1e-3
    experts, far = np.array(EXPERTS, dtype=float), np.full(len(EXPERTS), 1e9)
    assert found.law.loss(1e9, experts) == pytest.approx(law.loss(1e9, experts), abs=1e-4)
    gains = found.predict(far, experts, law.dense)
    assert gains[:, 0] == pytest.approx(law.gain(far, experts, law.dense), abs=1e-4)
    assert gains[0] == pytest.approx([0, 0, 0]), "a dense model gains nothing"


def test_intervals_widen_with_the_noise_and_where_nothing_tells_how_the_gain_begins():
    law, at = LAWS[2], ([1e8], [4.0])
    quiet, loud = (fit(runs(law, noise), "effective", draws=40) for noise in (0.001, 0.01))
    blind = fit(runs(law, 0.001, (1, 16, 64, 256)), "effective", draws=40)
    widths = [float(np.diff(found.predict(*at, law.dense)[0, 1:])[0]) for found in (quiet, loud, blind)]
    assert widths[0] < widths[1] and widths[0] < widths[2]
    low, high = fit(runs(law, 0.003, seeds=8), "effective", draws=60).predict(*at, law.dense)[0, 1:]
    assert low < float(law.gain(1e8, 4, law.dense)) < high


def test_few_seeds_share_one_spread_that_a_bootstrap_within_settings_understates():
    draw, cells = np.random.default_rng(1), [np.array([x - 0.01, x + 0.01]) for x in (3.0, 2.9, 2.8, 2.7)]
    means = np.array([expert_laws.redrawn(cells, draw) for _ in range(4000)])
    sd, freedom = math.sqrt(0.0002 / 2), len(cells)  # of a mean of two; every cell has the same variance
    assert means.mean(axis=0) == pytest.approx([c.mean() for c in cells], abs=1e-3)
    assert means.std(axis=0) == pytest.approx([sd * math.sqrt(freedom / (freedom - 2))] * 4, rel=0.1), "Student's t"
    once = np.array([expert_laws.redrawn([*cells, np.array([3.5])], draw)[-1] for _ in range(4000)])
    assert once.std() == pytest.approx(sd * 2, rel=0.1), "a setting of one run moves by the others' spread"
    with pytest.raises(ValueError, match="a setting with two runs"):
        expert_laws.redrawn([np.array([3.0])], draw)
    law, at = LAWS[2], ([1e8], [64.0])
    noisy = runs(law, 0.01)
    pooled, within = (fit(noisy, "effective", draws=60, pooled=p).draws for p in (True, False))
    spread = [np.std([float(d.effect(*at)[0]) for d in draws]) for draws in (pooled, within)]
    assert spread[0] > spread[1]


def test_an_effective_count_is_read_along_the_other_curve_and_a_ratio_multiplies_its_loss():
    curve = DenseCurve(floor=1.0, a=-0.15, d=1.1)
    times = math.exp(float(LAWS[2].effect(1e8, 16)))
    assert LAWS[2].gain(1e8, 16, curve) == pytest.approx(curve.loss(1e8) - curve.loss(times * 1e8))
    ratio = math.exp(float(LAWS[1].effect(1e8, 16)))
    assert LAWS[1].gain(1e8, 16, curve) == pytest.approx((1 - ratio) * curve.loss(1e8))
    assert LAWS[3].gain(1e8, 16, curve) == pytest.approx(-(-0.05 + 0.004 * math.log(100)) * math.log(16))


def test_the_dense_curve_is_found_again_and_inverts():
    curve = DenseCurve(floor=1.0, a=-0.13, d=1.1)
    sizes = np.array([1.5e7, 5e7, 1.3e8, 1.3e9])
    found = fit_dense(sizes, curve.loss(sizes))
    assert found.floor == pytest.approx(1.0, abs=1e-3) and found.loss(5e9) == pytest.approx(curve.loss(5e9), abs=1e-4)
    assert curve.parameters(curve.loss(sizes)) == pytest.approx(sizes)
    assert np.isinf(curve.parameters(np.array([1.0, 0.5]))).all()
    with pytest.raises(ValueError, match="a dense curve needs three sizes, got 2"):
        fit_dense(sizes[:2], curve.loss(sizes[:2]))


def test_saturation_begins_and_ends_where_it_should():
    assert saturated(1, 2.0, 300.0) == pytest.approx(2.0)
    assert saturated(1e9, 2.0, 300.0) == pytest.approx(300.0, rel=1e-5)


def test_too_few_settings_are_refused():
    law = LAWS[1]
    with pytest.raises(ValueError, match="a bilinear law needs more than 3 settings"):
        fit(runs(law, experts=(1, 64)), "bilinear")
    assert expert_laws.FORMS == tuple(law.form for law in LAWS)
