import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tables():
    found = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def test_the_tables_of_pages_and_readme_are_what_was_found(tables):
    """`python docs/tables.py` makes them equal again."""
    pages = [page.read_text() for page in tables.PAGES]
    assert {kind for page in pages for _, kind, *_ in tables.TABLE.findall(page)} == set(tables.KINDS)
    assert [tables.render(page) for page in pages] == pages


def test_bold_is_the_fastest_and_what_is_missing_is_a_dash(tables, tmp_path, monkeypatch):
    rows = [
        {"model": "MoE", "ranks": 1, "batch": batch, "candidate": name, "median_ms": ms, "floor_ms": 1.0}
        for batch, name, ms in [
            (1, "baseline", 3.0),
            (1, "optimised", 2.0),
            (1, "invariant", 1.5),  # not compared: the same bits in any batch
            (8, "baseline", 4.0),
            (8, "optimised", 3.0),
            (8, "transformers generate", 2.25),
            (1, "llama.cpp", 1.0),
        ]
    ]
    rows.append({**rows[1], "median_ms": 9.0})  # measured again, beside the ranks
    rows.append({**rows[1], "ranks": 2, "median_ms": 0.1})
    (tmp_path / "decode.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    page = tables.render("a\n<!-- table: decode decode.jsonl -->\nold\n<!-- end -->\nz")
    assert "old" not in page and page.startswith("a\n") and page.endswith("<!-- end -->\nz")
    assert "| MoE | 3.0 / 4.0 | 2.0 / 3.0 | 1.5 / – | – / **2.2** | **1.0** / – | 1.0 / 1.0 |" in page
    (tmp_path / "decode.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows if "." not in row["candidate"])
    )
    page = tables.render(page)
    assert "| MoE | 3.0 / 4.0 | **2.0** / 3.0 | 1.5 / – | – / **2.2** | 1.0 / 1.0 |" in page and "llama.cpp" not in page


def test_the_compiled_layer_has_a_line_where_it_was_measured(tables):
    ratios = {
        (8, "ours, capacity 1.0"): 1.0,
        (8, "ours, drop-free"): 1.2,
        (8, "ours compiled, capacity 1.0"): 0.9,
        (8, "ours compiled, drop-free"): 1.3,
        (64, "ours, capacity 1.0"): 1.5,
        (64, "ours, drop-free"): 1.6,
    }
    rows = [
        {"experts": E, "candidate": name, "ratio": ratio, "dtype": "fp32", "threads": 1}
        for (E, name), ratio in ratios.items()
    ]
    assert "| ours, compiled | **0.90** / 1.30 | – / – |" in tables.layer(rows)
    assert "compiled" not in tables.layer([row for row in rows if "compiled" not in row["candidate"]])
