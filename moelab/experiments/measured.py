"""Decoding steps measured beside the simulated ones, the baseline and the optimised mode in turns.

At scales smoke and cpu twins of the paper's models on gloo ranks of this machine, experts spread over the ranks; at gpu larger twins on one GPU; at paper the models themselves, as
`srun moelab bench decode` measured them on the cluster.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from moelab.config import ModelConfig
    from moelab.experiments.base import Measure

MODES = ("baseline", "optimised")
SHRINK: dict[str, dict[str, int]] = {
    "smoke": {"hidden": 128, "depth": 8, "experts": 32, "vocab": 256, "context": 32},
    "cpu": {"hidden": 16, "depth": 4, "experts": 8, "vocab": 2048, "context": 128},
    "gpu": {"hidden": 8, "depth": 2, "experts": 8, "vocab": 50304, "context": 2048},
}
"""scale -> how models of 1.3B to 2T are shrunk, see `ModelConfig.shrink`."""
TINTS = {
    "attention": "#56B4E9",
    "gate": "#F0E442",
    "dispatch": "#E69F00",
    "all-to-all": "#D55E00",
    "experts": "#009E73",
    "combine": "#CC79A7",
    "feed-forward": "#0072B2",
    "head": "#7A5195",
    "sums": "#AAAAAA",
    "rest": "#DDDDDD",
}
"""Colours of `moelab.bench.clock.PARTS`, in their order; that module's import takes torch."""


def twins(models: Mapping[str, ModelConfig], scale: str) -> dict[str, ModelConfig]:
    """What `steps` measures at smoke, cpu and gpu; weights are random, and spread tokens over the experts. Nothing at paper."""
    if scale not in SHRINK:
        return {}
    return {name: replace(model.shrink(**SHRINK[scale]), init_std=0.05) for name, model in models.items()}


def steps(
    measure: Measure,
    experiment: str,
    models: Mapping[str, ModelConfig],
    scale: str,
    file: str = "",
    *,
    ranks: Sequence[int] = (2,),
    batches: Sequence[int] = (8,),
) -> list[dict]:
    """Decoding steps: rows of `moelab bench decode`, with `name`, the model's key.

    Args:
        measure: `Lab.measure`, which stores what is measured here.
        models: what is measured at smoke and cpu (8 sequences over gloo ranks) and gpu (`batches` sequences on one GPU).
        file: what is read at paper.

    Raises:
        ValueError: one line: no such file at scale paper, or it is not that of ranks.
    """
    if scale == "paper":
        return read(experiment, file)
    return measure(decoding, models, scale, ranks, batches)


def decoding(models: Mapping[str, ModelConfig], scale: str, ranks: Sequence[int], batches: Sequence[int]) -> list[dict]:
    """The measurement of `steps`, here and now."""
    from moelab.bench.decode import Protocol, measure, measure_ranks

    protocol = Protocol(4, 4, 1, 2) if scale == "smoke" else Protocol(16, 24, 5, 4)
    found = []
    for name, model in models.items():
        if scale == "gpu":
            rows = [r for r in measure(model, list(batches), Protocol(), "cuda") if r["candidate"] in MODES]
        else:
            rows = measure_ranks(model, list(ranks), 8, protocol)
        found += [{**row, "name": name} for row in rows]
    return found


def read(experiment: str, file: str, bench: str = "decode") -> list[dict]:
    """The rows that `srun moelab bench decode --device cuda --out ...` wrote on the cluster, of one run or of several joined together, fewest ranks first.

    bench: "decode" or "exchange", whose rows are told by a field of their own.
    """
    mark = {"decode": "empty_collective_ms", "exchange": "alpha_ms"}[bench]
    if not file:
        raise ValueError(
            f"{experiment}: scale paper needs -p measured_file=FILE, the {bench}.jsonl of `srun moelab bench {bench}`"
        )
    try:
        rows = [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no JSON lines"
        raise ValueError(f"{experiment}: {file}: {reason}") from None
    rows = [row for row in rows if isinstance(row, dict) and mark in row]
    if not rows:
        raise ValueError(f"{experiment}: {file}: no rows of ranks in it")
    return [{"name": row.get("model", ""), **row} for row in sorted(rows, key=lambda row: row["ranks"])]


def by_size(row: dict) -> str:
    """What tells the rows of one model apart: its ranks, or on one GPU its batch."""
    if "empty_collective_ms" in row:
        return f"{row['ranks']} rank{'s' if row['ranks'] > 1 else ''}"
    return f"batch {row['batch']}"


def by_name(row: dict) -> str:
    """What tells the rows of several models apart."""
    return row["name"]


def speedups(rows: Sequence[dict], label: Callable[[dict], str]) -> dict[str, float]:
    """Label -> the baseline's median step over the optimised one's."""
    step: dict[str, dict[str, float]] = {}
    for row in rows:
        step.setdefault(label(row), {})[row["candidate"]] = row["median_ms"]
    return {where: ms["baseline"] / ms["optimised"] for where, ms in step.items()}


def draw(rows: Sequence[dict], left: Axes, right: Axes, label: Callable[[dict], str]) -> None:
    """Left: latency of each label with the bar to p95, and the floor. Right: where the optimised mode's step goes."""
    from moelab.experiments import simulated

    colors = {"baseline": simulated.SYSTEM_COLORS["pytorch"], "optimised": simulated.SYSTEM_COLORS["moelab"]}
    line = "-" if label is by_size else ""
    for mode, color in colors.items():
        mine = [row for row in rows if row["candidate"] == mode]
        median = [row["median_ms"] for row in mine]
        above = [max(row["p95_ms"] - row["median_ms"], 0.0) for row in mine]
        x = range(len(mine))
        left.errorbar(x, median, yerr=[[0.0] * len(mine), above], fmt="o" + line, capsize=3, color=color, label=mode)
    best = [row for row in rows if row["candidate"] == "optimised"]
    labels = [label(row) for row in best]
    left.plot(range(len(best)), [row["floor_ms"] for row in best], "_", markersize=24, color="#444444", label="floor")
    left.set(yscale="log", ylabel="latency of a step (ms)", xlim=(-0.5, len(best) - 0.5))
    left.set_xticks(range(len(best)), labels)
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter(lambda v, _: f"{v:g}" if f"{v:e}"[0] in "25" else "")
    left.legend()
    ends = [0.0] * len(best)
    for part, color in TINTS.items():
        ms = [row["parts_ms"].get(part, 0.0) for row in best]
        if max(ms):
            right.barh(labels, ms, left=ends, color=color, label=part)
            ends = [a + b for a, b in zip(ends, ms, strict=True)]
    right.invert_yaxis()
    right.grid(axis="y", visible=False)
    right.set(xlabel="ms of a step, optimised, under the clock")
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def caption(rows: Sequence[dict]) -> str:
    """How the steps were measured."""
    first = rows[0]
    return (
        f"Prompt {first['prompt']}, output {first['output']}, {first['rounds']} rounds; median, bar to the 95th percentile; of several ranks the slowest. Floor: weights and cache "
        f"read once, plus empty collectives. {rows[-1]['device']}."
    )
