"""All experiments of a scale in one go: first every run, each once, then the notebooks, several at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping

from moelab.workbench import notebooks
from moelab.workbench.experiments import EXPERIMENTS, Experiment
from moelab.workbench.specs import RunSpec


def chosen(scale: str, given: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Experiment -> the parameters its notebook takes of those given; experiments without the scale are left out.

    Raises:
        ValueError: no notebook takes a parameter, a value is of the wrong type, or no experiment has the scale.
    """
    found: dict[str, dict[str, str]] = {}
    for e in EXPERIMENTS.values():
        if scale in e.scales:
            allowed = notebooks.parameters(e)
            found[e.name] = {"scale": scale} | {k: v for k, v in given.items() if k in allowed}
            notebooks.check_parameters(e, found[e.name])
    if not found:
        scales = dict.fromkeys(name for e in EXPERIMENTS.values() for name in e.scales)
        raise ValueError(f"no experiment has the scale {scale!r}; allowed: {', '.join(scales)}")
    for name in given:
        if not any(name in taken for taken in found.values()):
            raise ValueError(f"no notebook takes a parameter {name!r}")
    return found


def specs_of(experiment: Experiment, values: Mapping[str, str]) -> list[RunSpec]:
    """The runs a notebook asks for with these parameters and its defaults for the others."""
    allowed = notebooks.parameters(experiment)
    given = {name: p.default for name, p in allowed.items()} | notebooks.check_parameters(experiment, values)
    return list(experiment.specs(**{name: value for name, value in given.items() if name in _arguments(experiment)}))


def _arguments(experiment: Experiment) -> set[str]:
    import inspect

    return set(inspect.signature(experiment.specs).parameters)


def run_all(scale: str, given: Mapping[str, str], workers: int | None = None) -> bool:
    """Train and publish every experiment that has the scale; True when all were published whole.

    A notebook that fails does not stop the others. Each one's output goes into a log in the workshop, named here.
    """
    from moelab.workbench import paths
    from moelab.workbench.lab import Lab

    wanted = chosen(scale, given)
    # A measurement beside nothing else: notebooks that time something come last and alone.
    order = sorted(wanted, key=lambda name: EXPERIMENTS[name].measures)
    started = time.monotonic()
    specs = [spec for name in order if EXPERIMENTS[name].trains for spec in specs_of(EXPERIMENTS[name], wanted[name])]
    runs = Lab().run(specs, workers=workers)
    if why := runs.explain_missing():
        print(why)
    print(f"{len({s.id for s in specs})} runs in {time.monotonic() - started:.0f} s", flush=True)
    logs = paths.home() / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    cores = workers or len(os.sched_getaffinity(0))
    failed: list[str] = []
    going: dict[str, tuple[subprocess.Popen, float]] = {}

    def reap(until: int) -> None:
        while len(going) > until:
            for name, (process, since) in list(going.items()):
                if process.poll() is not None:
                    del going[name]
                    good = process.returncode == 0
                    failed.extend([] if good else [name])
                    result = "published" if good else f"FAILED, see {logs / f'{name}-{scale}.log'}"
                    print(f"{name}: {result} ({time.monotonic() - since:.0f} s)", flush=True)
            time.sleep(0.1)

    for name in order:
        reap(0 if EXPERIMENTS[name].measures else cores - 1)
        arguments = [part for key, value in wanted[name].items() for part in ("-p", f"{key}={value}")]
        with open(logs / f"{name}-{scale}.log", "wb") as log:
            command = [sys.executable, "-m", "moelab.cli", "run", name, *arguments]
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        going[name] = (process, time.monotonic())
    reap(0)
    print(f"{len(order) - len(failed)} of {len(order)} experiments published in {time.monotonic() - started:.0f} s")
    return not failed
