"""What the released baseline's calls explain of its time at 107B and 1T: no count does."""

import pytest

from moelab.simulate.baseline import counted


@pytest.fixture(scope="module")
def rows():
    return {row["bar"]: row for row in counted()}


def test_no_count_explains_both_large_bars(rows):
    """Waiting after every kernel bounds all that synchronises; copies and masks are small; eight slots miss 107B."""
    small, large = rows["2.4B+MoE-128, 128 GPUs"], rows["24B+MoE-128, 128 GPUs"]
    for row in (small, large):
        assert row["simulated_ms"] < row["every wait"] < row["paper_ms"]
        assert row["copies"] - row["simulated_ms"] < 0.06 * (row["paper_ms"] - row["simulated_ms"])
        assert row["masks"] - row["simulated_ms"] < 0.01 * row["paper_ms"]
    assert large["eight slots, fitted again"] == pytest.approx(large["paper_ms"], rel=0.1)
    assert small["eight slots, fitted again"] < 0.8 * small["paper_ms"]


def test_what_would_slow_the_large_bars_slows_the_fitted_ones(rows):
    at_64 = rows["1.3B+MoE-128, 64 GPUs"]
    assert at_64["every wait"] > 1.3 * at_64["paper_ms"] and at_64["eight slots"] > 1.08 * at_64["paper_ms"]
    assert rows["1.3B+MoE-128, 8 GPUs"]["two small kernels"] > 1.05 * rows["1.3B+MoE-128, 8 GPUs"]["paper_ms"]
    for row in rows.values():
        for name in ("eight slots", "two small kernels", "copies", "masks", "every wait"):
            assert row[name] >= row["simulated_ms"] * (1 - 1e-9), (row["bar"], name)
