"""The public measurements: the rule of their halves, the seal, and that every row can be read."""

import pytest

from moelab.simulate import public
from moelab.simulate.hardware import cluster


def test_the_sealed_half_is_the_one_that_was_fixed():
    seal = public.seal()
    assert public.sealed_digest() == seal["sealed_sha256"]
    counts = [len(public.half("open")), len(public.half("sealed")), len(public.fitted_on())]
    assert counts == [seal["open"], seal["sealed"], seal["fitted_on"]] and sum(counts[:2]) == seal["rows"]
    assert set(public.fitted_on()) < set(public.half("open")) and 0 < counts[2] < counts[0] / 2


def test_series_stand_on_one_side_and_groups_are_halved():
    for group in public.GROUPS:
        rows = [m for m in public.measurements() if m.group == group]
        largest = max(sum(m.series == n.series for m in rows) for n in rows)
        counts = [sum(m.group == group for m in public.half(which)) for which in ("open", "sealed")]
        assert sum(counts) == len(rows) and abs(counts[0] - counts[1]) <= largest


def test_rows_say_where_they_come_from():
    rows = public.measurements()
    assert len({m.id for m in rows}) == len(rows) >= 60 and len({m.group for m in rows}) >= 4
    for m in rows:
        assert m.group in public.GROUPS and m.value > 0 and m.source.startswith("https://") and m.place and m.date
        assert m.id.startswith(m.series + "-") and m.known and m.unit and m.system
        assert cluster(m.cluster).name == m.cluster


def test_the_opening_is_on_record():
    """The record is of the rows as they were fixed; its count of predictions in range follows from its rows."""
    record, every = public.opened(), public.measurements()
    assert record["sealed_sha256"] == public.seal()["sealed_sha256"] and len(record["commit"]) == 40
    rows = [(r["id"], r["published"]) for r in record["rows"]]
    assert rows == [(m.id, pytest.approx(m.value, rel=1e-5)) for m in every]
    sealed = [r for r in record["rows"] if r["kind"] == "sealed"]
    assert {r["id"] for r in sealed} == {m.id for m in public.half("sealed")}
    assert [r["low"] <= r["published"] <= r["high"] for r in sealed] == [r["within"] for r in sealed]
    assert (sum(r["within"] for r in sealed), len(sealed)) == (record["within"], record["sealed"])
    assert sum(s["within"] for s in record["summary"] if s["half"] == "sealed") == record["within"]


def test_the_nearest_measurement_and_experience():
    near = public.nearest("decode", "deepseek-v3", "h200", batch=60, tensor=8)
    assert near and (near.series, near.known["batch"]) == ("sglang-r1-h200-tp8", 64)
    assert public.nearest("decode", "qwen3-30b", "h200", batch=1) is None
    factor, within, rows = public.experience("decode")
    assert factor > 1 and 0 < within <= rows == sum(m.group == "decode" for m in public.half("sealed"))
