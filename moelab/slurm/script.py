"""Batch scripts: what Slurm is asked for, and what a job does when it is told to stop, is killed, or fails.

submitit writes the header (`#SBATCH` lines, quoting, arrays). Its own way of running a job is not used: it pickles a function and
its result, so a death leaves nothing to read without accounting, a requeue can leave an error pickle while the job already runs
again, and only a time limit counts against its bound. Here a job runs `moelab.runs.worker` on a run's directory, which is all
the state there is, and the script decides with `moelab.slurm.attempt` what comes next.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from moelab import paths
from moelab.runs.spec import RunSpec
from moelab.slurm.profiles import Profile, megabytes


@dataclass(frozen=True)
class Size:
    """What one run's job asks for. Equal sizes share an array.

    Attributes:
        ranks, nodes, per_node: tasks in all, nodes, tasks of a node.
        gpus: of each node.
        cpus: of each task.
        memory: MiB of each node; 0 is the site's default.
    """

    ranks: int
    nodes: int
    per_node: int
    gpus: int
    cpus: int
    memory: int

    @classmethod
    def of(cls, spec: RunSpec, profile: Profile) -> Size:
        """ValueError, one line, when the profile's cluster is too small for the run."""
        layout = spec.parallel
        per_node = min(layout.ranks_per_node, profile.gpus_per_node)
        nodes = layout.ranks // per_node
        told = f"{spec.title}: {layout.ranks} ranks in nodes of {layout.ranks_per_node}"
        # Smaller nodes than the layout's do no harm unless it counts on them.
        if per_node < layout.ranks_per_node and (
            layout.hierarchical or per_node % layout.tensor or layout.ranks % per_node
        ):
            raise ValueError(
                f"{told} do not fit profile {profile.name}'s nodes of {profile.gpus_per_node}; set its gpus_per_node"
            )
        if nodes > profile.nodes:
            raise ValueError(f"{told} need {nodes} nodes; profile {profile.name} allows {profile.nodes}")
        return cls(
            ranks=layout.ranks,
            nodes=nodes,
            per_node=per_node,
            gpus=per_node if spec.train.device == "cuda" else 0,
            cpus=max(profile.cpus_per_rank, spec.train.threads),
            memory=per_node * megabytes(profile.memory_per_rank, profile.name),
        )


def runs_script(
    profile: Profile,
    size: Size,
    *,
    name: str,
    comment: str,
    listing: Path,
    count: int,
    snapshot: Path | None,
    dependency: str = "",
) -> str:
    """The script of an array of runs (or, for a count of 1, of one).

    Args:
        name: the job's, for people; `comment` names it for `queue.jobs`.
        listing: file with one run directory a line, in the order of the array.
        dependency: as sbatch takes it.
    """
    step = f"--ntasks={size.ranks} --nodes={size.nodes} --ntasks-per-node={size.per_node} --cpus-per-task={size.cpus}"
    worker = _step(profile, f'{step} --wait=300 --open-mode=append --output="$run/log.txt"')
    python = _python(profile)
    decide = f"{python} -m moelab.slurm.attempt"
    if profile.container:
        decide = f"{_step(profile, '--ntasks=1 --nodes=1')} {decide}"
    limits = f"--failures={profile.failures} --restarts={profile.restarts}"
    body = f"""\
run=$(sed -n "$((${{SLURM_ARRAY_TASK_ID:-0}} + 1))p" {_q(listing)})
after() {{ {decide} "$run" --job="$job" --restart="${{SLURM_RESTART_COUNT:-0}}" {limits} --code="$1"; }}
if [ "${{SLURM_RESTART_COUNT:-0}}" -gt {profile.restarts} ]; then after restarts; exit 1; fi
{worker} {python} -m moelab.runs.worker "$run"
code=$?
[ $code = 0 ] && exit 0
# Not running any more: Slurm is ending or requeueing this job itself (cancelled, preempted, requeued).
[ "$(state)" = RUNNING ] || exit $code
[ "$(after $code)" = again ] && again
exit $code
"""
    return _script(
        profile,
        body,
        snapshot,
        folder=listing.parent,
        job_name=name,
        comment=comment,
        time=profile.time,
        nodes=size.nodes,
        ntasks_per_node=size.per_node,
        cpus_per_task=size.cpus,
        gpus_per_node=_gpus(profile, size.gpus),
        mem=f"{size.memory}M" if size.memory else None,
        map_count=count if count > 1 else None,
        array_parallelism=profile.array_parallelism,
        signal=f"USR1@{profile.lead_s}",
        output=listing.with_name(f"{listing.stem}-%{'A_%a' if count > 1 else 'j'}.out"),
        dependency=dependency or None,
    )


