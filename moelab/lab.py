"""`Lab`, the interface for notebooks: it runs specs, reads runs back, and publishes results.

lab = Lab()
runs = lab.run(specs)           # finished runs are read back, others continue or start
runs.final()                    # one row per run
runs.curves()                   # validation loss over tokens
lab.measure(all_to_all.counts, (4, 8))    # a function's result, read back if this machine has measured it
lab.power(runs, effect=0.01)    # how many seeds tell these arms apart
lab.generate(runs[0], "Fellow") # text that the run's model generates
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from moelab import environment, machine, paths
from moelab.config import DataConfig, from_json
from moelab.files import write_json
from moelab.lazy import pd, whole_imports
from moelab.report.publication import Publication
from moelab.runs import executors
from moelab.runs.collection import Runs
from moelab.runs.measurements import Measurement, MeasurementStore
from moelab.runs.preflight import check_devices
from moelab.runs.progress import NotebookProgress, in_notebook
from moelab.runs.spec import RunSpec
from moelab.runs.store import Run, RunStore

if TYPE_CHECKING:
    from moelab.inference.text import Text
    from moelab.slurm.jobs import Jobs
    from moelab.slurm.rows import Overview

Executor = Literal["auto", "inline", "processes", "slurm", "read"]

_SHORT_FLOPS = 1e11
"""Training FLOPs below which a run is short: a core's work of two seconds, as a process takes to begin."""


def _fingerprint(data: DataConfig) -> str:
    """Return the fingerprint that a text has now."""
    from moelab.data.preparation import prepare

    return prepare(data, paths.home() / "data", print).fingerprint


def _short(run: Run, workers: int) -> bool:
    """Return whether a run is trained in this process: it is short, and at most 4 would train at a time."""
    spec = run.spec
    return workers <= 4 and spec.cost < _SHORT_FLOPS and spec.parallel.ranks == 1 and spec.train.device == "cpu"


