from __future__ import annotations

import json

import pytest

from moelab import paths
from moelab.design import titles

HELD = {"ladder", "learning-rate", "tries", "upcycling", "what-if"}
"""Experiments whose pages kept to the rule before it was one."""

SINCE = "2026-12-03T14:40"
"""Pages that were finished from here on keep to it, too."""


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
    latest = {}
    for one in sorted(summaries, key=lambda one: one["finished"]):
        latest[one["experiment"], one["scale"]] = one
    held = [one for one in latest.values() if one["experiment"] in HELD or one["finished"] >= SINCE]
    shown = [figure["title"] for one in held for figure in one["figures"]]
    assert len(shown) > len(HELD)
    assert [title for title in shown if len(title.split()) > titles.WORDS] == []
