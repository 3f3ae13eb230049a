"""The tables of pages that are made from files of results: see `PAGES` and `KINDS`.

python docs/tables.py                              # writes them anew, after new measurements

A table stands between `<!-- table: KIND FILE -->` and `<!-- end -->`; a test compares all of them with their files.
"""

import csv
import io
import json
import re
import statistics
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from moelab.bench.train import DEFAULT
from moelab.design.verdicts import CANNOT_TELL, today
from moelab.experiments import outside
from moelab.paper import claim
from moelab.report.site.sentences import score as score_of_claims
from moelab.report.site.template import number

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "performance.md"
_OTHERS = (
    *("README.md", "docs/experiments.md", "docs/simulator.md", "docs/full-length.md", "docs/prediction.md"),
    *("docs/try.md", "results/weights/README.md"),
)
PAGES = (PAGE, *(ROOT / name for name in _OTHERS))
TABLE = re.compile(r"(<!-- table: (\w+) (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)

Row = dict
OURS = ("ours, capacity 1.0", "ours, drop-free")
PEERS = ("deepspeed, capacity 1.0", "transformers grouped_mm", "torch grouped_mm, drop-free")
THEIR_DECODERS = ("transformers Qwen3-MoE", "transformers Mixtral", "transformers generate")


def _markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines).replace("|  |", "| |")


def _numbers(values: list[float | None], bold: list[bool], form: Callable[[float], str]) -> str:
    """Return "a / b / c", neighbours that are bold inside one pair of stars; "–" where nothing was measured."""
    text, open_ = "", False
    for i, (value, strong) in enumerate(zip(values, bold, strict=True)):
        if open_ and not strong:
            text, open_ = text + "**", False
        text += " / " if i else ""
        if strong and not open_:
            text, open_ = text + "**", True
        text += "–" if value is None else form(value)
    return text + ("**" if open_ else "")


def _time(ms: float) -> str:
    return f"{ms:.1f}" if ms < 99.95 else f"{ms:.0f}"


def layer(rows: list[Row]) -> str:
    """Return the time of each layer over the dense layer's; bold is the fastest with the same capacity rule."""
    experts = sorted({row["experts"] for row in rows})
    lines = []
    for dtype, threads in sorted(
        {(row["dtype"], row["threads"]) for row in rows}, key=lambda c: (c[0] != "fp32", c[1])
    ):
        at = {
            (row["experts"], row["candidate"]): row["ratio"]
            for row in rows
            if (row["dtype"], row["threads"]) == (dtype, threads)
        }
        ours, theirs = [], []
        for E in experts:
            limited, free = (at[E, name] for name in OURS)
            deepspeed, grouped, torch_grouped = (at.get((E, name)) for name in PEERS)
            best_limited = deepspeed is None or limited <= deepspeed
            best_free = all(other is None or free <= other for other in (grouped, torch_grouped))
            ours.append(_numbers([limited, free], [best_limited, best_free], "{:.2f}".format))
            others = [value for value in (grouped, torch_grouped) if value is not None]
            ahead = [not best_free and value == min(others) for value in (grouped, torch_grouped)]
            first = _numbers([deepspeed], [not best_limited], "{:.2f}".format)
            theirs.append(f"{first}; {_numbers([grouped, torch_grouped], ahead, '{:.2f}'.format)}")
        lines.append([f"{dtype}, {threads} thread{'s' * (threads > 1)}: ours", *ours])
        lines.append(["DeepSpeed; transformers / torch", *theirs])
    return _markdown(["", *(f"E={E}" for E in experts)], lines)


def gate(rows: list[Row]) -> str:
    """Return how many times as long as ours the other gates take."""
    experts = sorted({row["experts"] for row in rows})
    at = {(row["candidate"], row["experts"]): row for row in rows}
    lines = [["ours, ms", *(f"{at['ours', E]['median_ms']:.2f}" for E in experts)]]
    for name, title in (
        ("deepspeed, sparse routes", "DeepSpeed's sparse routes, times ours"),
        ("deepspeed, masks", "DeepSpeed's masks, times ours"),
        ("masks (baseline)", "the paper's masks, times ours"),
    ):
        found = [at.get((name, E)) for E in experts]
        if any(found):
            lines.append([title, *("–" if row is None else f"{row['ratio']:.1f}" for row in found)])
    return _markdown(["", *(f"E={E}" for E in experts)], lines)


