"""The simulator beside public measurements: predictions in the rows' units, ranges, and the fit's rows."""

import math

import pytest

from moelab.simulate import judge, public
from moelab.simulate.constants import MODERN_START, calibration, modern

OPEN = public.half("open")


@pytest.mark.parametrize("group", public.GROUPS)
def test_a_row_of_each_group_is_predicted(group):
    """Within a factor of five; an error is of the time, for times and rates."""
    row = next(m for m in OPEN if m.group == group)
    error = math.log(judge.predict(row) / row.value)
    assert abs(error) < math.log(5)
    assert judge.log_ratio(row) == pytest.approx(error if row.metric == "time" else -error)


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
    table = judge.summary(found)
    assert sum(r["rows"] for r in table) == len(found) and {r["half"] for r in table} == {"open"}
    assert sum(r["within"] for r in table) == sum(r["within"] for r in found)


def test_the_stored_fit_is_that_of_the_rows_it_names():
    stored = calibration("calibration_modern.json")
    assert list(stored["rows"]) == [m.id for m in public.fitted_on()]
    for m in public.fitted_on():
        assert judge.log_ratio(m, modern()) == pytest.approx(stored["rows"][m.id], abs=2e-3)
