"""Write the page of `moelab gpu`: what passed, what failed with its shape and error, ratios to the floor and to peers.

The page is one file, `index.html`, made from `results.jsonl` and `stages.json` alone, and loads nothing else.
"""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moelab.acceptance import stages
from moelab.acceptance.stages import Setup
from moelab.files import read_object, write_json, write_text
from moelab.runs.provenance import describe

Numbers = Mapping[str, Any]
Column = tuple[str, Callable[[Numbers], Any]]

_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; display: block; overflow-x: auto }
th, td { padding: .2rem .7rem; text-align: left; border-bottom: 1px solid #8886; vertical-align: top }
td.n { text-align: right; font-variant-numeric: tabular-nums }
.failed, .cut { color: #c0392b; font-weight: 600 } .skipped { opacity: .65 }
"""


def write(setup: Setup) -> Path:
    """Write the page and return its path."""
    path = setup.out / "index.html"
    write_text(path, text(setup))
    return path


def publish(setup: Setup, folder: Path, card: str) -> Path:
    """Write page, last rows of each case, outcomes and provenance as `gpu-<card>.*`, which the results pages list.

    Args:
        folder: `benchmarks` in a folder of results.
        card: see `moelab.acceptance.stages.card`.

    Returns:
        The page.
    """
    name = f"gpu-{card}"
    record, source = read_object(setup.out / "stages.json") or {}, read_object(setup.out / "provenance.json") or {}
    title = f"{_title(setup, source)}: {verdict(record.get('outcomes', []))}"
    write_text(folder / f"{name}.html", text(setup))
    write_text(folder / f"{name}.results.jsonl", "".join(json.dumps(row) + "\n" for row in latest(stages.rows(setup))))
    write_json(folder / f"{name}.stages.json", record)
    write_json(folder / f"{name}.provenance.json", {**source, "title": title})
    return folder / f"{name}.html"


def text(setup: Setup) -> str:
    """Return the page."""
    found = latest(stages.rows(setup))
    record = read_object(setup.out / "stages.json") or {}
    outcomes, source = record.get("outcomes", []), read_object(setup.out / "provenance.json") or {}
    parts = [_head(setup, found, outcomes, source), _stages(outcomes), _failures(found)]
    for title, stage, keep, columns in _SECTIONS:
        rows = [row for row in found if row["stage"] == stage and row["status"] == "ok" and keep(row)]
        if rows:
            inputs = dict.fromkeys(row["inputs"] for row in rows if "inputs" in row)
            parts += [f"<h2>{title}</h2>", table(columns, rows), *(f"<p>Inputs: {_escape(one)}." for one in inputs)]
    passed = [row for row in found if row["stage"] == "checks" and row["status"] == "ok"]
    if passed:
        checked = ("case", _of("case")), ("worst difference", _number("worst_error")), ("allowed", _number("tolerance"))
        parts += ["<h2>Checks that passed</h2>", table(checked, passed)]
    head = "<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'>"
    head += f"<title>{_escape(_title(setup, source))}</title><style>{_STYLE}</style>\n"
    return head + "\n".join(parts) + "\n"


def latest(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of each case's last run, in the order in which the cases first ran."""
    cases: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        kept = cases.setdefault((row["stage"], row["case"]), [])
        if kept and kept[0].get("session") != row.get("session"):
            kept.clear()
        kept.append(row)
    return [row for kept in cases.values() for row in kept]


def verdict(outcomes: Sequence[Numbers]) -> str:
    """Return what the stages say together, in one line."""
    if not any(outcome["status"] != "skipped" for outcome in outcomes):
        return "nothing was run"
    failed = sum(outcome.get("failed", 0) for outcome in outcomes)
    open_ = [outcome["stage"] for outcome in outcomes if outcome["status"] != "done"]
    ok = sum(outcome.get("ok", 0) for outcome in outcomes)
    rest = f"; not finished: {', '.join(open_)} (call the command again)" if open_ else ""
    return f"{ok} case{'s' if ok != 1 else ''} passed, {failed} failed{rest}"


def table(columns: Sequence[Column], rows: Iterable[Numbers]) -> str:
    """Return an HTML table; numbers are right-aligned with three significant digits."""
    head = "".join(f"<th>{_escape(name)}" for name, _ in columns)
    lines = []
    for row in rows:
        cells = [value(row) for _, value in columns]
        lines.append("<tr>" + "".join(f"<td{_class(cell)}>{_text(cell)}" for cell in cells))
    return f"<table><tr>{head}\n" + "\n".join(lines) + "</table>"


def _title(setup: Setup, source: Numbers) -> str:
    gpus = source.get("hardware", {}).get("gpus")
    return (
        "Rehearsal on a CPU: times mean nothing" if setup.tiny else f"moelab on {gpus[0] if gpus else setup.out.name}"
    )


def _head(setup: Setup, found: Sequence[Numbers], outcomes: Sequence[Numbers], source: Numbers) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in source.get("versions", {}).items())
    commit = (source.get("commit") or "unknown")[:10] + (" and changes" if source.get("modified") else "")
    facts = [describe(source["hardware"]) if source.get("hardware") else "", f"commit {commit}", versions]
    ceilings = next((row["finding"] for row in found if row["case"] == "ceilings" and row["status"] == "ok"), "")
    return (
        f"<h1>{_escape(_title(setup, source))}</h1><p><b>{_escape(verdict(outcomes))}</b>"
        f"<p>{_escape('; '.join(filter(None, [ceilings, *facts])))}"
    )


def _stages(outcomes: Sequence[Numbers]) -> str:
    columns: list[Column] = [
        ("stage", _of("stage")), ("limit, s", _of("limit_s")), ("status", _status), ("s", _number("seconds")),
        ("passed", _of("ok")), ("failed", _of("failed")), ("left out", _of("skipped")), ("reason", _of("reason")),
    ]  # fmt: skip
    return table(columns, outcomes)


def _failures(found: Sequence[Numbers]) -> str:
    failed = [row for row in found if row["status"] != "ok"]
    if not failed:
        return "<p>Nothing failed."
    columns: list[Column] = [
        ("stage", _of("stage")), ("case", _of("case")), ("candidate", _of("candidate")), ("", _status),
        ("error", _of("error")),
    ]  # fmt: skip
    return "<h2>What failed or was left out</h2>" + table(columns, failed)


def _status(row: Numbers) -> Any:
    return Marked(row["status"])


class Marked(str):
    """A status, shown in its colour."""


def _of(name: str) -> Callable[[Numbers], Any]:
    return lambda row: row.get(name, "")


def _number(name: str, scale: float = 1.0) -> Callable[[Numbers], Any]:
    def value(row: Numbers) -> Any:
        found = row.get(name)
        return found * scale if isinstance(found, int | float) else ""

    return value


def _settings(name: str) -> Callable[[Numbers], str]:
    return lambda row: " ".join(f"{key}={value}" for key, value in (row.get(name) or {}).items())


def _class(cell: Any) -> str:
    return f' class="{cell}"' if isinstance(cell, Marked) else ' class="n"' if isinstance(cell, int | float) else ""


def _text(cell: Any) -> str:
    if isinstance(cell, float):
        return f"{cell:,.0f}" if abs(cell) >= 1000 else f"{cell:.3g}"
    return f"{cell:,}" if isinstance(cell, int) else _escape(str(cell))


def _escape(text: str) -> str:
    return html.escape(text)


def _any(row: Numbers) -> bool:
    return True


_SECTIONS: list[tuple[str, str, Callable[[Numbers], bool], Sequence[Column]]] = [
    (
        "Ceilings",
        "speed",
        lambda row: row["case"] == "ceilings",
        [
            ("bf16 TFLOP/s", _number("product_bf16_tflops")), ("fp16", _number("product_fp16_tflops")),
            ("fp32", _number("product_fp32_tflops")), ("copy GB/s", _number("copy_gb_s")),
            ("read GB/s", _number("read_gb_s")), ("of the data sheet: products", _number("product_share")),
            ("memory", _number("memory_share")), ("the simulator takes: products", _number("simulator_product_share")),
            ("memory", _number("simulator_memory_share")),
        ],
    ),
    (
        "Gate and layer: time over the floor and over ours",
        "speed",
        lambda row: "median_ms" in row,
        [
            ("case", _of("case")), ("candidate", _of("candidate")), ("ms", _number("median_ms")),
            ("least", _number("min_ms")), ("greatest", _number("max_ms")), ("over the floor", _number("floor_ratio")),
            ("over ours", _number("over_ours")),
        ],
    ),
    (
        "Tile sizes",
        "tune",
        _any,
        [
            ("shape class", _of("key")), ("own", _settings("own")), ("best", _settings("best")),
            ("own ms", _number("own_ms")), ("best ms", _number("best_ms")), ("gain", _number("gain")),
            ("tried", _of("tried")), ("refused", _of("refused")), ("wrong", _of("wrong")),
        ],
    ),
    (
        "Host time of a kernel, and the simulator's constant",
        "decode",
        lambda row: "host_us_a_kernel" in row,
        [
            ("case", _of("case")), ("form", _of("candidate")), ("step ms", _number("step_ms")),
            ("kernels", _of("kernels")), ("by the simulator", _of("simulator_kernels")),
            ("us a kernel", _number("host_us_a_kernel")), ("simulator's us", _number("simulator_eager_us")),
        ],
    ),
    (
        "Decoding: measured, and predicted from the data sheet and from the measured ceilings",
        "decode",
        lambda row: "model" in row,
        [
            ("model", _of("model")), ("batch", _of("batch")), ("form", _of("candidate")),
            ("step ms", _number("step_ms")), ("tokens/s", _number("tokens_per_s")),
            ("data sheet ms", _number("data_sheet_ms")), ("measured over it", _number("data_sheet_ratio")),
            ("ceilings ms", _number("ceilings_ms")), ("measured over it", _number("ceilings_ratio")),
            ("peak GiB", _number("peak_gib")),
        ],
    ),
    (
        "Training speed of the twins",
        "train",
        lambda row: "tokens_per_s" in row,
        [
            ("twin", _of("candidate")), ("tokens/s", _number("tokens_per_s")), ("step ms", _number("step_ms")),
            ("dtype", _of("dtype")), ("parameters, M", _number("parameters", 1e-6)),
            ("share of the product ceiling", _number("product_share")), ("peak GiB", _number("peak_gib")),
        ],
    ),
    (
        "Three arms on equal tokens, one seed: it shows that training works, and is no result",
        "train",
        lambda row: "validation_loss" in row,
        [
            ("arm", _of("candidate")), ("validation loss", _number("validation_loss")),
            ("unigram", _number("unigram_loss")), ("tokens, M", _number("tokens", 1e-6)),
            ("epochs", _number("epochs")), ("corpus", _of("corpus")), ("training s", _number("training_s")),
            ("parameters, M", _number("parameters", 1e-6)),
        ],
    ),
]  # fmt: skip
