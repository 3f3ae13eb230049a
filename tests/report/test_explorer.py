"""The lines of the explorer, with and without a range and a measurement."""

import json

from moelab.report.site.explorer import CHOICES, DATA, HEADS, NUMBERS, _line, explorer
from tests.report.test_questions import result

ROW = {
    "batch": 8, "latency_ms": 12.34, "tokens_per_s_per_gpu": 1234.5, "cost_per_million": 1.5, "currency": "USD",
    "gib_per_gpu": 40.0, "memory_gib": 79.6, "gpus": 8, "layout": "8 GPUs, tensor 1 x data 8, 8 sequences", "bound": "experts",
}  # fmt: skip


def test_a_line_has_a_cell_for_every_head():
    plain = _line(ROW)
    assert len(plain) == len(HEADS) and (plain[2], plain[-1]) == ("–", "–")
    today = _line({**ROW, "low_ms": 8.8, "high_ms": 17.3, "nearest": "12.8 ms a token, batch 8, SGLang on h200"})
    assert today[2] == "8.8 to 17.3" and today[-1].endswith("SGLang on h200") and len(HEADS) > NUMBERS


def test_a_grid_that_lacks_a_column_has_no_page(tmp_path):
    row = dict.fromkeys(CHOICES, "x") | ROW
    for given, there in ((row, True), ({k: v for k, v in row.items() if k != "gpus"}, False), ({**row, "gpus": 1, "gib_per_gpu": None}, False)):  # fmt: skip
        (tmp_path / DATA).write_text(json.dumps(given))
        assert (explorer([result(tmp_path, "what-if", "cpu")]) is not None) == there
