"""Make submitit's executors from a cluster profile: what a job asks Slurm for, and the environment that it starts in.

Jobs go to Slurm through submitit: `update_parameters`, `batch`, `submit`. One method of submitit's plugin interface is
called here, `_make_submission_file_text`: a dry run and `sbatch --test-only` need the batch script before anything is
queued, and submitit writes it only when it queues the job.
"""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError

from moelab import environment, paths
from moelab.runs.spec import RunSpec
from moelab.slurm import queue
from moelab.slurm.profiles import Profile, megabytes, minutes


def size(spec: RunSpec, profile: Profile) -> dict[str, Any]:
    """Return what a run's job asks Slurm for, as parameters of submitit.

    Raises:
        ValueError: one line; the run does not fit the profile's nodes.
    """
    layout = spec.parallel
    per_node = min(layout.ranks_per_node, profile.gpus_per_node)
    nodes = layout.ranks // per_node
    run = f"{spec.title}: {layout.ranks} ranks in nodes of {layout.ranks_per_node}"
    # Nodes with fewer ranks than the layout's are allowed unless the layout depends on the ranks of a node.
    if per_node < layout.ranks_per_node and (
        layout.hierarchical or per_node % layout.tensor or layout.ranks % per_node
    ):
        raise ValueError(
            f"{run} do not fit profile {profile.name}'s nodes of {profile.gpus_per_node}; set its gpus_per_node"
        )
    if nodes > profile.nodes:
        raise ValueError(f"{run} need {nodes} nodes; profile {profile.name} allows {profile.nodes}")
    return {
        "nodes": nodes,
        "ntasks_per_node": per_node,
        "cpus_per_task": max(profile.cpus_per_rank, spec.train.threads),
        **_gpus(profile, per_node if spec.train.device == "cuda" else 0),
        **_memory(profile, per_node),
    }


class Executor(submitit.SlurmExecutor):
    """Extend submitit's executor for Slurm: it can be made, and can show its batch script, where there is no Slurm."""

    @classmethod
    def affinity(cls) -> int:
        """Return 2, which tells submitit that the executor is available, whether or not `srun` is installed."""
        return 2

    def script(self, count: int) -> str:
        """Return the batch script of one job, or of an array of `count`."""
        shown = Executor(self.folder, python=self.python)
        shown.parameters = {**self.parameters, **({"map_count": count} if count > 1 else {})}
        return shown._make_submission_file_text(shown._submitit_command_str, "")

    def queue(self, function: Callable[..., Any], arguments: Sequence[tuple[str, ...]]) -> str:
        """Queue one job, or an array, that calls `function` with each of the arguments, and return its id.

        Raises:
            queue.SlurmError: Slurm refuses the job or does not answer.
        """
        try:
            with queue.environment(), self.batch():
                jobs = [self.submit(function, *values) for values in arguments]
        except FileNotFoundError:
            raise queue.not_installed("sbatch") from None
        except FailedJobError as error:
            raise queue.explain("sbatch", str(error), 1) from None
        return jobs[0].job_id.partition("_")[0]


def for_runs(
    profile: Profile, size: Mapping[str, Any], snapshot: Path | None, folder: Path, **parameters: Any
) -> Executor:
    """Return the executor of a run or of an array of runs of equal `size`.

    Args:
        parameters: further parameters of submitit (name, comment, dependency).
    """
    # The ranks react to USR1; submitit's USR2 prints stacks there.
    own: dict[str, Any] = {
        "time": profile.time,
        "signal": f"USR1@{profile.lead_s}",
        "array_parallelism": profile.array_parallelism,
    }
    return _executor(profile, snapshot, folder, **size, **own, **parameters)


def for_notebook(profile: Profile, snapshot: Path | None, folder: Path, **parameters: Any) -> Executor:
    """Return the executor of a notebook's job."""
    own: dict[str, Any] = {
        "exports": {environment.EXECUTOR.name: "read"},
        "time": profile.notebook_time,
        "mem": profile.notebook_memory,
    }
    own |= {"cpus_per_task": profile.notebook_cpus, **_gpus(profile, profile.notebook_gpus)}
    return _executor(profile, snapshot, folder, **own, **parameters)