def notebook_script(
    profile: Profile, *, name: str, comment: str, folder: Path, key: str, snapshot: Path | None, dependency: str = ""
) -> str:
    """The script of a notebook's job: executes notebook `key` of the submission in `folder`, trains nothing."""
    command = f"{_python(profile)} -m moelab.slurm.notebook {_q(folder)} {key}"
    body = f"""\
export MOELAB_EXECUTOR=read
{_step(profile, f"--ntasks=1 --nodes=1 --cpus-per-task={profile.notebook_cpus}")} {command}
code=$?
[ $code = 0 ] && exit 0
[ "$(state)" = RUNNING ] || exit $code
# Killed, not failed: it reads runs and can start over.
[ $code -ge 128 ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {profile.failures} ] && again
exit $code
"""
    return _script(
        profile,
        body,
        snapshot,
        folder=folder,
        job_name=name,
        comment=comment,
        time=profile.notebook_time,
        nodes=1,
        ntasks_per_node=1,
        cpus_per_task=profile.notebook_cpus,
        gpus_per_node=_gpus(profile, profile.notebook_gpus),
        mem=profile.notebook_memory or None,
        output=folder / f"{key}.out",
        dependency=dependency or None,
    )


def lab_script(profile: Profile, *, folder: Path, arguments: list[str]) -> str:
    """The script of `moelab lab` in an allocation: one node's GPUs, JupyterLab on the checkout as it is, its token from a file."""
    address = '"$(hostname -f)"' if profile.lab_address == "node" else "127.0.0.1"
    options = shlex.join([f"--ServerApp.root_dir={paths.notebooks()}", "--no-browser", *arguments])
    body = f"""\
export JUPYTER_TOKEN=$(cat {_q(folder / "token")}) JUPYTER_RUNTIME_DIR={_q(folder)}
unset XDG_RUNTIME_DIR
exec {_step(profile, "--ntasks=1 --nodes=1")} bash -c 'echo "${{SLURMD_NODENAME:-$(hostname)}}" > {_q(folder / "node")}; exec "$@"' \\
  lab {_python(profile)} -m jupyterlab --ServerApp.ip={address} {options}
"""
    return _script(
        profile,
        body,
        None,
        folder=folder,
        job_name="moelab-lab",
        comment="moelab lab",
        time=profile.lab_time,
        nodes=1,
        ntasks_per_node=1,
        cpus_per_task=profile.cpus_per_rank * profile.gpus_per_node,
        gpus_per_node=_gpus(profile, profile.gpus_per_node),
        mem=f"{profile.gpus_per_node * megabytes(profile.memory_per_rank, profile.name)}M"
        if profile.memory_per_rank
        else None,
        output=folder / "lab.out",
        no_requeue=True,
    )


def _script(profile: Profile, body: str, snapshot: Path | None, folder: Path, **parameters) -> str:
    from submitit.slurm.slurm import _make_sbatch_string

    own = {key: parameters.pop(key) for key in ("signal", "output") if key in parameters}
    extra = dict(argument.removeprefix("--").partition("=")[::2] for argument in profile.sbatch)
    return _make_sbatch_string(
        _preamble(profile, snapshot) + body,
        folder,
        partition=profile.partition or None,
        account=profile.account or None,
        qos=profile.qos or None,
        constraint=profile.constraint or None,
        setup=list(profile.setup),
        stderr_to_stdout=True,
        use_srun=False,
        wckey=None,
        additional_parameters={
            "signal": "INT@30",  # replaces submitit's own; a notebook out of time is saved as it is
            "open-mode": "append",  # a requeued job would start its log anew
            **({} if parameters.pop("no_requeue", False) else {"requeue": True}),
            **({"kill-on-invalid-dep": "yes"} if str(parameters.get("dependency")).startswith("afterok") else {}),
            **own,
            **{key: value or True for key, value in extra.items()},
        },
        **{key: value for key, value in parameters.items() if value is not None},
    )


def _preamble(profile: Profile, snapshot: Path | None) -> str:
    variables = [f"MOELAB_HOME={_q(paths.home())}", f"MOELAB_RESULTS={_q(paths.results())}"]
    if snapshot is not None:
        # A module is otherwise looked for in the current folder first, which may be the checkout.
        variables += [f"PYTHONPATH={_q(snapshot)}${{PYTHONPATH:+:$PYTHONPATH}}", "PYTHONSAFEPATH=1"]
    for line in profile.environment:
        name, _, value = line.partition("=")
        variables.append(f"{name}={_q(value)}")
    exports = "\n".join(f"export {v}" for v in variables)
    return f"""\
{exports}
job=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}; job=${{job:-$SLURM_JOB_ID}}
# Slurm signals the steps itself; this shell stays until they have ended.
trap true TERM USR1
# The controller may be restarting: ask again for a minute.
ask() {{ for _ in 1 2 3 4 5 6; do "$@" && return; sleep 10; done; return 1; }}
state() {{ ask squeue -h -j "$job" -o %T; }}
# Looks once more: a job that is cancelled by now would come back.
again() {{ [ "$(state)" = RUNNING ] && ask scontrol requeue "$job" && sleep 120; }}
"""


def _step(profile: Profile, options: str) -> str:
    return " ".join(["srun", options, "--unbuffered", *map(_q, profile.srun), *map(_q, profile.container)])


def _gpus(profile: Profile, count: int) -> str | None:
    return (f"{profile.gpu_type}:{count}" if profile.gpu_type else str(count)) if count else None


def _python(profile: Profile) -> str:
    return _q(profile.python or sys.executable)


def _q(value: object) -> str:
    return shlex.quote(str(value))
