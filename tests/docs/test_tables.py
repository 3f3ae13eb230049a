import csv
import importlib.util
import json
import re
from pathlib import Path

import pytest

from moelab.paper import claim
from moelab.report.site.template import number

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
    times = {"baseline": {1: 3.0, 8: 4.0}, "optimised": {1: 2.0, 8: 3.0}}
    times |= {"transformers generate": {8: 2.25}, "llama.cpp": {1: 1.0}}
    rows = [
        {"model": "MoE", "ranks": 1, "batch": batch, "candidate": name, "median_ms": ms, "floor_ms": 1.0}
        for name, by_batch in times.items()
        for batch, ms in by_batch.items()
    ]
    rows.append({**rows[2], "ranks": 2, "median_ms": 0.1})

    def write(rows):
        (tmp_path / "decode.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    write(rows)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    page = tables.render("a\n<!-- table: decode decode.jsonl -->\nold\n<!-- end -->\nz")
    assert "old" not in page and page.startswith("a\n") and page.endswith("<!-- end -->\nz")
    assert "| MoE | 3.0 / 4.0 | 2.0 / 3.0 | – / **2.2** | **1.0** / – | 1.0 / 1.0 |" in page
    write([row for row in rows if row["candidate"] != "llama.cpp"])
    page = tables.render(page)
    assert "| MoE | 3.0 / 4.0 | **2.0** / 3.0 | – / **2.2** | 1.0 / 1.0 |" in page and "llama.cpp" not in page


def test_the_share_of_the_dense_speed_is_the_median_of_the_rounds(tables):
    rows = [
        {"width": 32, "candidate": f"{family}, {dtype}", "rounds_ms": times}
        for family, times in (("dense", [1.0, 2.0, 3.0]), ("MoE-128", [2.0, 2.0, 4.0]))
        for dtype in ("fp32", "bf16")
    ]
    assert tables.shares(rows).splitlines()[-1] == "| bf16 | 0.75 |"


@pytest.mark.parametrize("page", ["reviewer.md", "browse.md"])
def test_values_and_verdicts_in_prose_are_those_of_the_ledger(page):
    """Before each link to a claim stand its value, its interval where it has one, and its verdict after adjustment."""
    with open(ROOT / "results" / "claims.csv", encoding="utf-8") as file:
        ledger = {row["claim"]: row for row in csv.DictReader(file)}
    text = " ".join((ROOT / "docs" / page).read_text(encoding="utf-8").split())
    parts = re.split(r"\[claim\]\(\.\./results/claims\.html\?q=([\w.-]+)\)", text)
    assert len(parts) > 8
    for before, name in zip(parts[::2], parts[1::2], strict=False):
        row, about = ledger[name], claim(name)
        said = [number(float(row["ours"]), about).rstrip("×"), f"*{row['adjusted']}*"]
        if row["low"] and int(row["samples"]):
            said.append("({} to {})".format(*(number(float(row[end]), about) for end in ("low", "high"))))
        assert [part for part in said if part not in before] == [], name
