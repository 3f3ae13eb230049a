"""Differences over training: ours with intervals, the paper's points beside them."""

import matplotlib
import pandas as pd
import pytest

from moelab.plotting import differences


@pytest.fixture
def ax():
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    fig, ax = plt.subplots()
    yield ax
    plt.close(fig)


def texts(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_gaps_over_budgets(ax):
    ours = [{"arm": "MoE", "per_parameter": 10.0 * n, "gap": -0.1 * n - 0.01 * s} for n in (1, 2) for s in (0, 1)]
    paper = pd.DataFrame({"per_parameter": [10, 20], "gap": [-0.1, -0.2], "low": [-0.2, -0.3], "high": [0, -0.1]})
    arms = ["MoE", "missing"]
    differences.over_budgets(pd.DataFrame(ours), ax, arms=arms, reference="Dense", paper=paper, label="paper: MoE")
    assert texts(ax) == ["MoE", "paper: MoE"] and ax.get_xscale() == "log"
    assert ax.get_ylabel().startswith("loss minus Dense's")


def test_gaps_over_shares(ax):
    ours = [{"pair": pair, "share": share, "gap": -share} for pair in ("M − D", "N − D") for share in (0.5, 1.0)]
    paper = {"M − D": pd.DataFrame({"share": [0.5], "gap": [-0.1], "low": [-0.2], "high": [0.0]})}
    differences.over_shares(pd.DataFrame(ours), ax, pairs=["M − D", "N − D"], paper=paper)
    assert sorted(texts(ax)) == sorted(["M − D", "N − D", "paper: M − D"])
