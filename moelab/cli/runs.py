"""`moelab runs export` and `import`: pass on the numbers of finished runs, and take them over."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from moelab import terminal
from moelab.runs import records
from moelab.runs.preflight import existing
from moelab.runs.store import Run, RunStore

app = typer.Typer(no_args_is_help=True, help="Export and import the numbers of finished runs.")


@app.command(name="export")
def export_(
    names: Annotated[list[str] | None, typer.Argument(help="runs, or beginnings of their ids; none is all")] = None,
    to: Annotated[Path | None, typer.Option("--to", help="folder; default: .moelab/results/runs")] = None,
    publish: Annotated[bool, typer.Option("--publish", help="into results/runs")] = False,
) -> None:
    """Pack the numbers of finished runs, a zip for each model: spec, result, metrics, provenance, no weights."""
    if to and publish:
        raise ValueError("runs export: --to and --publish each name a folder; give one of them")
    to = to or records.folder(publish=publish)
    store = RunStore()
    runs = store.select(names or (), file="result.json")
    exported: list[Run] = []
    left_out: list[str] = []
    for name in runs:
        try:
            exported.append(store.at(name))
        except ValueError as error:  # made by another version; the others are good
            left_out.append(str(error))
    records.write(exported, to, left_out)
    for line in left_out:
        terminal.say(f"moelab: {line}", file=sys.stderr)
    terminal.say(f"{len(runs) - len(left_out)} runs packed into {to}")
    if left_out:
        raise ValueError(f"{len(left_out)} of {len(runs)} runs cannot be read and were not packed")


@app.command(name="import")
def import_(
    source: Annotated[Path | None, typer.Argument(help="folder of zips, or one; default: results/runs")] = None,
) -> None:
    """Take published runs over, so that an experiment trains only what is missing."""
    source = source or records.folder()
    archives = records.archives_in(source)
    if not archives:
        raise ValueError(f"{source}: no runs to take over; give a folder of zips that `moelab runs export` wrote")
    store = RunStore()
    taken = here = 0
    begun: list[str] = []
    others: list[str] = []
    for archive in terminal.counted(archives, "records"):
        try:
            taken_over = records.read(archive, store)
            if not (store.root / archive.stem / "result.json").exists():
                begun.append(archive.stem)
            elif taken_over is None and store.at(archive.stem).result != records.glance(archive)[1]:
                others.append(archive.stem)
        except (ValueError, PermissionError) as error:  # damaged, or here in a folder of another user; others are good
            if isinstance(error, PermissionError) and not os.access(existing(store.root), os.W_OK):
                raise  # so are all of them
            terminal.say(f"moelab: {error}", file=sys.stderr)
            continue
        taken, here = taken + (taken_over is not None), here + (taken_over is None)
    terminal.say(f"{taken} runs taken over, {here} were here already ({store.root})")
    if others:
        terminal.say(
            f"{len(others)} of these have another result here, of another training; remove the folder of one to take "
            f"it over: {', '.join(others)}"
        )
    if begun:
        terminal.say(
            f"{len(begun)} of these are not finished and go on from their own checkpoints; remove the folder of one to "
            f"take it over: {', '.join(begun)}"
        )
    if refused := len(archives) - taken - here:
        raise ValueError(f"{refused} of {len(archives)} records were not taken over")
