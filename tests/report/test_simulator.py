"""The simulator's pages: the explorer's grid, and the scoreboard next to public measurements."""

import json
import re

from moelab.report import site
from moelab.report.site import simulator
from moelab.simulate import public
from tests.report.helpers import result

ROW = dict.fromkeys(simulator.CHOICES, "x") | {
    "batch": 8, "latency_ms": 12.34, "tokens_per_s_per_gpu": 1234.5, "cost_per_million": 1.5, "currency": "USD",
    "gib_per_gpu": 40.0, "memory_gib": 79.6, "gpus": 8, "layout": "8 GPUs, tensor 1 x data 8, 8 sequences", "bound": "experts",
}  # fmt: skip


def shown(folder, *rows):
    (folder / simulator.DATA).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return simulator.explorer([result(folder, "what-if")])


def test_a_line_has_a_range_and_the_nearest_measurement_where_there_are_any(tmp_path):
    more = {"low_ms": 8.8, "high_ms": 17.3, "nearest": "12.8 ms a token, batch 8, SGLang on h200"}
    found = shown(tmp_path, ROW, {**ROW, **more})
    plain, today = (dict(zip(found["packed"]["heads"], line, strict=True)) for line in found["rows"])
    assert (plain["range"], plain["Nearest measurement"]) == ("–", "–")
    assert today["range"] == "8.8 to 17.3" and today["Nearest measurement"] == more["nearest"]
    assert today["Layout"] == "tensor 1 x data 8" and today["per million tokens"] == "1.5 USD"


def test_a_grid_that_lacks_a_column_has_no_page(tmp_path):
    lacking = {name: value for name, value in ROW.items() if name != "gpus"}
    assert shown(tmp_path, lacking) is None and shown(tmp_path, {**ROW, "gib_per_gpu": None}) is None


def test_every_measurement_is_drawn_and_listed_once(tmp_path):
    site.build(tmp_path)
    html, record = (tmp_path / simulator.SCOREBOARD).read_text(), public.opened()
    rows, drawn = html.count('<tr><th scope="row">'), html.count('<svg class="at"')
    assert rows == drawn == len(public.measurements())
    assert public.seal()["sealed_sha256"] in html
    assert f"{record['within']} of {record['sealed']} sealed measurements" in html


def test_lanes_tell_sealed_rows_out_of_range_apart():
    for group in simulator.scoreboard()["groups"]:
        counts = {label: count for label, count, _ in group["lanes"]}
        assert counts.get("sealed, in range", 0) == group["sealed"]["within"]
        assert sum(counts.values()) == group["open"]["rows"] + group["sealed"]["rows"]


def test_marks_stand_left_of_one_where_the_simulator_is_too_fast():
    group = next(g for g in simulator.scoreboard()["groups"] if g["name"] == "decode")
    row = min(group["rows"], key=lambda r: r["ratio"])
    drawn = simulator.lane([row], group["axis"], group["factor"], "bad")
    x = float(re.search(r'class="at" x="([\d.]+)%"', drawn)[1])
    assert x < group["axis"].percent(1 / group["factor"]) < group["axis"].percent(1.0)
