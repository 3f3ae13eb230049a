"""`moelab try`: from an idea to a number. Heavy modules are imported inside the command."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moelab import environment, paths, terminal
from moelab.cli._options import check_choice, print_json

if TYPE_CHECKING:
    from moelab.experiments.parts import Part
    from moelab.experiments.tries import Outcome
    from moelab.runs.collection import Runs
    from moelab.runs.spec import RunSpec

SCALES = ("smoke", "quick", "cpu", "full")


def setting_names(incomplete: str) -> list[str]:
    """Complete the name of a setting of the model or the training."""
    from moelab.config.overrides import settable

    return [f"{n}=" for n in settable() if n.startswith(("model.", "train.")) and n.startswith(incomplete)]


def try_(
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME=VALUE...",
            help="settings of the variant, as `moelab run -p` takes them; without any and without --file: your tries",
            autocompletion=setting_names,
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(help="Python file with one function or class that replaces a part; your code is executed"),
    ] = None,
    scale: Annotated[str, typer.Option(help="smoke, quick (minutes), cpu (hours) or full (a day)")] = "quick",
    seeds: Annotated[int, typer.Option(help="seeds of each side; 0 plans them by the published spread")] = 0,
    effect: Annotated[
        float | None,
        typer.Option(help="smallest difference to detect, nats per token; default: 0.03 at quick, 0.04 at cpu"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="the outcome as JSON; progress on standard error")] = False,
) -> None:
    """Train an idea and the baseline, and say whether it helps.

    The baseline is the twin of MoE-128; its runs are read back if they exist.

    Prints difference, speed-up, noise floor, verdict, and seeds to know.
    """
    check_choice("--scale", scale, SCALES)
    given = _parsed(settings or [])
    if not given and file is None:
        _show_past(as_json)
        return
    if not 0 <= seeds <= 99:
        raise ValueError(f"--seeds must be 0 (planned) to 99, got {seeds}")
    if effect is not None and not 0 < effect < float("inf"):
        raise ValueError(f"--effect must be a positive number of nats per token, got {effect}")
    from moelab.experiments import parts, tries

    tries.pair(given, scale, 1, "try", same=file is not None)  # refuses settings before a file is executed
    part = parts.load(file) if file else None
    label = " ".join(f"{name.rpartition('.')[2]}={value}" for name, value in given.items())
    label = " ".join(filter(None, (f"{part.name} of {file.name}" if part and file else "", label)))
    label = f"{label} (try)" if label == tries.BASELINE else label
    given = (part.settings if part else {}) | given
    seeds = seeds or _plan(scale, effect)
    specs = tries.pair(given, scale, seeds, label, same=part is not None)
    runs = _trained(specs, seeds, part)
    outcome = tries.judge(runs, label, scale)
    if outcome is None:
        raise ValueError(f"try: no result; {runs.explain_missing() or 'all runs are missing'}")
    _keep(outcome, given, file)
    if as_json:
        print_json({**outcome.__dict__, "settings": given, "file": str(file) if file else None})
        return
    _show(outcome, runs, part)


def _parsed(settings: Sequence[str]) -> dict[str, str]:
    given = {}
    for item in settings:
        name, separator, value = item.partition("=")
        if not separator:
            raise ValueError(f"try: {item!r}: expected NAME=VALUE, such as model.routing.z_loss=1e-3")
        given[name.strip()] = value.strip()
    return given


def _plan(scale: str, effect: float | None) -> int:
    """Return the number of seeds, and say on standard error where it comes from."""
    from moelab.experiments import tries
    from moelab.report.planning import spread_of

    known = spread_of(tries.EXPERIMENT.specs(scale, 1, arms=[tries.BASELINE])[0], *paths.all_results())
    seeds = tries.planned_seeds(scale, known[0] if known else None, effect)
    wanted = effect or tries.EFFECTS[scale]
    why = "the fewest that are judged; no published result has the spread of this baseline"
    if known:
        spread, n, where = known
        why = f"to detect {wanted:g} nats per token; the baseline's {n} seeds spread by {spread:.4f} ({where})"
    terminal.say(f"{seeds} seeds of each side: {why}", file=sys.stderr)
    return seeds


def _trained(specs: Sequence[RunSpec], seeds: int, part: Part | None) -> Runs:
    """Return the runs of the baseline and of the variant; the missing ones are trained."""
    from rich.console import Console

    from moelab.lab import Lab
    from moelab.notebook.watch import GO_ON, watching
    from moelab.runs import preflight
    from moelab.runs.dry_run import on_this_machine, planned_runs
    from moelab.runs.store import RunStore

    preflight.check(specs)
    for line in on_this_machine(planned_runs(specs)):
        terminal.say(line, file=sys.stderr)
    console = Console(stderr=True)

    def run(lab: Lab, of: Sequence[RunSpec], **how: Any) -> Runs:
        with watching(console) as plan:
            os.environ[environment.PLAN.name] = str(plan)
            try:
                return lab.run(of, **how)
            finally:
                del os.environ[environment.PLAN.name]

    try:
        if part is None:
            return run(Lab(), specs)
        from moelab.experiments.parts import installed

        baseline = run(Lab(), specs[:seeds])
        part.keep()
        terminal.say("the variant trains in this process, one seed after the other", file=sys.stderr)
        with installed(part):
            return baseline + run(Lab(RunStore(part.folder() / "runs")), specs[seeds:], executor="inline")
    except KeyboardInterrupt:
        terminal.say(GO_ON, file=sys.stderr)
        raise typer.Exit(130) from None


def _past() -> Path:
    return paths.home() / "tries" / "tries.jsonl"


def _keep(outcome: Outcome, given: dict[str, Any], file: Path | None) -> None:
    """Append the outcome to the list of the user's tries, failures included."""
    _past().parent.mkdir(parents=True, exist_ok=True)
    row = {**outcome.__dict__, "settings": given, "file": str(file) if file else None}
    with open(_past(), "a", encoding="utf-8") as log:
        log.write(json.dumps(row) + "\n")


