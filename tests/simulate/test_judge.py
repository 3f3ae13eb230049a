"""The simulator beside public measurements: predictions in the rows' units, ranges, and the fit's rows."""

import json
import math

import numpy as np
import pytest

from moelab.simulate import judge, public
from moelab.simulate.constants import MODERN_START, calibration, modern

OPEN = public.half("open")
FIRST = {group: next(m for m in OPEN if m.group == group) for group in public.GROUPS}


@pytest.mark.parametrize("group", public.GROUPS)
def test_a_row_of_each_group_is_predicted(group):
    value = judge.predict(FIRST[group])
    assert math.isfinite(value) and FIRST[group].value / 5 < value < FIRST[group].value * 5


def test_an_error_is_of_the_time_for_times_and_rates():
    time = next(m for m in OPEN if m.metric == "time")
    rate = next(m for m in OPEN if m.metric == "rate")
    assert judge.log_ratio(time) == pytest.approx(np.log(judge.predict(time) / time.value))
    assert judge.log_ratio(rate) == pytest.approx(-np.log(judge.predict(rate) / rate.value))


def test_a_product_by_hand():
    """1 x 1024 rows of 7168 x 4096 in fp8 on an H800: bound by operations, and what a product adds."""
    m = next(m for m in OPEN if m.id == "deepgemm-grouped-masked-1")
    known = MODERN_START.with_free({"matmul_share": 0.5, "product_us": 10.0, "memory_share": 0.5})
    flops = 2 * 1024 * 4096 * 7168
    assert judge.predict(m, known) == pytest.approx(flops / (flops / (989e6 * 2 * 0.5) + 10) / 1e6)


def test_ranges_keep_nine_of_ten_open_rows():
    found = judge.rows(OPEN)
    for group in public.GROUPS:
        own = [r["within"] for r in found if r["group"] == group]
        assert sum(own) / len(own) >= judge.CONFIDENCE
    for r in found:
        edge = 1 + 1e-9
        assert r["within"] == (r["low"] / edge <= r["published"] <= r["high"] * edge)


def test_the_summary_counts_every_row_once():
    found = judge.rows(OPEN)
    table = judge.summary(found)
    assert sum(r["rows"] for r in table) == len(found) and {r["half"] for r in table} == {"open"}
    assert sum(r["within"] for r in table) == sum(r["within"] for r in found)


def test_the_stored_fit_is_that_of_the_rows_it_names():
    stored = calibration("calibration_modern.json")
    assert list(stored["rows"]) == [m.id for m in public.fitted_on()]
    for m in public.fitted_on():
        assert judge.log_ratio(m, modern()) == pytest.approx(stored["rows"][m.id], abs=2e-3)


def test_the_command_prints_a_group(capsys):
    from typer.testing import CliRunner

    from moelab.cli.simulate import app

    shown = CliRunner().invoke(app, ["score", "--public", "--group", "prefill", "--json"])
    assert shown.exit_code == 0
    got = json.loads(shown.output)
    assert {r["group"] for r in got["rows"]} == {"prefill"} and got["seal"] == public.seal()
