"""`moelab eval RUN --losses`: a trained run's validation loss by mode of inference and dtype.

The modes compute the same model, but round differently, bf16 above all. Each loss is that of the same tokens, so that a
difference to the first row is due to rounding alone. All modes are drop-free. The first row's loss is also told by
what the sequence has shown before of a token and the next one (`moelab.data.batches.pairs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moelab import terminal
from moelab.config import TrainConfig
from moelab.data.preparation import prepare
from moelab.inference.modes import MODES, set_mode
from moelab.inference.text import DTYPES, load_run, run_configs
from moelab.training.validation import evaluate

VARIANTS = tuple((mode, dtype) for dtype in DTYPES for mode in MODES)
"""Modes and dtypes; the others are compared with the first."""


def measure(run: Path, tokens: int, cache: Path) -> list[dict[str, Any]]:
    """Return a row for each mode and dtype: the run's validation loss, and its difference to the first row's.

    Args:
        run: directory of a run with weights.
        tokens: of each domain's validation text; 0 is all.
        cache: directory of prepared tokens.
    """
    config, data_config = run_configs(run)
    data = prepare(data_config, cache)
    rows: list[dict[str, Any]] = []
    for mode, dtype in VARIANTS:
        model = set_mode(load_run(run, data=data, dtype=dtype), mode)
        losses = evaluate(model, data, TrainConfig(), data_config.context, max_tokens=tokens)
        row = {"run": run.name, "model": str(config), "mode": mode, "dtype": dtype, "loss": losses["loss"]}
        row["minus_reference"] = losses["loss"] - (rows[0]["loss"] if rows else losses["loss"])
        rows.append({**row, "by_pair": losses["by_pair"], "validation_tokens": losses["validation_tokens"]})
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows, and what the first one's loss consists of."""
    title = f"{rows[0]['run']}, {rows[0]['validation_tokens']:,} validation tokens"
    view = terminal.table("mode", "loss, nats a token", f"minus {', '.join(VARIANTS[0])}", title=title)
    for row in rows:
        view.add_row(f"{row['mode']}, {row['dtype']}", f"{row['loss']:.6f}", f"{row['minus_reference']:+.1e}")
    terminal.console().print(view)
    parts = (f"{kind} {part['loss']:.4f} ({part['share']:.0%})" for kind, part in rows[0]["by_pair"].items())
    terminal.console().print(f"{', '.join(VARIANTS[0])}, by what the sequence had shown: {', '.join(parts)}")