class Lab:
    """Runs specs on this machine or on a cluster, and keeps the runs in one run store.

    Args:
        store: the run store; by default that of `MOELAB_HOME`.
        measure_again: whether `measure` measures again instead of reading results back.
    """

    def __init__(self, store: RunStore | None = None, *, measure_again: bool = False) -> None:
        self.store = store or RunStore()
        self.measurements = MeasurementStore()
        self.measured: list[Measurement] = []
        self._again = measure_again

    def run(
        self,
        specs: Sequence[RunSpec],
        *,
        executor: Executor = "auto",
        workers: int | None = None,
        profile: str | None = None,
    ) -> Runs:
        """Return the runs of the specs: read finished ones back, train the others to their end.

        Teachers are trained before their unfinished students, trunks before their branches. A run that fails is among
        the returned runs without a result (`Runs.missing`); the others go on.

        Args:
            executor: "inline" trains in this process. "processes" trains each run in a process of its own. (A run on
                several ranks has several processes or srun tasks in any case.) "slurm" trains in jobs of a cluster,
                shows their state and waits for them; stopping the cell leaves them in the queue. "read" trains nothing.
                "auto" takes the value of the environment variable `MOELAB_EXECUTOR` (in a notebook's batch job "read");
                else it is "processes", but "inline" for runs that end before a process of their own would have begun
                (their log has errors only).
            workers: processes at a time, one for each rank; by default as many as the cores allow at each run's
                threads. At least one run is trained at a time, and on GPUs no more.
            profile: the cluster for "slurm", see `moelab.slurm.profiles`; by default `MOELAB_PROFILE`.

        Raises:
            ValueError: one line: no list of specs, a text that has changed, or no CUDA device for runs that want one.
            NoResult: one line: an arm has no result of any seed, and why its first run failed. A notebook's batch job,
                which reads what other jobs trained, goes on with one arm; `executor="read"` asks for none.
        """
        asked = executor
        if executor == "auto":
            executor = environment.EXECUTOR.get() or executor  # type: ignore[assignment]  # checked below
        if executor not in (allowed := get_args(Executor)):
            raise ValueError(f"lab.run: executor must be one of {', '.join(allowed)}, got {executor!r}")
        runs = [self.store.run(spec, write=executor != "read") for spec in self.store.needed(specs).values()]
        if asked != "read":
            Runs(runs).require_same_texts(None if executor in ("read", "slurm") else _fingerprint)
        self._announce(runs)
        if executor == "slurm" and (waiting := [run.spec for run in runs if not run.finished]):
            self._on_cluster(waiting, profile)
        todo = [run for run in runs if not run.finished]
        if executor not in ("slurm", "read"):
            check_devices([run.spec for run in todo])
        at_once = workers or self._workers(todo)
        show = NotebookProgress(runs)
        try:
            if executor == "inline" or (executor == "auto" and all(_short(run, at_once) for run in todo)):
                executors.inline(todo, show)
            elif executor in ("auto", "processes"):
                executors.processes(todo, at_once, show)
        finally:
            show(final=True)
        by_id = {run.spec.id: run for run in runs}
        trained = Runs([Run(spec, by_id[spec.id].path) for spec in specs])
        if asked != "read":
            trained.require_results(before=runs, every_arm=executor != "read")
        return trained

    def measure(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return the result of a function, as JSON values.

        It is read back if the same code has measured it with the same arguments on the same machine. Otherwise the
        function is called now, while no other notebook of this store measures. Prints before that what it does, and
        then which of the two happened; publications list it.

        Raises:
            ValueError: a function outside moelab, or an argument by which nothing can be stored, see
                `moelab.runs.measurements`; the message is one line.
        """

        def say() -> None:
            what = (inspect.getdoc(function) or function.__name__).splitlines()[0]
            print(f"{function.__name__}: measures now; it may take minutes. {what}", flush=True)

        measurement = self.measurements.measure(function, *arguments, again=self._again, before=say)
        self.measured.append(measurement)
        print(measurement)
        return measurement.value

    def submit(
        self, specs: Sequence[RunSpec], profile: str | None = None, *, cluster: Literal["slurm", "local"] | None = None
    ) -> Jobs:
        """Queue the unfinished runs of the specs on a cluster and return their jobs at once.

        `run` and `status` read the runs' state again. A job has the methods of submitit's: `job_id`, `state`, `done()`,
        `wait()`, `result()`, `stdout()`, `cancel()`.

        Args:
            cluster: "local" needs neither Slurm nor a profile: it starts processes of this machine, two runs at a time.

        Raises:
            ValueError: a bad profile, runs that cannot be trained there, or Slurm refuses; the message names the jobs
                that were queued before, if any.
        """
        from moelab.slurm import jobs, preflight, profiles, submit

        local = cluster == "local" and profile is None
        chosen = profiles.Profile("local", cluster="local", array_parallelism=2) if local else profiles.choose(profile)
        if cluster not in (None, chosen.cluster):
            raise ValueError(f"lab.submit: profile {chosen.name} is for {chosen.cluster}, not {cluster!r}")
        preflight.check(specs, chosen, self.store)
        submit.submit("lab", [({}, specs)], chosen, with_notebooks=False, store=self.store)
        return jobs.Jobs.of(specs, self.store)

    def status(self, names: Sequence[str] = ()) -> Overview:
        """Return the state of all that was submitted to Slurm; it displays as a table, and `.frame()` returns the data.

        Args:
            names: only experiments, runs (ids) or submissions whose name begins with one of these.
        """
        from moelab.slurm.status import overview

        return overview(names, store=self.store)

    def _on_cluster(self, specs: Sequence[RunSpec], profile: str | None) -> None:
        from moelab.slurm import status

        handle = in_notebook(self.submit(specs, profile).overview)
        ids = [spec.id for spec in specs]
        status.watch(handle.update if handle else lambda _: None, ids, store=self.store)

    @staticmethod
    def _workers(runs: Sequence[Run]) -> int:
        return max(1, machine.cores() // max((run.spec.train.threads for run in runs), default=1))

    @staticmethod
    def _announce(runs: Sequence[Run]) -> None:
        """Tell the command that executes this notebook, if any, which runs to watch."""
        if file := environment.PLAN.get():
            # Where runs are only read, the store may lack some.
            write_json(Path(file), [str(run.path) for run in runs if (run.path / "spec.json").exists()])

    def generate(
        self,
        run: Run | str | Path,
        prompts: str | Sequence[str],
        *,
        mode: str = "optimised",
        device: str = "cpu",
        **sampling: Any,
    ) -> Text | list[Text]:
        """Return the text with which a trained run continues one prompt or several.

        Args:
            run: the run, its id, or a directory of an exported model.
            mode: one of `moelab.inference.modes.MODES`.
            device: "cpu" or "cuda".
            sampling: fields of `moelab.inference.Sampling`, such as ``max_new_tokens=40, top_p=0.9``.
        """
        with whole_imports():
            from moelab.inference import Sampling
            from moelab.inference.text import open_text

        directory = run.path if isinstance(run, Run) else self.store.find(str(run))
        several = [prompts] if isinstance(prompts, str) else list(prompts)
        how = from_json(Sampling, sampling, "lab.generate")
        batch = min(max(len(several), 1), 32)
        writer = open_text(directory, cache=paths.home() / "data", mode=mode, device=device, batch=batch)
        completions = writer.generate(several, how)
        return completions[0] if isinstance(prompts, str) else completions

    def power(
        self,
        of: str | Sequence[Run],
        scale: str = "cpu",
        *,
        against: str | None = None,
        effect: float | None = None,
    ) -> pd.DataFrame:
        """Return how many seeds comparisons need to decide with 80 % power, by the spread of seeds at hand.

        Args:
            of: an experiment, whose newest result at a scale has the spread, or runs, of which budgets are left out.
            against, effect, and the columns: see `moelab.report.planning.needs`.
        """
        from moelab.design import budgets, comparison
        from moelab.report import planning

        if not isinstance(of, str):
            runs = budgets.trunks(Runs(of)).finished
            final = comparison.by_peak_rate(runs.final(), [run.spec.train.lr for run in runs])
            return planning.needs_of(final, against=against, effect=effect)
        return planning.needs(of, scale, *paths.all_results(), against=against, effect=effect)

    def publish(self, experiment: str, scale: str, parameters: dict[str, Any] | None = None) -> Publication:
        """Open the publication to which this notebook adds its figures, tables and claims.

        A batch run (`moelab run`) publishes to `.moelab/results/`, with `--publish` to `results/`; an interactive one
        writes a draft to `.moelab/drafts/`.

        Raises:
            ValueError: one line: an experiment of moelab has no such scale, or a parameter that it could not use once
                the runs have been trained.
        """
        from moelab.experiments import EXPERIMENTS

        if (known := EXPERIMENTS.get(experiment)) is not None:
            known.scale(scale)
            if known.check is not None:
                known.check(parameters or {})
        return Publication.open(experiment, scale, parameters or {}, measurements=self.measured)