def train(rows: list[Row]) -> str:
    """Return thousand tokens a second of each family and width, fp32 / bf16, without those of PyTorch's products."""
    widths = sorted({row["width"] for row in rows})
    families = list(
        dict.fromkeys(row["candidate"].rsplit(", ", 1)[0] for row in rows if DEFAULT not in row["candidate"])
    )
    families.sort(key=lambda name: name.endswith("bare loop"))  # the plain loop is not ours: last
    at = {(row["candidate"], row["width"]): row["tokens_per_s"] / 1e3 for row in rows}
    lines = []
    for family in families:
        name = family.replace("dense, bare loop", "dense, a bare PyTorch loop")
        values = [[at.get((f"{family}, {dtype}", width)) for dtype in ("fp32", "bf16")] for width in widths]
        lines.append([name, *(_numbers(pair, [False, False], "{:.1f}".format) for pair in values)])
    return _markdown(["thousand tokens a second, fp32 / bf16", *(f"{width} wide" for width in widths)], lines)


def shares(rows: list[Row]) -> str:
    """Return MoE-128's speed as a share of its dense base's, medians of the rounds."""
    widths = sorted({row["width"] for row in rows})
    times = {(row["candidate"], row["width"]): row["rounds_ms"] for row in rows}
    lines = []
    for dtype in ("fp32", "bf16"):
        pairs = [(times[f"dense, {dtype}", width], times[f"MoE-128, {dtype}", width]) for width in widths]
        shares = [statistics.median(b / a for b, a in zip(*pair, strict=True)) for pair in pairs]
        lines.append([dtype, *(f"{share:.2f}" for share in shares)])
    return _markdown(["MoE-128 over dense", *(f"{width} wide" for width in widths)], lines)


def decode(rows: list[Row]) -> str:
    """Return milliseconds a token by batch; bold is the fastest."""
    rows = [row for row in rows if row["ranks"] == 1 and row["model"] != "350M twin"]
    models = list(dict.fromkeys(row["model"] for row in rows))
    batches = sorted({row["batch"] for row in rows})
    at = {(row["model"], row["batch"], row["candidate"]): row["median_ms"] for row in rows}
    floor = {(row["model"], row["batch"]): row["floor_ms"] for row in rows}
    llama = any(row["candidate"] == "llama.cpp" for row in rows)
    lines = []
    for model in models:
        theirs = next((n for n in THEIR_DECODERS if any((model, batch, n) in at for batch in batches)), None)
        names = ["baseline", "optimised", theirs, *(["llama.cpp"] if llama else [])]
        values = [[at.get((model, batch, name)) for batch in batches] for name in names]
        best = [min(v for v in column if v is not None) for column in zip(*values, strict=True)]
        cells = [_numbers(v, [a == b for a, b in zip(v, best, strict=True)], _time) for v in values]
        lines.append([model, *cells, _numbers([floor.get((model, b)) for b in batches], [False] * len(batches), _time)])
    heads = ["the paper's baseline", "ours", "transformers", *(["llama.cpp"] if llama else []), "floor"]
    return _markdown([f"ms a token, batch {' / '.join(map(str, batches))}", *heads], lines)


def sentences(rows: list[Row]) -> str:
    """The three sentences of the start page, with links to their figures."""
    return "".join(f"- {_link(row['sentence'], row['link'])}\n" for row in rows if row["sentence"])


def _link(sentence: str, page: str) -> str:
    """Return a sentence of which the part after the colon, its verdict, leads to a page of results."""
    said, _, sure = sentence.rpartition(": ")
    return textwrap.fill(f"{said}: [{sure.rstrip('.')}](results/{page}).", 118, subsequent_indent="  ", **_WHOLE)


_WHOLE = {"break_long_words": False, "break_on_hyphens": False}


def tally(rows: list[Row]) -> str:
    """How many claims hold, in a sentence."""
    return textwrap.fill(score_of_claims(rows), 118) + "\n"


def costs(rows: list[Row]) -> str:
    """Each ratio of training costs, and what it divides by what."""
    lines = []
    for row in rows:
        interval = f" ({float(row['low']):.1f} to {float(row['high']):.1f})" if row["low"] else ""
        theirs = f"{float(row['paper']):.1f}×" if row["paper"] else "–"
        lines.append([row["cost"], row["ratio"], f"{float(row['ours']):.1f}×{interval}", theirs])
    return _markdown(["cost", "what is divided by what", "ours (95 % interval)", "the paper"], lines)


def digest(rows: list[Row]) -> str:
    """A line an experiment."""
    lines = []
    for row in rows:
        flops = f"{float(row['flops']):.2f}×" if row["flops"] else "–"
        hours = f"{float(row['hours']):.1f}" if float(row["hours"]) >= 0.05 else "< 0.1"
        effect = f"{row['effect']}: *{row['verdict']}*" if row["effect"] else "–"
        title = f"[{row['title']}](../results/{row['link']})"
        seeds = row["seeds"] if row["seeds"] != "0" else "–"
        lines.append([title, row["outcome"], effect, flops, seeds, hours])
    return _markdown(["experiment", "outcome", "effect (95 % interval)", "FLOPs", "seeds", "hours"], lines)