def for_jupyter(profile: Profile, folder: Path) -> Executor:
    """Return the executor of JupyterLab, on one node with all its GPUs; it runs the checkout, not a snapshot."""
    ranks = profile.gpus_per_node
    own: dict[str, Any] = {
        "cpus_per_task": profile.cpus_per_rank * ranks,
        **_gpus(profile, ranks),
        **_memory(profile, ranks),
    }
    own |= {"job_name": "moelab-lab", "comment": "moelab lab", "time": profile.lab_time, "requeue": False}
    return _executor(profile, None, folder, **own)


def step(profile: Profile, cores: int) -> tuple[str, ...]:
    """Return the srun command line, up to the interpreter, of a step of one task."""
    task = ("--ntasks=1", "--nodes=1", f"--cpus-per-task={cores}", "--export=ALL", "--unbuffered")
    return ("srun", *task, *profile.srun, *profile.container, interpreter(profile))


def interpreter(profile: Profile) -> str:
    """Return the Python interpreter of ranks and notebooks."""
    return profile.python or sys.executable


def _executor(
    profile: Profile,
    snapshot: Path | None,
    folder: Path,
    *,
    time: str,
    signal: str = "INT@30",  # a notebook that reaches its time limit is saved as it is
    requeue: bool = True,
    exports: dict[str, str] | None = None,
    **parameters: Any,
) -> Executor:
    if "%" in str(folder):
        raise ValueError(f"{folder}: Slurm and submitit would replace what follows the % of a path; set MOELAB_HOME")
    # The driver stays outside the container: it calls srun. `exec`: signals to the batch script reach it.
    driver = sys.executable if profile.container else interpreter(profile)
    executor = Executor(folder, python=f"exec {shlex.quote(driver)}")
    extra = dict(argument.removeprefix("--").partition("=")[::2] for argument in profile.sbatch)
    parameters["comment"] = " ".join(filter(None, (extra.pop("comment", ""), parameters["comment"])))
    given = {
        # submitit calls sbatch without the user's SBATCH_ variables.
        "partition": profile.partition or os.environ.get("SBATCH_PARTITION", ""),
        "account": profile.account or os.environ.get("SBATCH_ACCOUNT", ""),
        "qos": profile.qos or os.environ.get("SBATCH_QOS", ""),
        "constraint": profile.constraint,
        # Whole minutes, since submitit multiplies them.
        "time": math.ceil(minutes(time, profile.name)),
        "setup": [*profile.setup, *_exports(profile, snapshot, exports or {})],
        "stderr_to_stdout": True,
        "use_srun": False,  # one driver, which starts the ranks with srun itself
        "wckey": None,
        "nodes": 1,
        "ntasks_per_node": 1,
        "additional_parameters": {
            "signal": signal,
            **({"requeue": True} if requeue else {"no-requeue": True}),  # a site's default may be either
            **({"kill-on-invalid-dep": "yes"} if parameters.get("dependency", "").startswith("afterok") else {}),
            **{key: value or True for key, value in extra.items()},
        },
        **parameters,
    }
    executor.update_parameters(**{name: value for name, value in given.items() if value != ""})
    return executor


def _exports(profile: Profile, snapshot: Path | None, variables: dict[str, str]) -> list[str]:
    """Return the shell lines that set a job's environment variables."""
    values = {environment.HOME.name: str(paths.home()), environment.RESULTS.name: str(paths.results()), **variables}
    lines = [f"{name}={shlex.quote(value)}" for name, value in values.items()]
    # On a node's own disk: Triton's files of many ranks collide on a network file system.
    lines.append("TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$(mktemp -u /tmp/triton-XXXXXXXXXX)}")
    if snapshot is not None:
        # A module is otherwise looked for in the current folder first, which may be the checkout.
        lines += [f"PYTHONPATH={shlex.quote(str(snapshot))}${{PYTHONPATH:+:$PYTHONPATH}}", "PYTHONSAFEPATH=1"]
    pairs = (line.partition("=") for line in profile.environment)
    return [f"export {line}" for line in (*lines, *(f"{name}={shlex.quote(value)}" for name, _, value in pairs))]


def _gpus(profile: Profile, count: int) -> dict[str, str]:
    """Return the parameter for GPUs per node; none without GPUs."""
    return {"gpus_per_node": f"{profile.gpu_type}:{count}".lstrip(":")} if count else {}


def _memory(profile: Profile, ranks: int) -> dict[str, str]:
    """Return the parameter for the memory of ranks on a node; none where the site's default counts."""
    size = ranks * megabytes(profile.memory_per_rank, profile.name)
    return {"mem": f"{size}M"} if size else {}
