"""`moelab check-cluster`: what the ranks of an allocation can do together."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from moelab import paths
from moelab.cli._options import BENCHMARKS, OwnProfile, check_device
from moelab.runs.provenance import commit


def register(app: typer.Typer) -> None:
    """Add the command to `moelab`."""
    app.command(name="check-cluster", rich_help_panel=BENCHMARKS)(check_cluster)


def check_cluster(
    profile: OwnProfile = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            help="links to compare with: a name of `moelab simulate`, such as a100-40gb or h100, or a YAML file"
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu (gloo) or cuda (NCCL)")] = "cuda",
    folder: Annotated[
        Path | None, typer.Option(help="folder on the shared file system that is checked; by default the workspace")
    ] = None,
    mib: Annotated[int, typer.Option("--mib", help="largest message, and a rank's part of the checkpoint")] = 64,
    out: Annotated[Path | None, typer.Option(help="JSON file for the numbers")] = None,
) -> None:
    """Check the ranks of an allocation: a table and a verdict.

    Links, interfaces, clocks, file locks, writing. Run it on the ranks themselves: `srun moelab check-cluster`, or
    `torchrun --nproc-per-node 8 -m moelab.cli check-cluster`.
    """
    check_device(device)
    import torch

    from moelab import simulate
    from moelab.bench import harness
    from moelab.engine.cluster import check
    from moelab.engine.cluster.links import Links
    from moelab.simulate.exchange import collective_us
    from moelab.slurm import profiles

    on_gpu = device == "cuda"
    where = simulate.cluster(cluster) if cluster else None
    if where is None and on_gpu:
        where = simulate.cluster_of_card(torch.cuda.get_device_name())
    shares = simulate.fitted()

    def rates() -> tuple[float, float]:
        timing = harness.Timing(3, device)
        kind, n = (torch.bfloat16, 4096) if on_gpu else (torch.float32, 512)
        products = harness.product_rate(kind, timing, n) / 1e12
        return products, harness.copy_rate(timing, 1 << (28 if on_gpu else 24)) / 1e9

    chosen = profiles.choose(profile) if profile else None
    good = check.main(
        device=device,
        links=where and Links(where.name, partial(collective_us, cluster=where, constants=shares)),
        rates=rates,
        commit=commit()["commit"],
        gpus_per_node=chosen.gpus_per_node if chosen else 0,
        environment=chosen.environment if chosen else (),
        folder=folder or paths.home(),
        largest=mib << 20,
        out=out,
    )
    raise typer.Exit(int(not good))
