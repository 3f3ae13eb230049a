"""Draws follow the distribution that was asked for."""

import numpy as np
import pytest
import torch

from moelab.inference import Sampling
from moelab.inference.sampling import choose, uniforms

stats = pytest.importorskip("scipy.stats")
LOGITS = torch.tensor([1.0, 0.2, -0.5, 2.0, 0.2, -3.0])
DRAWS = 20_000


def frequencies(sampling, logits=LOGITS):
    """Of DRAWS tokens, equally spaced in probability: exact up to rounding."""
    u = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS
    return torch.bincount(choose(logits.expand(DRAWS, -1), u, sampling), minlength=len(logits)) / DRAWS


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_temperature_and_top_k(temperature):
    for k in (1, 2, 4, 6, 99, 0):
        kept = LOGITS / temperature
        kept[LOGITS.argsort(descending=True, stable=True)[k or 6 :]] = -torch.inf
        found = frequencies(Sampling(temperature=temperature, top_k=k))
        torch.testing.assert_close(found, kept.softmax(0), atol=2 / DRAWS, rtol=0)


def test_top_p_keeps_the_fewest_that_reach_it():
    p = LOGITS.softmax(0)  # 0.53, 0.20, twice 0.09, 0.04, less than 0.01
    order = p.argsort(descending=True, stable=True)
    for top_p, count in ((0.3, 1), (float(p[3]) - 1e-4, 1), (float(p[3]) + 1e-4, 2), (0.8, 3), (1.0, 6)):
        found = frequencies(Sampling(top_p=top_p))
        expected = torch.zeros(6)
        expected[order[:count]] = p[order[:count]]
        torch.testing.assert_close(found, expected / expected.sum(), atol=2 / DRAWS, rtol=0)
    assert frequencies(Sampling(top_k=2, top_p=0.72))[3] == 1, "of what top-k leaves: 0.53 / (0.53 + 0.20) = 0.73"


@pytest.mark.parametrize("others", [{}, {"top_k": 2}, {"top_p": 0.9}], ids=str)
@pytest.mark.parametrize("temperature", [0, 1e-30, 1e-40, 1e-46, 5e-324])
def test_the_coldest_is_the_likeliest(temperature, others):
    logits = torch.tensor([[1.0, 5.0, 3.0], [-300.0, -500.0, -400.0], [7.0, 7.0 - 1e-5, -torch.inf], [4.0, 5.0, 5.0]])
    u = torch.tensor([0.5, 0.999, 0.0, 0.0], dtype=torch.float64)
    assert choose(logits, u, Sampling(temperature=temperature, **others)).tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=3), Sampling(top_p=0.9)])
def test_draws_at_the_edges_stay_inside(sampling):
    """Rounding must not lead to a token of probability zero."""
    logits = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]] * 2)
    u = torch.tensor([0.0, np.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert choose(logits, u, sampling).tolist() == [0, 2]


def test_uniforms_are_uniform_and_independent_of_company():
    prompts = [(1, 2), (3,), (1, 2), (4, 5, 6)]
    rows = uniforms(7, prompts, 2000)
    assert all(stats.kstest(row, "uniform").pvalue > 1e-3 for row in rows)
    counts, _, _ = np.histogram2d(rows[0], rows[2], bins=4)
    assert stats.chisquare(counts.ravel()).pvalue > 1e-3, "equal prompts draw independently"
    np.testing.assert_array_equal(uniforms(7, [(4, 5, 6), (1, 2)], 50), rows[[3, 0], :50])
    assert (uniforms(8, prompts, 50) != rows[:, :50]).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (dict(max_new_tokens=0), "max_new_tokens must be at least 1, got 0"),
        (dict(temperature=-1.0), "temperature must be 0"),
        (dict(temperature=float("nan")), "temperature must be 0"),
        (dict(top_k=-1), "top_k must be 0"),
        (dict(top_p=0.0), "top_p must be above 0 and at most 1, got 0.0"),
        (dict(top_p=1.1), "top_p must be above 0 and at most 1, got 1.1"),
        (dict(seed=-2), "seed must not be negative, got -2"),
    ],
)
def test_bad_settings(given, message):
    with pytest.raises(ValueError, match=f"sampling: {message}"):
        Sampling(**given)
