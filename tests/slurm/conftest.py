"""A workshop for each test, a Slurm that accepts everything, and a submission on record."""

import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
from rich.console import Console

from moelab.runs.store import RunStore
from moelab.slurm import queue, status
from moelab.slurm.queue import Job
from moelab.slurm.submission import Part, Submission


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    monkeypatch.setenv("MOELAB_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MOELAB_RESULTS", str(tmp_path / "results"))
    return tmp_path / "home"


OTHERS = ("node3|drained|gpu:a100:8", "node4|idle|gpu:v100:4", "node7|idle|gpu:a100:8")
"""Nodes that are no substitute for node1: drained, of another kind, left out before."""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Commands of a Slurm that accepts everything, in front of any real ones.

    `commands()` are those since the last time, `calls()` their names alone; `says` tells its squeue what to say.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    calls, answer = tmp_path / "calls", tmp_path / "squeue.txt"
    calls.touch()
    answer.touch()
    head = f'#!/bin/sh\necho "$(basename $0) $*" >> {calls}\n'
    for name in ("srun", "scancel"):
        (folder / name).write_text(head)
    (folder / "scontrol").write_text(
        f'{head}case "$2" in job) echo "   ReqNodeList=(null) ExcNodeList=node[7-8]" ;; hostnames) echo node7 node8 ;; esac\n'
    )
    nodes = "".join(f"{line}\\n" for line in ("node1|mixed|gpu:a100:8", "node2|idle~|gpu:a100:8", *OTHERS))
    (folder / "sinfo").write_text(f"{head}printf '{nodes}'\n")
    (folder / "squeue").write_text(f"{head}cat {answer}\n")
    (folder / "sbatch").write_text(
        f'{head}case "$1" in --test-only) cat > /dev/null ;; *) echo "Submitted batch job $(wc -l < {calls})" ;; esac\n'
    )
    for command in folder.iterdir():
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def commands() -> list[str]:
        lines = calls.read_text().splitlines()
        calls.write_text("")
        return lines

    def says(*lines: str) -> None:
        answer.write_text("".join(f"{line}\n" for line in lines))

    return SimpleNamespace(commands=commands, calls=lambda: [line.split()[0] for line in commands()], says=says)


@pytest.fixture
def shown():
    """What the overview prints on a terminal of a width."""

    def shown(*names: str, width: int = 160, everything: bool = False) -> str:
        console = Console(width=width, force_terminal=False)
        with console.capture() as printed:
            console.print(status.overview(names, everything=everything))
        return printed.get()

    return shown


@pytest.fixture
def submitted(tiny_spec, monkeypatch):
    """Four runs and a notebook on record; the test says what Slurm knows."""
    specs = [replace(tiny_spec, train=replace(tiny_spec.train, seed=seed)) for seed in range(4)]
    runs = [RunStore().run(spec) for spec in specs]
    record = Submission("20260101-000000-x-abc", "x", "local", None)
    record.parts = [
        Part("runs-0", "7", [run.spec.id for run in runs]),
        Part("notebook-0", "8", [run.spec.id for run in runs], {"seeds": 4}),
    ]
    record.write()
    jobs: dict = {}
    monkeypatch.setattr(queue, "jobs", lambda *_: jobs)

    def job(part: str, index: int, state: str, reason: str = "None", node: str = "") -> None:
        jobs[record.id, part, index] = Job(f"7_{index}", record.id, part, index, state, reason, node)

    return runs, job, record, jobs
