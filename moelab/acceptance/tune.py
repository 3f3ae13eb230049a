"""Tune the kernels' tiles on the card (`moelab.kernels.tools.tune`); its table goes to workspace and results."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from moelab import paths
from moelab.acceptance import stages
from moelab.acceptance.cases import Case, Context, Numbers
from moelab.kernels import tuning
from moelab.kernels.tools import tune


def cases(context: Context) -> Iterator[Case]:
    """Yield a case for each op and shape; the table is written after each, so that a stage that is ended keeps it."""
    name = stages.card(context.device)
    tables = [folder / f"{tuning.card(name)}.json" for folder in (context.setup.out, paths.home() / "tuned")]
    with ExitStack() as rows:
        for target in tune.targets(context.device, tiny=context.tiny):
            if target.op == "rows":
                rows.close()
            case = Case(
                f"{target.op} {target.shape}",
                lambda target=target: _tuned(target, context, tables[: 1 if context.tiny else 2], name),
                (),
                10,
            )
            yield case
            done = context.earlier("tune", case.name)
            if target.op == "rows" and done:  # the products are tuned for the rows that a tile will have
                rows.enter_context(tuning.trial("rows", done[-1]["best"]))


def _tuned(target: tune.Target, context: Context, tables: list[Path], name: str) -> Numbers:
    deadline = time.monotonic() + min(context.left() - 5, 2 if context.tiny else 45)
    found = tune.tune(target, deadline)
    if found is None:
        raise TimeoutError("no time for the op's own tile")
    for path in tables:
        tune.write([found], path, name)
    gain = found.own_ms / found.best_ms
    text = f"{gain:.2f} times as fast with {found.best}" if found.best else f"own tile kept ({found.own_ms:.3g} ms)"
    return {**vars(found), "gain": gain, "finding": text}
