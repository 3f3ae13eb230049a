"""Titles of figures."""

from __future__ import annotations

import json

import pytest

from moelab import paths
from moelab.design import titles

WAITING = {
    ("ladder", "cpu"),
    ("learning-rate", "full"),
    ("seeds", "full"),
    ("start", "cpu"),
    ("zero-shot", "cpu"),
    ("zero-shot", "full"),
}
"""Experiments and scales that were published with longer titles, and were not published again yet: those of zero-shot and
of seeds need weights that are gone, the ladder without its larger rung stays as it was predicted."""


def test_a_title_leaves_out_interval_and_seeds():
    said = "1.3B base: B minus A: -0.024 nats, inconclusive (95 % interval -0.099 to +0.052, 3 seeds) with 34% of it"
    assert titles.short(said) == "1.3B base: B minus A: -0.024 nats, inconclusive"
    assert titles.short("4 ends 0.6 nats below 1 (dense) (1 seed, no spread)") == "4 ends 0.6 nats below 1 (dense)"
    assert titles.short("A level with B; without seed 2 of B") == "A level with B"


@pytest.mark.parametrize(
    ("count", "said"), [(3, "Ends: a0 +0.0, a1 -0.1, a2 -0.2 nats"), (6, "Ends: +0.0 (a0) to -0.5 (a5) nats")]
)
def test_many_arms_become_the_highest_and_the_lowest(count, said):
    values = {f"a{i}": i / -10 if i else 0.0 for i in range(count)}
    assert titles.listed("Ends:", values, "+.1f", "nats") == said


def test_titles_of_published_figures_have_at_most_twelve_words():
    summaries = [json.loads(file.read_text(encoding="utf-8")) for file in paths.results().glob("*/*/*/summary.json")]
    longer = {
        (one["experiment"], one["scale"])
        for one in summaries
        if any(len(figure["title"].split()) > titles.WORDS for figure in one["figures"])
    }
    assert longer == WAITING
