"""`moelab list`, `run`, `claims`, `power`: experiments and what they found.

Heavy modules are imported inside the commands.
"""

from __future__ import annotations

import re
import sys
from typing import Annotated

import typer

from moelab import paths, terminal
from moelab.cli._options import (
    SEVERAL_EXPERIMENTS,
    AsJson,
    Parameters,
    Publish,
    experiment_names,
    parse_parameters,
    print_json,
    would_be_refused,
)
from moelab.lazy import pd


def list_(
    name: Annotated[
        str | None, typer.Argument(help="an experiment, of which to say more", autocompletion=experiment_names)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the experiments, or one with its scales and costs."""
    from rich.markup import escape

    from moelab.experiments import EXPERIMENTS as KNOWN
    from moelab.experiments import experiment

    if as_json:
        columns = ("name", "number", "title", "paper", "question", "paper_answer", "arms", "scales")
        shown = KNOWN.values() if name is None else [experiment(name)]
        print_json([{key: getattr(e, key) for key in columns} for e in shown])
        return
    console = terminal.console()
    if name is None:
        view = terminal.table("experiment", "in the paper", "cheapest cost")
        for e in KNOWN.values():
            scale, first = next((item for item in e.scales.items() if item[0] != "smoke"), (*e.scales.items(),)[0])
            figure = re.sub(r" \(sec[^)]*\)", "", e.paper)
            cost = re.sub(r" \([^)]*\)$", "", first.cost).removeprefix("about ")
            cost = re.sub(r"(\d) minutes", r"\1 min", cost)
            cost = cost.replace(" a seed on one core", "/seed, one core")
            view.add_row(e.name, figure, f"{scale}: {cost}")
        console.print(view)
        console.print(
            "moelab list NAME says more of one; moelab run NAME --scale SCALE -p seeds=3 runs it (else cpu, one seed)",
            markup=False,
        )
        return
    e = experiment(name)
    console.print(f"[bold]{escape(e.title)}[/] · {escape(e.paper)} · notebooks/{e.notebook}", highlight=False)
    console.print(f"question  {e.question}\nthe paper  {e.paper_answer}", markup=False, highlight=False)
    if e.arms:
        console.print(f"arms  {', '.join(e.arms)}", markup=False, highlight=False)
    view = terminal.table("scale", "what", "cost")
    for scale, about in e.scales.items():
        view.add_row(scale, escape(about.what), escape(about.cost))
    console.print(view)


def run(
    names: Annotated[list[str] | None, SEVERAL_EXPERIMENTS] = None,
    scale: Annotated[str | None, typer.Option(help="smoke, quick, cpu (the default), full, gpu or paper")] = None,
    parameter: Parameters = None,
    all_: Annotated[bool, typer.Option("--all", help="every experiment that has the scale")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="only say what would be trained, and what it costs")
    ] = False,
    publish: Publish = False,
) -> None:
    """Train the missing runs of experiments, execute their notebooks, and show the results.

    A run that several of them need is trained once. Their figures and claims go onto the results page.
    """
    from moelab.design.parameters import resolve
    from moelab.experiments import experiment
    from moelab.notebook import batch
    from moelab.runs import preflight
    from moelab.runs.dry_run import on_this_machine, planned_runs, show

    if all_ == bool(names):
        raise ValueError("run: give experiments' names or --all; see `moelab list`")
    given = {"scale": "cpu", **parse_parameters(parameter, scale)}
    wanted = [resolve(experiment(name), given) for name in dict.fromkeys(names or ())] or batch.chosen(given)
    trained = [spec for request in wanted for spec in request.trained]
    if all_ and (without := batch.left_out(given["scale"])):
        terminal.say(f"left out, because each needs its own -p measured_file=FILE: {', '.join(without)}")
    if dry_run:
        trouble = would_be_refused(lambda: preflight.check_texts(trained))
        show(planned_runs(trained))
        if trouble:
            terminal.console().print(trouble, markup=False, highlight=False)
        return
    # What was measured with the weights of finished runs is read back; that needs no GPU.
    on_gpu = any(r.scale in r.experiment.measures_on_gpu and (r.experiment.measures or not r.specs) for r in wanted)
    preflight.check(trained, device="cuda" if on_gpu else "cpu", publish=publish)
    for line in on_this_machine(planned_runs(trained)):
        terminal.say(line)
    from moelab.notebook.watch import GO_ON, execute_watched

    try:
        if len(wanted) > 1:
            from moelab.lab import Lab

            good = batch.run_all(wanted, Lab().run, publish=publish)
        else:
            good = execute_watched(wanted[0].experiment, wanted[0].given, publish=publish)
    except KeyboardInterrupt:
        terminal.say(GO_ON)
        raise typer.Exit(130) from None
    if not good:
        raise typer.Exit(1)


def claims(
    name: Annotated[
        str | None, typer.Argument(help="an experiment, or the start of a claim's id; default: all claims")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the paper's claims, our values and the verdicts."""
    from moelab.report.ledger import counts, distinct, entries, family, listing
    from moelab.report.summary import read_all

    summaries, unreadable = read_all(*paths.all_results())
    for line in unreadable:
        print(f"not readable: {line}", file=sys.stderr)
    ledger = entries(summaries)
    shown = [e for e in ledger if name is None or e.experiment == name or e.claim.startswith(name)]
    if not shown:
        raise ValueError(f"claims: no experiment {name!r}, and no claim id starts with it; see `moelab list`")
    counted, together = counts(ledger), family(ledger)
    if as_json:
        print_json({"claims": shown, "counts": counted, "family": together})
        return
    console = terminal.console()
    console.print(f"{len(distinct(ledger))} claims in {len(ledger)} rows", markup=False, highlight=False)
    for kind, verdicts in counted.items():
        console.print(
            f"{kind}: {', '.join(f'{n} {verdict}' for verdict, n in verdicts.items())}", markup=False, highlight=False
        )
    console.print(f"{together}.", markup=False, highlight=False)
    for claim, alone in together.withdrawn.items():
        console.print(f"{claim}: {alone} alone, cannot be told after adjustment", markup=False, highlight=False)
    console.print(listing(shown), highlight=False)


def power(
    name: Annotated[str, typer.Argument(help="experiment, see `moelab list`")],
    scale: Annotated[str, typer.Option(help="scale whose published spread is used")] = "cpu",
    against: Annotated[
        str | None, typer.Option(help="arm with which all others are compared; default: the paper's claims")
    ] = None,
    effect: Annotated[
        float | None, typer.Option(help="smallest difference of two arms to detect, nats per token; default: 0.01")
    ] = None,
) -> None:
    """Show how many seeds an experiment's comparisons need.

    By the spread over seeds in its newest result, published or your own: of the paper's claims that it measures, or of
    all arms against one of them.
    """
    from moelab.design.power import MAX_SEEDS
    from moelab.experiments import experiment
    from moelab.report.planning import SMALLEST, needs

    with terminal.working(f"reading the results of {name} at {scale}"):
        rows = needs(name, scale, *paths.all_results(), against=against, effect=effect)
    sought = f"{effect:g} nats per token" if effect else "its own effect"
    view = terminal.table(
        *("comparison", "spread of a seed", "seeds known", "effect", "one look", "at most", "on average"),
        title=f"{experiment(name).name} at scale {scale}: seeds with which each comparison detects {sought}",
    )
    for row in rows.to_dict("records"):
        seen, missing = row["effect from"], "–"
        if pd.notna(row["effect"]):
            seen, missing = f"{row['effect']:.3g}, {seen}", f"> {MAX_SEEDS}"
        seeds = [missing if pd.isna(row[k]) else f"{row[k]:.0f}" for k in ("at once", "at most", "on average")]
        view.add_row(row["comparison"], f"{row['spread']:.2g}", f"{row['seeds']}", seen, *seeds)
    terminal.console().print(view)
    terminal.say(
        "The comparison decides with 80 % probability if the effect is there: with one look; at most, and on average, "
        "with a look at every third seed, where it stops as soon as it decides. The effect of a claim is half the "
        f"paper's, or the smallest of interest where the paper gives no number; of two arms {SMALLEST:g} nats per "
        "token (--effect). The spread of a few seeds is itself uncertain, and with it these numbers."
    )
