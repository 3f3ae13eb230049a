"""`moelab bench ...`: benchmarks. Heavy modules are imported inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moelab.cli import slurm as commands
from moelab.cli._options import Device, Experts, Out, Threads, check_device, write_provenance

bench = typer.Typer(no_args_is_help=True, help="Benchmarks; each prints ratios measured side by side in one run.")


@bench.command(name="train")
def bench_train(
    steps: Annotated[int, typer.Option(help="measured steps of each model")] = 20,
    rounds: Annotated[int, typer.Option(help="times the models take turns")] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 1,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16")] = "fp32",
    out: Annotated[Path | None, typer.Option(help="folder for the numbers as JSON lines")] = None,
) -> None:
    """Measure the training speed of twins: MoE over its dense base, our dense twin over a plain PyTorch loop."""
    from moelab.bench.train import main as bench_main

    bench_main(steps=steps, rounds=rounds, threads=threads, dtype=dtype, out=out)
    write_provenance(out, "train")


@bench.command(name="gate")
def bench_gate(
    tokens: Annotated[int, typer.Option(help="S")] = 4096,
    experts: Experts = None,
    rounds: Annotated[int, typer.Option(help="times the candidates take turns")] = 15,
    threads: Threads = 2,
    device: Device = "cpu",
    out: Out = None,
) -> None:
    """Compare the gate with the mask baseline and, where installed (extra peers), DeepSpeed's."""
    check_device(device)
    from moelab.bench.gate import main as bench_main

    bench_main(tokens=tokens, experts=experts or [8, 64, 128], rounds=rounds, threads=threads, device=device, out=out)
    write_provenance(out, "gate")


@bench.command(name="layer")
def bench_layer(
    tokens: Annotated[int, typer.Option(help="S")] = 4096,
    hidden: Annotated[int, typer.Option(help="M")] = 512,
    ffn: Annotated[int, typer.Option(help="F")] = 2048,
    experts: Experts = None,
    dtype: Annotated[list[str] | None, typer.Option(help="fp32 or bf16; repeat for both")] = None,
    rounds: Annotated[int, typer.Option(help="times the candidates take turns")] = 7,
    threads: Threads = 2,
    device: Device = "cpu",
    out: Out = None,
) -> None:
    """Compare the MoE layer with a dense one of equal FLOPs, the einsum baseline and other libraries (extra peers)."""
    check_device(device)
    from moelab.bench.layer import DTYPES
    from moelab.bench.layer import main as bench_main

    for name in dtype or ():
        if name not in DTYPES:
            raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    bench_main(
        tokens=tokens,
        hidden=hidden,
        ffn=ffn,
        experts=experts or [8, 64, 128],
        dtypes=dtype or ["fp32"],
        rounds=rounds,
        threads=threads,
        device=device,
        out=out,
    )
    write_provenance(out, "layer")


@bench.command(name="decode")
def bench_decode(
    model: Annotated[
        list[str] | None,
        typer.Option("--model", help="name; repeat for several (default: six, from the dense twin to MoE-128)"),
    ] = None,
    batch: Annotated[list[int] | None, typer.Option("--batch", help="sequences; repeat for several")] = None,
    ranks: Annotated[
        list[int] | None, typer.Option("--ranks", help="ranks that share the experts; repeat; 0 leaves it out")
    ] = None,
    rank_batch: Annotated[int, typer.Option(help="sequences over all ranks")] = 8,
    prompt: Annotated[int, typer.Option(help="tokens of a prompt")] = 32,
    output: Annotated[int, typer.Option(help="tokens generated for each")] = 32,
    rounds: Annotated[int, typer.Option(help="times the candidates take turns")] = 5,
    threads: Threads = 2,
    device: Device = "cpu",
    tensor: Annotated[int, typer.Option(help="under torchrun or srun: tensor slicing")] = 1,
    exchange: Annotated[str, typer.Option(help="under torchrun or srun: the optimised mode's exchange")] = "flat",
    out: Out = None,
) -> None:
    """Measure decoding: optimised, the paper's baseline and, where installed (extra peers), transformers.

    Under torchrun or srun each model is measured on the ranks that were started, with --rank-batch sequences over all
    of them.
    """
    check_device(device)
    from moelab.bench.decode import Protocol
    from moelab.bench.decode import main as bench_main
    from moelab.engine.launch import process

    bench_main(
        models=model,
        batches=batch or [1, 8, 32],
        ranks=[n for n in ranks or [1, 2, 4] if n],
        rank_batch=rank_batch,
        protocol=Protocol(prompt, output, rounds),
        threads=threads,
        device=device,
        tensor=tensor,
        exchange=exchange,
        out=out,
    )
    place = process.find()
    if place is None or place.rank == 0:
        write_provenance(out, "decode")


@bench.command(name="scaling")
def bench_scaling(
    model: Annotated[list[str] | None, typer.Option("--model", help="model name; repeat for several")] = None,
    ranks: Annotated[int, typer.Option(help="processes on this machine")] = 2,
    sequences: Annotated[int, typer.Option(help="sequences a rank and step")] = 4,
    steps: Annotated[int, typer.Option(help="measured steps of each way in a round")] = 10,
    rounds: Annotated[int, typer.Option(help="times the ways take turns")] = 5,
    out: Out = None,
) -> None:
    """Weak scaling of training over ranks of this machine, and where the time goes."""
    from moelab.bench.scaling import main as bench_main

    models = model or ["350M twin", "350M+MoE-128 twin", "350M+PR-MoE-32/64 twin"]
    bench_main(models=models, ranks=ranks, per_rank=sequences, steps=steps, rounds=rounds, out=out)
    write_provenance(out, "scaling")


@bench.command(name="exchange")
def bench_exchange(
    ranks: Annotated[list[int] | None, typer.Option("--ranks", help="processes; repeat for several")] = None,
    size: Annotated[
        list[int] | None, typer.Option("--bytes", help="bytes of tokens a rank; repeat for several")
    ] = None,
    rounds: Annotated[int, typer.Option(help="times the ways take turns")] = 15,
    device: Device = "cpu",
    out: Out = None,
) -> None:
    """How tokens travel between ranks: flat, hierarchical, coordinated, and the alpha-beta floor.

    On ranks of this machine; under torchrun or srun on the ranks that were started, and --ranks does not count.
    """
    check_device(device)
    from moelab.bench.exchange import main as bench_main
    from moelab.engine.launch import process

    sizes = size or [1 << 10, 1 << 14, 1 << 18, 1 << 22]
    bench_main(ranks=ranks or [4, 8, 16], sizes=sizes, rounds=rounds, device=device, out=out)
    place = process.find()
    if place is None or place.rank == 0:
        write_provenance(out, "exchange")


@bench.command(name="submit")
def bench_submit(
    profile: commands.Profile = None,
    rounds: Annotated[int, typer.Option(help="times the ways of running take turns")] = 3,
    runs: Annotated[int, typer.Option(help="runs submitted at once")] = 200,
    out: Out = None,
) -> None:
    """Slurm's cost: submit to first step, a notebook batch against the same work inline, many runs at once."""
    from moelab.slurm import latency as slurm_bench
    from moelab.slurm import profiles

    slurm_bench.main(profiles.choose(profile), rounds=rounds, runs=runs, out=out)
    write_provenance(out, "submit")
