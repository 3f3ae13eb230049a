"""A development cluster (slurm/local) for each module of tests, which share, and partly break and mend it.

Nothing here waits for a time: limits are generous, since they only count when something is wrong, and a run that is to be disturbed
halts by itself at a given step.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pytest

import tests.conftest
from moelab.config import ModelConfig, TrainConfig
from moelab.runs.execute import execute
from moelab.runs.spec import RunSpec
from moelab.runs.store import Run, RunStore
from moelab.slurm import profiles, queue, submit
from moelab.slurm.profiles import Profile

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "slurm" / "local" / "cluster.sh"
STEPS, EVERY = 160, 40  # of the run that is disturbed; checkpoints

# Python's start-up hook in every process of a test. The process that trains a run halts (SIGSTOP) when it has done as many steps as the
# run's halt.json says, the checkpoint before them written. It goes on with SIGCONT, which Slurm sends before it asks a job to end.
HALT = f"""
import json, os, signal, sys, time
from pathlib import Path
if sys.orig_argv[1:3] == ["-m", "moelab.runs.worker"] and (Path(sys.orig_argv[3]) / "halt.json").exists():
    from moelab.runs.store import Run
    set_status = Run.set_status
    def halting(run, status):
        set_status(run, status)
        for step in json.loads((run.path / "halt.json").read_text()):
            mark = run.path / f"halted-{{step}}"
            if status.state == "running" and status.step == step and not mark.exists():
                before = run.path / "checkpoints" / f"step-{{step // {EVERY} * {EVERY}:08d}}"
                while step >= {EVERY} and not before.exists():
                    time.sleep(0.01)
                mark.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGSTOP)
    Run.set_status = halting
