"""`moelab trace`, `conform`: where tokens go, and whether somebody's MoE layer does what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moelab import paths, terminal
from moelab.cli._options import AsJson, RunOrModel, check_device, check_dtypes, print_json
from moelab.runs.store import RunStore


def trace(
    run: RunOrModel,
    out: Annotated[Path, typer.Argument(help="the parquet file to write")],
    corpus: Annotated[
        str | None, typer.Option(help="text to route; default: a run's own, mix5 for an imported model")
    ] = None,
    tokens: Annotated[int, typer.Option(help="maximum number of tokens of each domain; 0 is all")] = 20_000,
    dtype: Annotated[str, typer.Option(help="of the weights: fp32 or bf16")] = "fp32",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
) -> None:
    """Write which token went to which expert, in every MoE layer, as parquet.

    A row is one choice of an expert; docs/trace.md describes the columns.
    """
    check_device(device)
    check_dtypes([dtype])
    if tokens < 0:
        raise ValueError(f"--tokens must be 0 (all) or more, got {tokens}")
    if out.suffix != ".parquet":
        raise ValueError(f"trace: the file must end in .parquet, got {out}")
    directory = RunStore().find(run)
    from moelab.evaluation import traces

    cache = paths.home() / "data"
    with terminal.working(f"routing text with {directory.name}"):
        n = traces.write(directory, out, cache=cache, corpus=corpus, max_tokens=tokens, dtype=dtype, device=device)
    terminal.say(f"{n['rows']:,} choices of {n['tokens']:,} tokens in {n['layers']} layers: {out}")


def conform(
    layer: Annotated[
        str, typer.Argument(metavar="MODULE:CALLABLE", help="import path of the layer; its code is executed")
    ],
    hidden: Annotated[int, typer.Option(help="width of the tokens")] = 32,
    experts: Annotated[int, typer.Option(help="number of experts")] = 8,
    top_k: Annotated[int, typer.Option(help="experts of a token")] = 2,
    as_json: AsJson = False,
) -> None:
    """Check somebody's MoE layer against the reference.

    MODULE:CALLABLE takes (hidden, experts, top_k) and returns a module.

    Checks balance, drops, gradients and determinism; exit code 1 on a failure.
    """
    for name, value, least in (("hidden", hidden, 1), ("experts", experts, 2), ("top-k", top_k, 1)):
        if value < least:
            raise ValueError(f"--{name} must be at least {least}, got {value}")
    if top_k > experts:
        raise ValueError(f"--top-k must be at most the number of experts, {experts}, got {top_k}")
    from moelab.evaluation import conform as checks

    make = checks.load(layer)
    found, ours = (checks.conform(of, hidden, experts, top_k) for of in (make, checks.reference))
    if as_json:
        print_json({"layer": layer, "checks": found, "reference": ours})
    else:
        from rich.markup import escape

        words = {True: "passes", False: "FAILS", None: "not checked"}
        view = terminal.table("check", "result", layer, "reference")
        for theirs, own in zip(found, ours, strict=True):
            view.add_row(theirs.name, words[theirs.passed], escape(theirs.found), escape(own.found))
        terminal.console().print(view, highlight=False)
    if any(check.passed is False for check in found):
        raise typer.Exit(1)