TRUST = {
    "exchange": "all-to-alls of megabytes, by NCCL or DeepEP, on up to 32 nodes",
    "layer": "large products; small ones depend on the kernel",
    "decode": "one node, with the engine's scheduler known",
    "prefill": "orders of layouts, not tokens a second",
    "serving": "long outputs; short ones come out too fast",
    "training": "Megatron-Core with experts over nodes",
}
"""Group of public measurements -> for what the simulator was good enough; docs/simulator.md gives the reasons."""


def score(rows: list[Row]) -> str:
    """A line a group: errors of the open and the sealed half, and how many sealed rows lay in their range."""
    at = {(row["group"], row["half"]): row for row in rows}
    lines = []
    for group, use in TRUST.items():
        known, sealed = at[group, "open"], at[group, "sealed"]
        errors = [f"{row['median_error_percent']:.0f} %" for row in (known, sealed)]
        within = f"{sealed['within']} of {sealed['rows']}"
        factor = f"× or ÷ {sealed['range_factor']:.1f}"
        lines.append([group, *errors, f"{sealed['worst_error_percent']:+.0f} %", factor, within, use])
    head = ["group", "median error, open", "sealed", "worst, sealed", "range", "sealed in range", "trust it for"]
    return _markdown(head, lines)


def texts(rows: list[Row]) -> str:
    """What models wrote after the same prompts: a line a prompt, a column a model."""
    models, prompts = (list(dict.fromkeys(row[key] for row in rows)) for key in ("model", "prompt"))
    wrote = {(row["model"], row["prompt"]): " ".join(row["text"].split()).replace("|", "\\|") for row in rows}
    lines = [[f"**{prompt}**", *(f"… {wrote[model, prompt]}" for model in models)] for prompt in prompts]
    return _markdown(["prompt", *models], lines)


BEFORE = ROOT / "docs" / "log" / "claims-at-16-percent.csv"
"""What the ledger had of the claims that are trained, timed or open, when no result was of full length."""


def _said(row: Row) -> str:
    """Return a claim's value with interval and verdict, and on how many seeds or sessions it rests."""
    verdict = today(row["adjusted"])
    if not row["ours"]:
        return f"*{verdict}*"
    about = claim(row["claim"])
    ours, low, high = (number(float(row[name]), about) if row[name] else "" for name in ("ours", "low", "high"))
    interval = f" ({low} to {high})" if low and high else ""
    next_look = re.search(r"next look is at (\d+)", row.get("note", ""))
    goes_on = next_look and verdict == CANNOT_TELL  # else the plan has ended
    n = f"n = {row['samples']}" + (f", next look at {next_look[1]}" if goes_on else "")
    return f"{ours}{interval}, {n}, {row['scale']}: *{verdict}*"


def before_and_after(rows: list[Row]) -> str:
    """A line a claim: what runs of a sixth of the length said, what the ledger says now, and what would decide it."""
    at = {row["claim"]: row for row in rows}
    lines = []
    with open(BEFORE, encoding="utf-8") as file:
        before = list(csv.DictReader(file))
    for row in before:
        now, about = at[row["claim"]], claim(row["claim"])
        paper = about.direction if about.value is None else f"{number(about.value, about)} {about.unit}"
        takes = re.search(r"With this spread it takes (.*?) with 80 %", now["note"])
        adjusted = re.search(r"p-value is (\S+) and, adjusted for the .*?, ([\d.e-]+);", now["note"])
        primary = re.search(r"It is tested only where the primary claim of (.*?) holds", now["note"])
        missing = re.search(r"Without a value: (.*)\.", now["note"])
        outlook = "–"
        if takes:
            outlook = takes[1]
        elif adjusted:
            outlook = f"p {adjusted[1]}, adjusted {adjusted[2]}"
        elif primary:
            outlook = f"that the primary claim of {primary[1]} holds"
        elif missing:
            outlook = missing[1]
        lines.append([f"{about.statement} ({about.where})", paper.strip(), _said(row), _said(now), outlook])
    table = _markdown(["claim", "paper", "at 16 % of the training", "now", "what it would take"], lines)
    counted = [Counter(today(row["adjusted"]) for row in of) for of in (before, [at[row["claim"]] for row in before])]
    verdicts = [[name, str(counted[0][name] or "–"), str(counted[1][name] or "–")] for name in counted[0] | counted[1]]
    return _markdown(["verdict", "at 16 %", "now"], verdicts) + "\n" + table


