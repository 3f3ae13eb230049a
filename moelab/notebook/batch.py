"""Several experiments in one go: first every run, each once, then the notebooks, several at a time."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moelab import environment, machine, paths
from moelab.design.parameters import Request, parameters, resolve
from moelab.experiments import EXPERIMENTS
from moelab.report import site
from moelab.runs.collection import NoResult, Runs
from moelab.runs.spec import RunSpec


def chosen(given: Mapping[str, str]) -> list[Request]:
    """Return the experiments that have the scale, each with those of the given parameters that its notebook takes.

    Overrides (dotted names) are for the notebooks whose runs can be overridden. Those of `left_out` are not there.

    Args:
        given: name -> text, the scale among them.

    Raises:
        ValueError: no notebook takes a parameter, a value is of the wrong type, or no experiment has the scale.
    """
    scale, without = given["scale"], left_out(given["scale"])
    wanted = {e.name: parameters(e) for e in EXPERIMENTS.values() if scale in e.scales and e.name not in without}
    if not wanted:
        scales = dict.fromkeys(name for e in EXPERIMENTS.values() for name in e.scales)
        raise ValueError(f"no experiment has the scale {scale!r}; allowed: {', '.join(scales)}")
    takes = {
        name: [key for key in given if key in known or ("." in key and "overrides" in known)]
        for name, known in wanted.items()
    }
    for key in given:
        if not any(key in taken for taken in takes.values()):
            raise ValueError(f"no notebook takes a parameter {key!r}")
    return [resolve(EXPERIMENTS[name], {key: given[key] for key in taken}) for name, taken in takes.items()]


def left_out(scale: str) -> list[str]:
    """Return the experiments that read a file of times on ranks at this scale, of which each needs its own."""
    having = [e for e in EXPERIMENTS.values() if scale in e.scales] if scale == "paper" else []
    return [e.name for e in having if "measured_file" in parameters(e)]


def _publish(
    name: str, values: Mapping[str, Any], publish: bool, log: str, variables: Mapping[str, str], folder: str
) -> None:
    """One notebook, in a process of its own; its output goes to the log."""
    os.environ.clear()  # what this process was forked from may be of another time
    os.environ.update(variables)
    os.chdir(folder)
    with open(log, "wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from moelab.notebook.watch import execute_watched

    try:
        sys.exit(0 if execute_watched(EXPERIMENTS[name], values, publish=publish, page=False) else 1)
    except KeyboardInterrupt:  # the terminal's, which the command answers
        sys.exit(130)


def run_all(wanted: Sequence[Request], run: Callable[[Sequence[RunSpec]], Runs], *, publish: bool = False) -> bool:
    """Train and publish these experiments; True when all were published whole.

    A notebook that fails does not stop the others. Its output goes into a log in the home folder, named here. What
    takes part of each notebook's time and is the same for all, what papermill and nbconvert load, is done once.

    Args:
        wanted: the experiments with their parameters.
        run: `Lab.run`.
        publish: into the published results instead of the user's own.
    """
    from rich.console import Console

    from moelab.notebook.watch import watching

    started = time.monotonic()
    specs = [spec for request in wanted for spec in request.trained]
    with watching(Console()) as plan:
        os.environ[environment.PLAN.name] = str(plan)
        try:
            runs = run(specs)
        except NoResult as error:  # the other experiments go on
            runs = error.runs
        finally:
            del os.environ[environment.PLAN.name]
    if why := runs.explain_missing():
        print(why)
    print(f"{len({s.id for s in specs})} runs in {time.monotonic() - started:.0f} s", flush=True)
    logs = paths.home() / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    context: Any = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
    context.set_forkserver_preload(["moelab.notebook.preload"])
    log_of: dict[str, str] = {}
    failed: list[str] = []
    going: dict[str, tuple[Any, float]] = {}

    def reap(until: int) -> None:
        while len(going) > until:
            multiprocessing.connection.wait([process.sentinel for process, _ in going.values()])
            for name, (process, since) in list(going.items()):
                if process.exitcode is not None:
                    del going[name]
                    good = process.exitcode == 0
                    failed.extend([] if good else [name])
                    result = "published" if good else f"FAILED, see {log_of[name]}"
                    print(f"{name}: {result} ({time.monotonic() - since:.0f} s)", flush=True)

    for request in sorted(wanted, key=lambda request: request.experiment.measures):
        # A measurement beside nothing else: notebooks that time something come last, and each alone.
        reap(0 if request.experiment.measures else machine.cores() - 1)
        name = request.experiment.name
        log_of[name] = str(logs / f"{name}-{request.scale}.log")
        arguments = (name, request.given, publish, log_of[name], dict(os.environ), os.getcwd())
        process = context.Process(target=_publish, args=arguments)
        process.start()
        going[name] = (process, time.monotonic())
    reap(0)
    count = f"{len(wanted) - len(failed)} of {len(wanted)} experiments"
    index = site.update(publish=publish).index
    print(f"{count} published in {time.monotonic() - started:.0f} s; {paths.short(index)}")
    return not failed
