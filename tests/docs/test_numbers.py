"""One number for one thing: README, docs and pages give the same value and verdict for the same quantity."""

import csv
import html
import json
import re
from functools import cache
from pathlib import Path

import pytest

from moelab.paper import claim
from moelab.report.site.template import number, quantity

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*sorted(RESULTS.glob("*.html")), *sorted(RESULTS.glob("*/*/*/index.html"))]
SIGNED = r"[+−]?\d+\.\d{3}"
INTERVAL = re.compile(rf"({SIGNED})[^\d.;|+−]{{0,40}}(?:95.% interval )?[(\[]?({SIGNED})(?: to |, )({SIGNED})[)\],]")


def read(name: str) -> list[dict[str, str]]:
    with open(RESULTS / name, encoding="utf-8") as file:
        return list(csv.DictReader(file))


@cache
def text(page: Path) -> str:
    """The text that a page shows, in one line."""
    found = page.read_text(encoding="utf-8")
    if page.suffix == ".html":
        found = html.unescape(re.sub(r"<(style|script|svg).*?</\1>|<[^>]*>", " ", found, flags=re.S))
    return " ".join(found.split())


def sentences(page: Path) -> list[str]:
    return re.split(r"(?<=[.:;?]) (?=[A-Z(])| \| ", text(page))


def test_an_interval_has_one_value_in_all_texts():
    values: dict[tuple[str, str], dict[str, str]] = {}
    for page in (*DOCS, *PAGES):
        for value, low, high in INTERVAL.findall(text(page)):
            if low != high and float(low.replace("−", "-")) * float(high.replace("−", "-")) != 0:
                values.setdefault((low, high), {})[value.lstrip("+−")] = page.relative_to(ROOT).as_posix()
    assert len(values) > 40
    assert {interval: found for interval, found in values.items() if len(found) > 1} == {}


@pytest.mark.parametrize("row", [row for row in read("claims.csv") if row["result"]], ids=lambda row: row["claim"])
def test_a_claim_has_one_verdict_and_one_value_on_the_page_of_its_result(row):
    page = (RESULTS / row["result"] / "index.html").read_text(encoding="utf-8")
    shown = page.partition(f'<li id="claim-{row["claim"]}">')[2].partition("</li>")[0]
    assert re.search(r'<span class="badge.*?</span> <span>(.*?)</span>', shown)[1] == row["adjusted"], "adjusted first"
    assert ("before adjustment" in shown) == (row["adjusted"] != row["verdict"])
    if row["ours"]:
        assert f"<dd>{html.escape(quantity(float(row['ours']), claim(row['claim'])))}</dd>" in shown


COST = {
    "simulated": r"simulated",
    "measured side by side": r"measured here|side by side|on twins",
    "FLOPs": r"FLOPs",
    "tokens": r"tokens",
    "time": r"\btime\b",
}
"""Words of a row of costs.csv -> by which words a sentence names that measure."""


def test_a_ratio_of_training_costs_is_one_of_the_table_and_is_named():
    """What training 6.7B costs over 1.3B+MoE-128: a sentence about both gives no other number, and says which."""
    table = read("costs.csv")
    checked = 0
    for page in DOCS:
        for said in sentences(page):
            if not {"6.7B", "1.3B+MoE-128"} <= set(re.findall(r"[\w.+-]*\w", said.replace("’s", ""))):
                continue
            for value in re.findall(
                r"(\d+\.\d+)(?:×| times)(?= (?:the FLOPs|its time|as fast|the time|the tokens))", said
            ):
                digits = len(value.partition(".")[2])
                rows = [row for row in table if f"{float(row['ours']):.{digits}f}" == value]
                assert rows, f"{page.name}: {value} in {said!r} is no ratio of costs.csv"
                words = [words for row in rows for name, words in COST.items() if name in row["cost"]]
                assert any(re.search(one, said) for one in words), f"{page.name}: {said!r} does not name the measure"
                checked += 1
    assert checked >= 3


def test_the_dense_size_of_equal_loss_is_the_claims_or_that_of_a_named_pair():
    (row,) = (row for row in read("claims.csv") if row["claim"] == "dense-equivalent-4-5x")
    ours = number(float(row["ours"]), claim(row["claim"]))
    found = 0
    for page in (*DOCS, RESULTS / "index.html", RESULTS / "claims.html"):
        for said in sentences(page):
            for value in re.findall(r"(\d+\.\d+)×? (?:times|×)?[^.]{0,20}its base", said):
                named = "350M+MoE-128" in said or "350M with" in said
                assert named or f"{float(ours):.{len(value.partition('.')[2])}f}" == value, f"{page.name}: {said}"
                found += 1
    assert found >= 3


def test_a_sentence_names_the_seeds_and_the_scale_of_its_claim():
    """The start page's and the README's sentences, from answers.csv: "… 0.425 nats …: holds, but larger (3 seeds)."."""
    claims, checked = read("claims.csv"), 0
    for row in read("answers.csv"):
        result, scale = row["link"].partition("/index.html")[0], row["link"].split("/")[1]
        if said := re.search(r"(.*) \(paper.*: ([\w, ]+) \((\d+) seeds\)", row["sentence"]):
            place = (result, said[2], scale, said[3])
            known = [c for c in claims if (c["result"], c["adjusted"], c["scale"], c["samples"]) == place and c["ours"]]
            ours = {f"{abs(float(c['ours'])):.{digits}f}" for c in known for digits in (1, 2, 3)}
            assert ours & set(re.findall(r"\d+\.\d+", said[1])), row["sentence"]
            checked += 1
    assert checked >= 2


def test_a_figure_shows_the_seeds_of_the_claims_beside_it():
    """Fewer only where curves cross on some seeds alone, or where a claim counts sessions."""
    checked = 0
    for path in sorted(RESULTS.glob("*/*/*/summary.json")):
        summary = json.loads(path.read_text(encoding="utf-8"))
        of_claims = {c["claim"]: c for c in summary["claims"] if c["kind"] == "measured" and c["samples"]}
        for figure in summary["figures"]:
            rows = [json.loads(line) for line in (path.parent / f"{figure['name']}.jsonl").read_text().splitlines()]
            if seeds := {row["seed"] for row in rows if "seed" in row}:
                for stored in (of_claims[name] for name in figure.get("claims") or () if name in of_claims):
                    fewer = claim(stored["claim"]).timed or "cross" in stored["note"]
                    same = stored["samples"] == len(seeds)
                    assert same or (fewer and stored["samples"] < len(seeds)), (path.parent, figure["name"])
                    checked += 1
    assert checked > 40
