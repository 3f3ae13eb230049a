"""`moelab gpu` and `moelab check-cluster`: what a new machine can do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moelab.cli._options import BENCHMARKS, Profile, Publish, check_device

OUT = typer.Option(help="folder of the results; by default .moelab/gpu/CARD, below the home")


def register(app: typer.Typer) -> None:
    """Add the commands to `moelab`."""
    app.command(rich_help_panel=BENCHMARKS)(gpu)
    app.command(name="check-cluster", rich_help_panel=BENCHMARKS)(check_cluster)


def gpu(
    stage: Annotated[list[str] | None, typer.Option("--stage", help="only this stage; repeat for several")] = None,
    minutes: Annotated[float, typer.Option(help="for all stages together, at most 25")] = 25.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list the stages with their limits, run nothing")] = False,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="run every stage's code on the CPU at tiny sizes; times mean nothing")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="also what has succeeded; earlier results are kept")] = False,
    out: Annotated[Path | None, OUT] = None,
    publish: Publish = False,
) -> None:
    """Check and measure this machine's GPU, and write a page.

    In stages of at most 25 minutes together. Called again, it goes on where it ended. The results pages list the page,
    too.
    """
    from moelab import paths, terminal
    from moelab.acceptance import page, stages

    chosen = stages.chosen(stage)
    most = stages.MOST_S / 60
    if not 1 <= minutes <= most:
        raise ValueError(f"--minutes must be 1 to {most:g}, got {minutes:g}")
    device = "cpu" if rehearse else "cuda"
    if dry_run:
        view = terminal.table("stage", "at most", "here", "what")
        for one in chosen:
            view.add_row(one.name, f"{one.limit_s} s", stages.missing(one, device) or "can run", one.what)
        view.add_row("page", f"{stages.PAGE_S} s", "", "what passed, what failed, ratios to floor and peers")
        console = terminal.console()
        console.print(view)
        console.print(f"at most {stages.total_s(chosen) / 60:.1f} minutes in all", highlight=False)
        return
    possible = not all(stages.missing(one, device) for one in chosen)
    folder = out or paths.home() / "gpu" / (stages.card(device) if possible else "none")
    setup = stages.Setup(folder.resolve(), device)
    if possible:
        _prepare(setup, again)
    outcomes = stages.run(setup, chosen, minutes=minutes, say=_say)
    if not setup.results.is_file():
        _say("page: skipped: no results")
        raise typer.Exit(1)
    _say(f"{page.verdict(outcomes)}: {paths.short(page.write(setup))}")
    if device == "cuda":
        listed = page.publish(setup, paths.results_for(publish) / "benchmarks", stages.card(device))
        _say(f"listed by the results pages: {paths.short(listed)}")
    raise typer.Exit(int(any(outcome["status"] != "done" or outcome["failed"] for outcome in outcomes)))


def _say(line: str) -> None:
    print(line, flush=True)


def _prepare(setup, again: bool) -> None:
    """Make the folder, with provenance; with `again`, put earlier results aside."""
    import torch  # noqa: F401 - so that the provenance names the GPUs

    from moelab.files import write_json
    from moelab.runs.provenance import provenance

    if again and setup.results.is_file():
        number = 1
        while (kept := setup.results.with_name(f"results-{number}.jsonl")).exists():
            number += 1
        setup.results.rename(kept)
        (setup.out / "stages.json").unlink(missing_ok=True)
    write_json(setup.out / "provenance.json", provenance())


def check_cluster(
    profile: Profile = None,
    cluster: Annotated[
        str | None, typer.Option(help="links to compare with: a100-40gb, a100-80gb, h100 or a YAML file")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu (gloo) or cuda (NCCL)")] = "cuda",
    folder: Annotated[
        Path | None, typer.Option(help="folder on the shared file system that is checked; by default the home")
    ] = None,
    mib: Annotated[int, typer.Option("--mib", help="largest message, and a rank's part of the checkpoint")] = 64,
    out: Annotated[Path | None, typer.Option(help="JSON file for the numbers")] = None,
) -> None:
    """Check the ranks of an allocation: a table and a verdict.

    Links, interfaces, clocks, file locks, writing. Run it on the ranks themselves: `srun moelab check-cluster`, or
    `torchrun --nproc-per-node 8 -m moelab.cli check-cluster`.
    """
    check_device(device)
    from moelab import paths
    from moelab.acceptance import cluster as module
    from moelab.slurm import profiles

    chosen = profiles.choose(profile) if profile else None
    good = module.main(
        device=device,
        links=cluster,
        gpus_per_node=chosen.gpus_per_node if chosen else 0,
        environment=chosen.environment if chosen else (),
        folder=folder or paths.home(),
        largest=mib << 20,
        out=out,
    )
    raise typer.Exit(int(not good))
