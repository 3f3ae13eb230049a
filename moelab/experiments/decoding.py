"""Measure decoding steps beside the simulated ones: the paper's baseline and the optimised mode take turns.

At scales smoke and cpu twins of the paper's models decode on gloo ranks of this machine, with the experts spread over
the ranks; at gpu larger twins on one GPU; at paper the models themselves, as `srun moelab bench decode` measured them
on the cluster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from moelab.config import ModelConfig
from moelab.design.experiment import Measure
from moelab.lazy import pd

MODES = ("baseline", "optimised")
SHRINK: dict[str, dict[str, int]] = {
    "smoke": {"hidden": 128, "depth": 8, "experts": 32, "vocab": 256, "context": 32},
    "cpu": {"hidden": 16, "depth": 4, "experts": 8, "vocab": 2048, "context": 128},
    "gpu": {"hidden": 8, "depth": 2, "experts": 8, "vocab": 50304, "context": 2048},
}
"""Scale -> how models of 1.3B to 2T are shrunk, see `ModelConfig.shrink`."""


def twins(
    models: Mapping[str, ModelConfig], scale: str, shrink: Mapping[str, Mapping[str, int]] = SHRINK
) -> dict[str, ModelConfig]:
    """Return the twins that `steps` measures below paper; random weights, which spread tokens over the experts."""
    if scale not in shrink:
        return {}
    return {name: replace(model.shrink(**shrink[scale]), init_std=0.05) for name, model in models.items()}


def steps(
    measure: Measure,
    experiment: str,
    models: Mapping[str, ModelConfig],
    scale: str,
    file: str | None = None,
    *,
    by: Literal["model", "size"] = "model",
    ranks: Sequence[int] = (2,),
    batches: Sequence[int] = (8,),
) -> pd.DataFrame:
    """Return one row for each measured step and mode.

    Args:
        measure: `Lab.measure`, which stores what is measured here.
        models: the models measured at smoke and cpu (8 sequences over gloo ranks) and gpu (`batches` sequences on one
            GPU).
        file: the file that is read at paper.
        by: what distinguishes the rows: the model, or the size (ranks, or on one GPU the batch).

    Returns:
        The columns of `moelab bench decode`, among them candidate (of `MODES`), median_ms, p95_ms, floor_ms and
        parts_ms (part -> ms), and name (the model's key) and label (by `by`).

    Raises:
        ValueError: there is no such file at scale paper, it is not one of ranks, or `by` does not tell two of its rows
            apart; the message is one line.
    """
    if scale == "paper":
        from moelab.bench.harness import rows_of_ranks

        rows = rows_of_ranks(experiment, file, "decode", ["model" if by == "model" else "ranks"])
    else:
        rows = measure(decode, models, scale, ranks, batches)
    return pd.DataFrame([{**row, "label": row["name"] if by == "model" else _size(row)} for row in rows])


def check_file(
    experiment: str, bench: Literal["decode", "exchange"], by: Sequence[str], parameters: Mapping[str, Any]
) -> None:
    """Refuse the scale paper without a file of times on ranks that can be read and drawn; ValueError, one line."""
    if parameters.get("scale") == "paper":
        from moelab.bench.harness import rows_of_ranks

        rows_of_ranks(experiment, parameters.get("measured_file"), bench, by)


def decode(
    models: Mapping[str, ModelConfig], scale: str, ranks: Sequence[int], batches: Sequence[int]
) -> list[dict[str, Any]]:
    """Measure the steps in this process; return rows of `moelab bench decode` with the model's key as name."""
    from moelab.bench.decode import DecodeSettings, measure, measure_ranks

    settings = DecodeSettings(4, 4, 1, rough=True) if scale == "smoke" else DecodeSettings(16, 24, 5)
    on_gpu = DecodeSettings(device="cuda", dtype="bf16")
    measured = []
    for name, model in models.items():
        if scale == "gpu":
            rows = [r for r in measure(model, list(batches), on_gpu) if r.candidate in MODES]
        else:
            rows = measure_ranks(model, list(ranks), 8, settings)
        measured += [{**row.json(), "name": name} for row in rows]
    return measured


def _size(row: Mapping[str, Any]) -> str:
    if "empty_collective_ms" in row:
        return f"{row['ranks']} rank{'s' if row['ranks'] > 1 else ''}"
    return f"batch {row['batch']}"


def speedups(steps: pd.DataFrame) -> dict[str, float]:
    """Return, by label, the baseline's median step time over the optimised mode's."""
    ms = steps.pivot(index="label", columns="candidate", values="median_ms").loc[list(dict.fromkeys(steps["label"]))]
    return (ms["baseline"] / ms["optimised"]).to_dict()


def caption(steps: pd.DataFrame) -> str:
    """Return in words how the steps were measured."""
    first = steps.iloc[0]
    return (
        f"Prompt {first['prompt']}, output {first['output']}, {first['rounds']} rounds; median, bar to the 95th "
        "percentile; of several ranks the slowest. Floor: weights and cache "
        f"read once, plus empty collectives. {steps['device'].iloc[-1]}."
    )
