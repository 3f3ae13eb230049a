"""The page of the simulator beside public measurements."""

import re

from moelab.report import site
from moelab.report.site import scoreboard
from moelab.simulate import public


def test_every_measurement_is_drawn_and_listed_once(tmp_path):
    site.build(tmp_path)
    html, record = (tmp_path / scoreboard.PAGE).read_text(), public.opened()
    rows, drawn = html.count('<tr><th scope="row">'), html.count('<svg class="at"')
    assert rows == drawn == len(public.measurements())
    assert public.seal()["sealed_sha256"] in html
    assert f"{record['within']} of {record['sealed']} sealed measurements" in html


def test_lanes_tell_sealed_rows_out_of_range_apart():
    for group in scoreboard.scoreboard()["groups"]:
        counts = {label: count for label, count, _ in group["lanes"]}
        assert counts.get("sealed, in range", 0) == group["sealed"]["within"]
        assert sum(counts.values()) == group["open"]["rows"] + group["sealed"]["rows"]


def test_marks_stand_left_of_one_where_the_simulator_is_too_fast():
    group = next(g for g in scoreboard.scoreboard()["groups"] if g["name"] == "decode")
    row = min(group["rows"], key=lambda r: r["ratio"])
    drawn = scoreboard.lane([row], group["axis"], group["factor"], "bad")
    x = float(re.search(r'class="at" x="([\d.]+)%"', drawn)[1])
    assert x < group["axis"].percent(1 / group["factor"]) < group["axis"].percent(1.0)
