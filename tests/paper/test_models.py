"""The paper's sizes beside ours, which tests/config compares with the built models, and what contradicts them."""

import pytest

from moelab import paper
from moelab.config import ModelConfig


def size(layers, hidden, experts):
    """Billions of parameters, with heads of 128."""
    return ModelConfig(layers=layers, hidden=hidden, heads=hidden // 128, experts=experts).parameters() / 1e9


@pytest.mark.parametrize("row", paper.models(), ids=lambda row: row.model)
def test_sizes_and_shapes(row):
    """Stated sizes within 0.7 % or the printed digits; the 350M of the name is the one nominal exception."""
    assert row.heads is None or row.hidden % row.heads == 0
    assert (row.top_k == 0) == (not row.moe_layers) and all(number % 2 == 0 for number in row.moe_layers)
    assert row.experts_kind in {"stated", "derived", "assumed"}
    if row.moe_layers and "Half" not in row.model:
        assert row.moe_layers == tuple(range(2, row.layers + 1, 2))
    assert (row.stated_B is None) == (row.stated_kind == "none") == (row.stated_precision_B is None)
    if row.stated_B:
        error = abs(row.computed_B - row.stated_B)
        agrees = error <= max(0.007 * row.stated_B, row.stated_precision_B)
        nominal = row.stated_kind == "nominal" and "nominal-350m" in row.conflict and error < 0.02 * row.stated_B
        assert agrees == (row.model != "350M") and (agrees or nominal)


def test_active_parameters_of_residual_and_top2_agree():
    """The residual MLP costs what the second expert of Top-2 costs, up to the two mixing coefficients."""
    residual, top2 = paper.model("350M+Residual-MoE-32"), paper.model("350M+Top2-MoE-32")
    assert residual.active_B == pytest.approx(top2.active_B, rel=1e-4)
    assert top2.active_B - paper.model("350M+MoE-32").active_B == pytest.approx(12 * 8.39e-3, rel=1e-3)


def test_table_6_layers_are_swapped_in_one_copy():
    sizes = {
        (base, layers): size(layers, hidden, (0, 128) * (layers // 2))
        for base, hidden in (("8B", 4096), ("24B", 8192))
        for layers in (30, 40)
    }
    assert sizes["8B", 40] == pytest.approx(349.0, rel=1e-3) and sizes["24B", 30] == pytest.approx(1046.9, rel=1e-3)
    assert sizes["8B", 30] == pytest.approx(262.0, rel=1e-3) and sizes["24B", 40] == pytest.approx(1396.4, rel=1e-3)
    assert paper.model("8B+MoE-128").layers == 40 and paper.model("24B+MoE-128").layers == 30
    for name in ("8B+MoE-128", "24B+MoE-128"):
        assert "table6-layers" in paper.model(name).conflict


def test_other_size_conflicts():
    assert size(16, 3584, (0, 128) * 8) == pytest.approx(107.7 * (1 - 0.0057), rel=1e-3)  # size-2.4b
    dense = ModelConfig.parse("2.4B")
    assert round(dense.parameters() / 1e9, 1) == 2.7  # name-2.4b-24b
    assert dense.non_embedding_parameters() / 1e9 == pytest.approx(2.47, abs=0.005)
    assert size(44, 8192, ()) == pytest.approx(35.87, abs=0.01)
    assert size(44, 8192, (0, 128) * 22) == pytest.approx(1536, rel=1e-3)  # fig15-equivalence
    pyramid, pr_moe = paper.model("350M+Pyramid-MoE-32/64"), paper.model("350M+PR-MoE-32/64")  # pr-moe-350m-digits
    assert round(pyramid.computed_B, 1) == 4.0 and round(pr_moe.computed_B, 1) == 4.1
    ratio = paper.model("1.3B").computed_B / paper.model("350M").computed_B  # dense-equivalent-ratio
    assert ratio == pytest.approx(3.70, abs=0.005)
    assert paper.model("6.7B").computed_B / paper.model("1.3B").computed_B == pytest.approx(5.06, abs=0.005)
    mixing = 12 * (2 * 1024 + 2) / 1e9  # residual-sum-or-mix
    assert mixing / paper.model("350M+Residual-MoE-32").computed_B < 2e-5


def test_the_sizes_are_the_papers():
    sizes = paper.size_table()
    assert sizes.loc["350M+PR-MoE-32/64", "MoE layers x experts"] == "10 x 32, 2 x 64"
    assert len(sizes) >= 9 and sizes["off"].abs().max() < 0.03
    assert sizes.loc["350M+MoE-128", "active (B)"] < 1.01 * sizes.loc["350M", "active (B)"]