def _show(outcome: Outcome, runs: Runs, part: Part | None) -> None:
    from moelab.experiments.tries import BASELINE

    o = outcome
    side = "lower" if o.difference < 0 else "higher"
    interval = "no interval from one seed" if o.low is None else f"95 % interval {o.low:+.3f} to {o.high:+.3f}"
    rows = {"difference": f"{abs(o.difference):.3f} nats per token {side} ({interval})"}
    if o.noise is not None:
        rows["noise floor"] = f"{o.noise:.3f} nats per token: seeds of the baseline alone differ by up to this (95 %)"
    rows["speed-up"] = _speed_up(o)
    rows["verdict"] = o.verdict
    if o.low is not None:
        needed = "more than 99" if o.to_know is None else o.to_know
        rows["to know"] = f"{needed} seeds of each side detect a difference of this size with 80 % probability"
    rows["next"] = o.next
    cpus = {str((run.provenance.get("hardware") or {}).get("cpu")) for run in runs.finished}
    if o.flops is not None:
        rows["how read"] = "interpolated on mean loss curves; the learning rate has not decayed before their end"
    if len(cpus) > 1:
        rows["caution"] = "the runs are of several processors, which alone moves a loss by up to 0.02 nats"
    if part is not None and part.kind[0].isupper():
        rows["FLOPs"] = f"of {BASELINE} on both sides; what {part.name} adds is not counted"
    view = terminal.table("", f"{o.idea} against {BASELINE}, {o.scale}, {o.seeds} seed{'s' * (o.seeds > 1)} each")
    view.columns[0].no_wrap = True
    from rich.markup import escape

    for name, said in rows.items():
        view.add_row(name, escape(said))
    terminal.console().print(view, highlight=False)


def _speed_up(o: Outcome) -> str:
    if o.flops is None:
        return "unknown: the loss curves do not reach each other's end"
    bounds = [f"{bound:.2f}" if bound is not None else "?" for bound in (o.flops_low, o.flops_high)]
    interval = f" ({bounds[0]} to {bounds[1]})" if o.low is not None else ""
    seconds = f", {o.seconds:.2f} times fewer seconds" if o.seconds is not None else ""
    return f"{o.flops:.2f} times fewer FLOPs to an equal loss{interval}{seconds}; below 1 it takes more"


def _show_past(as_json: bool) -> None:
    rows = [json.loads(line) for line in _past().read_text().splitlines()] if _past().exists() else []
    if as_json:
        print_json(rows)
        return
    console = terminal.console()
    if not rows:
        console.print("no tries yet; the first: moelab try model.routing.z_loss=1e-3", markup=False)
        return
    from rich.markup import escape

    view = terminal.table("idea", "scale", "seeds", "nats per token", "verdict")
    for row in rows:
        view.add_row(
            escape(row["idea"]), row["scale"], str(row["seeds"]), f"{row['difference']:+.3f}", escape(row["verdict"])
        )
    console.print(view)
