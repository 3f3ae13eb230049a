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
    assert [tables.render(tables.TABLE.sub(r"\1\5", page)) for page in pages] == pages, "each made anew, from none"


def test_the_first_screen_of_the_readme_has_few_words_and_numbers():
    """Before the commands stand at most 250 words and 15 numbers; links' addresses and remarks are not read."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Two commands")[0]
    seen = re.sub(r"<!--.*?-->|!\[[^\]]*\]\([^)]*\)|(?<=\])\([^)]*\)", "", text, flags=re.DOTALL)
    words = [word for word in seen.split() if re.search(r"\w", word)]
    assert 100 < len(words) <= 250
    assert 6 < len(re.findall(r"\d+(?:[.,]\d+)*", seen)) <= 15, re.findall(r"\d+(?:[.,]\d+)*", seen)
    with open(ROOT / "results" / "answers.csv", encoding="utf-8") as file:
        sentences = [row["sentence"] for row in csv.DictReader(file) if row["sentence"]]
    said, page = (re.sub(r"[\[\]\s]+", " ", where) for where in (seen, (ROOT / "results/index.html").read_text()))
    assert len(sentences) == 3
    for sentence in sentences:
        assert sentence.rstrip(".") in said, "the README has it"
        assert sentence in page, "and the start page"


def test_a_program_that_was_not_measured_has_no_column_and_several_ranks_no_row(tables):
    times = {(1, "baseline"): 3.0, (1, "optimised"): 2.0, (2, "optimised"): 0.1}
    rows = [
        {"model": "MoE", "ranks": ranks, "batch": 1, "candidate": name, "median_ms": ms, "floor_ms": 1.0}
        for (ranks, name), ms in times.items()
    ]
    head, _, row = tables.decode(rows).splitlines()
    assert "llama.cpp" not in head and row == "| MoE | 3.0 | **2.0** | – | 1.0 |"


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


def test_tries_are_read_from_the_newest_result_of_each_scale_and_none_is_said(tables, tmp_path):
    assert tables.tries(tables._newest_tries(tmp_path)) == "None yet.\n"
    row = {"idea": "z-loss", "source": "ST-MoE", "scale": "quick", "seeds": 3, "difference": -0.0123, "low": -0.02}
    row |= {"high": -0.004, "flops": 1.234, "verdict": "lowers the loss", "to_know": None}
    for name, difference in (("20260101-000000", 9.0), ("20260202-000000", row["difference"])):
        (folder := tmp_path / "quick" / name).mkdir(parents=True)
        (folder / "tries.jsonl").write_text(json.dumps(row | {"difference": difference}) + "\n")
    *_, line = tables.tries(tables._newest_tries(tmp_path)).splitlines()
    assert line == "| z-loss (ST-MoE) | quick | 3 | -0.012 (-0.020 to -0.004) | 1.23× | lowers the loss | > 99 |"
