"""All-to-all: what is counted equals the formulas and the simulator's counts."""

import pandas as pd
import pytest

from moelab.design import verdicts as claims
from moelab.experiments import all_to_all
from moelab.simulate import all_to_alls


def test_counts_of_the_exchanges_are_the_papers_and_the_simulators():
    counted = pd.DataFrame(all_to_all.counts((8, 32, 128)))
    for what in all_to_all.COUNTED:
        assert counted[what].tolist() == counted[f"formula_{what}"].tolist() == counted[f"simulated_{what}"].tolist()
    verdicts = {v.claim: v for v in all_to_all.verdicts(counted)}
    assert {v.verdict for v in verdicts.values()} == {claims.HOLDS}
    assert verdicts["hierarchical-hops"].ours == pytest.approx(10 / 31) and verdicts["pcc-hops"].ours == 16 / 128
    assert verdicts["hierarchical-volume"].ours == 2 and "1.68" in verdicts["hierarchical-volume"].note


def test_the_simulated_exchange_pays_with_ranks():
    found = all_to_alls.times().set_index(["bytes", "way", "ranks"])["ratio"]
    for size in (1 << 14, 1 << 18, 1 << 22):
        assert found[size, "hierarchical", 8] == 1 and found[size, "hierarchical", 256] < 0.7
        assert found[size, "coordinated", 256] < found[size, "hierarchical", 256]
