"""`moelab check-cluster`: what the ranks of an allocation can do together."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from moelab import paths, terminal
from moelab.cli._options import check_device


def check_cluster(
    cluster: Annotated[str | None, typer.Option(help="cluster to compare with, as in `moelab simulate`")] = None,
    device: Annotated[str, typer.Option(help="cpu (gloo) or cuda (NCCL)")] = "cuda",
    mib: Annotated[int, typer.Option("--mib", min=1, help="size of a message, MiB")] = 64,
) -> None:
    """Check the ranks of an allocation: software, interface, bandwidth of all-reduce and all-to-all, and a verdict.

    Run it on the ranks: `srun moelab check-cluster`, or `torchrun --nproc-per-node 8 -m moelab.cli check-cluster`.
    """
    check_device(device)
    from moelab import simulate
    from moelab.engine import cluster as engine
    from moelab.engine.launch import process
    from moelab.simulate.exchange import collective_us

    if process.find() is None:
        raise ValueError("check-cluster: this process is no rank; start it with srun (several tasks) or torchrun")
    place = process.join(device=device, timeout=engine.LIMIT_S)
    where = simulate.cluster(cluster) if cluster else None
    if where is None and device == "cuda":
        import torch

        where = simulate.cluster_of_card(torch.cuda.get_device_name())
    expected = where and partial(collective_us, cluster=where, constants=simulate.fitted())
    found = list(engine.check(device, expected, paths.home(), mib << 20))
    bad = [row.check for row in found if row.verdict in ("wrong", "slow")]
    if place.rank == 0:
        table = terminal.table("check", "measured", "expected", "verdict", "what to do")
        for row in found:
            table.add_row(row.check, row.measured, row.expected, row.verdict, row.remedy * (row.check in bad))
        terminal.console().print(table)
        terminal.say(f"verdict: {'not ok: ' + '; '.join(bad) if bad else f'ok, {place.world_size} ranks'}")
    process.leave()
    raise typer.Exit(int(bool(bad) and place.rank == 0))
