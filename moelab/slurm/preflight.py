"""Look before anything is queued whether a batch can be trained: what the host that submits can know."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from moelab.runs import preflight
from moelab.runs.spec import RunSpec
from moelab.runs.store import RunStore
from moelab.slurm import executor
from moelab.slurm.profiles import Profile


def check(
    specs: Sequence[RunSpec],
    profile: Profile,
    store: RunStore | None = None,
    *,
    measuring: Sequence[str] = (),
    publish: bool = False,
) -> None:
    """Check folders, texts, weights of teachers and free space as `moelab run` does, and the nodes by the profile.

    Devices are the nodes'; without Slurm (cluster ``local``) they are this machine's and are checked. A time limit that
    may be too short is named on standard error.

    Args:
        measuring: experiments whose notebooks measure on a GPU.
        publish: whether results go into the published ones.

    Raises:
        ValueError: one line: what is missing or does not fit, where, and what helps.
    """
    store, on_slurm = store or RunStore(), profile.cluster == "slurm"
    if on_slurm:
        if specs and (line := profile.tight()):
            print(line, file=sys.stderr)
        for spec in preflight.unfinished(specs, store):
            executor.size(spec, profile)
        gives_a_gpu = profile.notebook_gpus or any(a.startswith(("--gres=gpu", "--gpus")) for a in profile.sbatch)
        if measuring and not gives_a_gpu:
            raise ValueError(
                f"{measuring[0]}: its notebook measures on a GPU, and profile {profile.name} gives notebooks none; "
                "set its notebook_gpus to 1"
            )
    preflight.check(
        specs,
        store,
        device="cuda" if measuring and not on_slurm else "cpu",
        publish=publish,
        executor="slurm" if on_slurm else "processes",
        same_files=not profile.container,
        same_packages=not (profile.container or profile.python),
    )