"""


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)


@pytest.fixture(scope="module")
def cluster(request) -> Iterator[Path]:
    """The folder of a development cluster of this module's own; while its tests run, this process talks to it."""
    module = request.path.stem
    number = sorted(path.stem for path in Path(__file__).parent.glob("test_*.py")).index(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOELAB_SLURM_DIR", str(ROOT / ".moelab" / f"slurm-{module}"))
        patch.setenv("MOELAB_SLURM_PORT", str(17900 + 20 * number))
        up = subprocess.run([CLUSTER, "up"], capture_output=True, text=True)
        if up.returncode:
            if os.environ.get("MOELAB_SLURM") == "require":
                pytest.fail(up.stderr)
            pytest.skip(up.stderr.strip().splitlines()[-1])
        out = subprocess.run([CLUSTER, "env"], capture_output=True, text=True, check=True).stdout
        patch.setenv("SLURM_CONF", out.strip().partition("SLURM_CONF=")[2])
        yield Path(os.environ["SLURM_CONF"]).parents[1]
        subprocess.run([CLUSTER, "down"], capture_output=True, check=True)


@pytest.fixture(scope="session")
def spec(data_config) -> RunSpec:
    """A run of a second or two."""
    sizes = {"layers": 4, "hidden": 32, "heads": 2, "vocab": 320, "context": 32}
    model = ModelConfig(**sizes, experts=(0, 2, 0, 4), residual=True, init_std=0.02, dropout=0.1, name="tiny")
    rates = {"batch_size": 4, "lr": 3e-3, "min_lr": 3e-4, "warmup_tokens": 256}
    every = {"eval_every": EVERY, "eval_tokens": 512, "log_every": 5, "checkpoint_every": EVERY}
    return RunSpec(model, TrainConfig(tokens=STEPS * 4 * 32, **rates, **every), data_config, label="tiny")


@pytest.fixture(scope="session")
def undisturbed(spec, tmp_path_factory) -> Run:
    """The same run in this process, never interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOELAB_HOME", str(tmp_path_factory.mktemp("undisturbed")))
        run = RunStore().run(spec)
        execute(run)
    return run


until = functools.partial(tests.conftest.until, limit_s=900)


def processes(job: str, cluster: Path, **variables: str) -> list[psutil.Process]:
    """A job's processes on this machine whose environment has these variables, too."""
    want = {"SLURM_CONF": f"{cluster}/etc/slurm.conf", "SLURM_JOB_ID": job, **variables}
    return [p for p in psutil.process_iter(["environ"]) if want.items() <= (p.info["environ"] or {}).items()]


def find_process(job: str, cluster: Path, module: str, **variables: str) -> int:
    """The process of a job that executes a module (``python -m``), with these variables in its environment."""
    for process in processes(job, cluster, **variables):
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[1:3] == ["-m", module]:
                return process.pid
    raise AssertionError(f"job {job} has no process of {module} {variables}")


def _proc_status(pid: int) -> dict[str, str]:
    """What the kernel says about a process; empty when there is none."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    except (FileNotFoundError, ProcessLookupError):
        return {}


def told(pid: int, number: int) -> bool:
    """Whether a halted process has been sent a signal, or has been woken for it."""
    status = _proc_status(pid)
    if not status.get("State", "").startswith("T"):
        return True
    pending = int(status["SigPnd"], 16) | int(status["ShdPnd"], 16)
    return bool(pending >> (number - 1) & 1)


@dataclass
class Workplace:
    """A workshop of its own on the cluster."""

    home: Path
    profile: Profile
    cluster: Path

    def submit(self, *specs: RunSpec, halt: Sequence[int] = (), **changes) -> list[Run]:
        """Queue runs that will halt after these steps; `changes` are fields of the profile."""
        runs = [RunStore().run(spec) for spec in specs]
        for run in runs if halt else ():
            (run.path / "halt.json").write_text(json.dumps(halt))
        submit.submit("test", [({}, specs)], replace(self.profile, **changes), with_notebooks=False)
        return runs

    def job(self, run: Run) -> queue.Job | None:
        """The newest job of a run that Slurm still knows."""
        jobs = queue.jobs()
        for submission in submit.submissions():
            for part in submission.parts:
                if run.spec.id in part.runs and part.values is None:
                    return jobs.get((submission.id, part.name, part.runs.index(run.spec.id)))
        return None

    def halted(self, run: Run, step: int) -> int:
        """Wait until the run has halted at a step; the id of the process that trains it (rank 0). Now there is time to disturb it."""
        mark = run.path / f"halted-{step}"

        def halts() -> bool:
            return mark.exists() and _proc_status(int(mark.read_text() or 0)).get("State", "").startswith("T")

        until(halts, f"the run to halt at step {step}")
        return int(mark.read_text())

    def halts(self, spec: RunSpec, **changes) -> tuple[Run, int]:
        """A run that has halted at step 60, and the process that trains it."""
        (run,) = self.submit(spec, halt=[60], **changes)
        return run, self.halted(run, 60)

    def numbers(self, run: Run) -> dict:
        """What a run found, once it is over."""
        self.until_over(run)
        return tests.conftest.numbers(run.path)

    def rank(self, run: Run, number: int) -> int:
        """The process that is this rank of a run."""
        return find_process(self.job(run).id, self.cluster, "moelab.runs.worker", SLURM_PROCID=str(number))

    def until_requeued(self, run: Run) -> None:
        """Wait until Slurm has started the run's job again, or is about to; its state alone may be over before one looks."""

        def requeued() -> bool:
            shown = subprocess.run(["scontrol", "show", "job", self.job(run).id], capture_output=True, text=True)
            return "Restarts=0" not in shown.stdout and "Restarts=" in shown.stdout

        until(requeued, "the requeue")

    def until_over(self, *runs: Run) -> None:
        """Wait until the jobs of the runs are out of the queue."""

        def over() -> bool:
            live = submit.live_runs(submit.submissions(), queue.jobs())
            return not any(run.spec.id in live for run in runs)

        until(over, "the jobs to end")

    def start(self, daemon: str) -> None:
        """Start a dead daemon of the cluster again."""
        subprocess.run([CLUSTER, "start", daemon], check=True, capture_output=True)

    def pid(self, daemon: str) -> int:
        return int((self.cluster / "run" / f"{daemon}.pid").read_text())

    def until_idle(self) -> None:
        """Wait until all four nodes are there and free."""

        def idle() -> bool:
            command = ["sinfo", "-h", "-p", "debug", "-t", "idle", "-o", "%D"]
            return subprocess.run(command, capture_output=True, text=True).stdout.strip() == "4"

        until(idle, "four idle nodes")


@pytest.fixture
def workplace(cluster, undisturbed, tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    (home / "data").symlink_to(undisturbed.path.parents[1] / "data")
    monkeypatch.setenv("MOELAB_HOME", str(home))
    monkeypatch.setenv("MOELAB_RESULTS", str(tmp_path / "results"))
    hook = tmp_path / "hook"
    hook.mkdir()
    (hook / "sitecustomize.py").write_text(HALT)
    monkeypatch.setenv("PYTHONPATH", str(hook))
    place = Workplace(home, profiles.load("local"), cluster)
    place.until_idle()
    yield place
    queue.cancel([job.id for job in queue.jobs().values() if job.live and (submit.root() / job.submission).exists()])
