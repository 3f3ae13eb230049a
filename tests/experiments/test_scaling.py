"""Scaling: the pairs at equal tokens, and the pair on another text."""

from dataclasses import replace

import pytest

from moelab.design import comparison, rates
from moelab.design import verdicts as claims
from moelab.experiments import scaling
from tests.experiments.helpers import final


def test_the_pair_on_another_text_is_the_same_training():
    specs = {s.label: s for s in rates.at_own(scaling.EXPERIMENT.specs("full"))}
    for arm in scaling.BUDGETED:
        there, other = specs[arm], specs[scaling.on_other_text(arm)]
        assert other.data == replace(there.data, corpus="mix5")
        assert (other.model, other.train) == (there.model, there.train)
    here = {"350M": [4.0], "350M+MoE-128": [3.6]}
    table = final({**here, "350M on mix5": [4.0, 4.0], "350M+MoE-128 on mix5": [3.7, 3.8]})
    gaps = scaling.over_texts(table).groupby("text")["gap"].mean()
    assert gaps.to_dict() == {"mix15": pytest.approx(-0.4), "mix5": pytest.approx(-0.25)}
    assert not len(scaling.over_texts(final(here)))


def test_equal_tokens_pairs_each_moe_with_both_dense_models():
    table = final({"350M": [4], "350M+MoE-128": [2], "1.3B": [1]})
    pairs = comparison.pairs(table, scaling.AGAINST)
    assert dict(zip(pairs["right"], pairs["gap"], strict=True)) == {"350M": -2, "1.3B": 1}
    assert set(scaling.paper_pairs()) >= set(pairs["arm"])


def test_scaling_judges_the_base_and_only_shows_the_larger_model():
    table = final({"350M": [5.0, 5.1, 5.2], "350M+MoE-128": [4.9, 5.01, 5.1], "1.3B": [4.6, 4.7, 4.8]}).assign(
        tokens=16_384_000
    )
    verdicts = {v.claim: v for v in scaling.verdicts(table, "cpu")}
    assert verdicts["moe128-350m-beats-own-base"].verdict == claims.DIRECTION
    assert verdicts["moe128-350m-beats-1.3b"].verdict == claims.NOT_TESTABLE
    assert verdicts["moe128-350m-beats-1.3b"].ours == pytest.approx(0.303, abs=0.01)
    assert verdicts["moe128-1.3b-beats-own-base"].verdict == claims.NOT_TESTED
