"""Figures of sweeps: curves over one setting, heat maps over two, points side by side over more."""

import pandas as pd
import pytest

from moelab.plotting import layout, sweeps


def table(**varied) -> pd.DataFrame:
    """All combinations of these values for two arms."""
    rows = [{}]
    for name, values in varied.items():
        rows = [{**row, name: value} for row in rows for value in values]
    rows = [{**row, "arm": arm} for row in rows for arm in ("Dense", "MoE-128")]
    for i, row in enumerate(rows):
        row |= {"loss": 4 - 0.1 * i, "gap": i if i % 2 else None, "gap_low": None, "gap_high": None}
        row |= {"loss_low": 3.9 - 0.1 * i if i % 3 else None, "loss_high": 4.1 - 0.1 * i if i % 3 else None}
    return pd.DataFrame(rows)


def draw(found: pd.DataFrame, *varied: str, **more: str):
    return sweeps.draw(found, varied, series="arm", values={"loss": "loss (nats)", **more})


@pytest.mark.parametrize(
    ("values", "scale", "ticks"),
    [
        ([1024, 2048, 4096], "linear", ["1024", "2048", "4096"]),
        ([0.001, 0.004, 0.016], "log", ["0.001", "0.004", "0.016"]),
        (["on", "off"], "linear", ["on", "off"]),
        ([4_000_000, 16_400_000], "linear", ["4 M", "16.4 M"]),
        ([True, False], "linear", ["true", "false"]),
    ],
)
def test_a_curve_for_each_arm_over_one_setting(values, scale, ticks):
    (ax,) = draw(table(x=values), "x").axes
    assert ax.get_xscale() == scale and [label.get_text() for label in ax.get_xticklabels()] == ticks
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["Dense", "MoE-128"]
    lines = [c.lines[0] for c in ax.containers]
    for arm, line in enumerate(lines):
        assert list(line.get_ydata()) == pytest.approx([4 - 0.2 * i - 0.1 * arm for i in range(len(values))])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("x", "loss (nats)")


def test_a_heat_map_for_each_arm_over_two():
    axes = draw(table(x=[1, 2, 3], y=["a", "b"]), "x", "y").axes
    assert [ax.get_title(loc="left") for ax in axes] == ["Dense", "MoE-128"]
    limits = {ax.images[0].get_clim() for ax in axes}
    assert len(limits) == 1, "one range of colours for all arms"
    first = axes[0].images[0].get_array()
    assert first.shape == (2, 3) and first[0, 0] == 4 and first[1, 0] == pytest.approx(3.8)
    texts = [text.get_text() for text in axes[0].texts]
    assert texts[:2] == ["4", "3.8\n± 0.1"] and len(texts) == 6
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["a", "b"]
    missing = draw(table(x=[1, 2], y=["a", "b"]).drop(index=[0, 1]), "x", "y").axes[0].images[0].get_array()
    assert missing.mask.sum() == 1, "a point that is missing leaves its cell empty"


def test_over_three_settings_the_points_stand_side_by_side():
    (ax,) = draw(table(x=[1, 2], y=["a", "b"], z=[True, False]), "x", "y", "z").axes
    assert len(ax.get_xticks()) == 8 and ax.get_xticklabels()[0].get_text() == "1; a; true"
    assert ax.get_xlabel() == "x; y; z"


def test_series_of_their_own_units_have_panels_of_their_own():
    axes = draw(table(x=[1, 2]), "x", loss="").axes
    assert [ax.get_title(loc="left") for ax in axes] == ["Dense", "MoE-128"] and all(not ax.get_ylabel() for ax in axes)


@pytest.mark.parametrize(
    ("value", "said"),
    [(["Dense", "MoE-128"], "Dense, MoE-128"), (None, "null"), ("mix5", "mix5"), (2e9, "2 B"), (1e-4, "0.0001"), (0.1, "0.1")],
)  # fmt: skip
def test_values_as_short_texts(value, said):
    assert sweeps.text(value) == said


def test_a_second_value_has_a_panel_of_its_own_unless_no_point_has_it():
    found = table(x=[1, 2])
    left, right = draw(found, "x", gap="gap (nats)").axes
    assert (left.get_ylabel(), right.get_ylabel()) == ("loss (nats)", "gap (nats)")
    assert left.figure.get_figwidth() == layout.WIDTH, "its text is as large as that of all figures"
    (line,) = [c.lines[0] for c in right.containers]
    assert list(line.get_ydata()) == [1, 3] and line.get_color() == left.containers[1].lines[0].get_color()
    assert len(draw(found.assign(gap=None), "x", gap="gap (nats)").axes) == 1
