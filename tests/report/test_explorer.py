"""What the explorer shows of a grid, with and without a range and a measurement."""

import json

from moelab.report.site.explorer import CHOICES, DATA, explorer
from tests.report.helpers import result

ROW = dict.fromkeys(CHOICES, "x") | {
    "batch": 8, "latency_ms": 12.34, "tokens_per_s_per_gpu": 1234.5, "cost_per_million": 1.5, "currency": "USD",
    "gib_per_gpu": 40.0, "memory_gib": 79.6, "gpus": 8, "layout": "8 GPUs, tensor 1 x data 8, 8 sequences", "bound": "experts",
}  # fmt: skip


def shown(folder, *rows):
    (folder / DATA).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return explorer([result(folder, "what-if")])


def test_a_line_has_a_range_and_the_nearest_measurement_where_there_are_any(tmp_path):
    more = {"low_ms": 8.8, "high_ms": 17.3, "nearest": "12.8 ms a token, batch 8, SGLang on h200"}
    found = shown(tmp_path, ROW, {**ROW, **more})
    plain, today = (dict(zip(found["heads"], line, strict=True)) for line in found["rows"])
    assert (plain["range"], plain["Nearest measurement"]) == ("–", "–")
    assert today["range"] == "8.8 to 17.3" and today["Nearest measurement"] == more["nearest"]
    assert today["Layout"] == "tensor 1 x data 8" and today["per million tokens"] == "1.5 USD"


def test_a_grid_that_lacks_a_column_has_no_page(tmp_path):
    lacking = {name: value for name, value in ROW.items() if name != "gpus"}
    assert shown(tmp_path, lacking) is None and shown(tmp_path, {**ROW, "gib_per_gpu": None}) is None