def tries(rows: list[Row]) -> str:
    """A line an idea and scale: the difference, the speed-up, the verdict; a sentence where nothing is published."""
    if not rows:
        return "None yet.\n"
    lines = []
    for row in rows:
        low, high = row["low"], row["high"]
        interval = f" ({low:+.3f} to {high:+.3f})" if low is not None and high is not None else ""
        faster = "–" if row["flops"] is None else f"{row['flops']:.2f}×"
        known = "> 99" if row["to_know"] is None else f"{row['to_know']:.0f}"
        named = f"{row['idea']} ({row['source']})"
        cells = [named, row["scale"], str(row["seeds"]), f"{row['difference']:+.3f}{interval}", faster, row["verdict"]]
        lines.append([*cells, known])
    head = ["idea", "scale", "seeds", "nats per token (95 % interval)", "speed-up in FLOPs", "verdict", "seeds to know"]
    return _markdown(head, lines)


def _newest_tries(folder: Path) -> list[Row]:
    """The rows of the newest result of each scale."""
    newest = [max(scale.glob("*/tries.jsonl"), default=None) for scale in sorted(folder.glob("*"))]
    return [json.loads(line) for file in newest if file for line in file.read_text().splitlines()]


def predicted(rows: list[Row]) -> str:
    """A line a prediction of Clark's models: how it did, over all opened settings and without those of 15M."""
    compared = outside.compare(outside.first(), outside.measured("first"))
    every, larger = (outside.scores(part) for part in (compared, compared[compared["size"] != "15M"]))
    lines = []
    for row, other in zip(every.itertuples(), larger.itertuples(), strict=True):
        name = f"{row.law} on `{row.twins}`" + " (main)" * ((row.twins, row.law) == outside.MAIN)
        inside = f"{row.inside:.0%}".replace("%", " %") if row.inside == row.inside else "–"
        error, larger_error = (f"{of.error:.3f}" for of in (row, other))
        smallest = row.law == outside.SMALLEST
        cells = [inside, "–" if smallest else error, larger_error, f"{other.error_times:.2f}", f"{row.rank:.2f}"]
        lines.append([name if row.twins else row.law, *cells, f"{row.bias:+.3f}"])
    head = [
        "inside",
        "median error, nats",
        "without 15M",
        "× or ÷ parameters, without 15M",
        "rank",
        "median miss, nats",
    ]
    return _markdown(["prediction", *head], lines)


def missed(rows: list[Row]) -> str:
    """A line a number of experts: how many settings lay in the main prediction's intervals, and by how much they missed."""
    compared = outside.compare(outside.first(), outside.measured("first"))
    main = compared[(compared["twins"] == outside.MAIN[0]) & (compared["law"] == outside.MAIN[1])]
    lines = []
    for experts, part in sorted(main.groupby("experts"), reverse=True):
        times = f"{part['times'].min():.1f} to {part['times'].max():.1f}"
        misses = f"{part['miss'].min():+.3f} to {part['miss'].max():+.3f}"
        inside = f"{part['inside'].sum()} of {len(part)}"
        lines.append([str(experts), inside, f"{part['expected_times'].iloc[0]:.1f}", times, misses])
    return _markdown(
        ["experts", "inside", "× parameters, predicted", "measured", "measured minus predicted, nats"], lines
    )


KINDS: dict[str, Callable[[list[Row]], str]] = {
    "sentences": sentences,
    "tally": tally,
    "costs": costs,
    "digest": digest,
    "layer": layer,
    "gate": gate,
    "train": train,
    "shares": shares,
    "decode": decode,
    "score": score,
    "texts": texts,
    "before_and_after": before_and_after,
    "tries": tries,
    "predicted": predicted,
    "missed": missed,
}


def render(page: str) -> str:
    """Return the page with each of its tables made anew from its file."""

    def table(found: re.Match) -> str:
        opening, kind, file, _, closing = found.groups()
        if kind == "tries":  # a folder of results, which may have none
            return f"{opening}\n{tries(_newest_tries(ROOT / file))}\n{closing}"
        text = (ROOT / file).read_text()
        if file.endswith(".json"):
            rows = json.loads(text)["summary"]
        elif file.endswith(".csv"):
            rows = list(csv.DictReader(io.StringIO(text)))
        else:
            rows = [json.loads(line) for line in text.splitlines()]
        return f"{opening}\n{KINDS[kind](rows)}\n{closing}"

    return TABLE.sub(table, page)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(render(page.read_text()))
