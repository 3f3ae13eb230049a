"""`moelab bench ...`: benchmarks. Heavy modules are imported inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moelab.cli._options import (
    Device,
    Experts,
    Out,
    Threads,
    check_choice,
    check_device,
    check_dtypes,
    write_provenance,
)
from moelab.config import ModelConfig
from moelab.config.parallel import EXCHANGES

FAMILIES = ("dense", "MoE-128", "PR-MoE-32/64", "PR-MoE+L21 + KD")
"""The keys of `moelab.bench.train.FAMILIES`, which torch is imported for."""

bench = typer.Typer(no_args_is_help=True, help="Measure kernels, layers, training, decoding, exchanges.")

CpuTime = Annotated[
    bool,
    typer.Option("--cpu-time", help="measure processor time, which other programs disturb less; needs one thread"),
]
Rounds = Annotated[int, typer.Option(help="times the candidates take turns, with new inputs each time")]


@bench.command(name="train")
def bench_train(
    width: Annotated[
        list[int] | None, typer.Option("--width", help="hidden size; repeat (default: 32, 64, 128)")
    ] = None,
    family: Annotated[
        list[str] | None,
        typer.Option("--family", help=f"{', '.join(FAMILIES)}; repeat for several (default: all)"),
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="fp32 or bf16; repeat (default: both)")] = None,
    sequences: Annotated[int, typer.Option(help="of 128 tokens, in a step")] = 32,
    steps: Annotated[int, typer.Option(help="measured steps of each candidate in a round")] = 5,
    rounds: Rounds = 5,
    threads: Threads = 1,
    cpu_time: CpuTime = False,
    device: Device = "cpu",
    out: Out = None,
) -> None:
    """Measure the training speed of twins, dense and MoE, fp32 and bf16, and name the dtype to use for each."""
    check_device(device)
    check_dtypes(dtype or ())
    for name in family or ():
        check_choice("--family", name, FAMILIES)
    from moelab.bench import train
    from moelab.bench.harness import Timing

    train.main(
        widths=width or [32, 64, 128],
        families=family or list(FAMILIES),
        dtypes=dtype or ["fp32", "bf16"],
        steps=steps,
        threads=threads,
        timing=Timing(rounds, device, "cpu" if cpu_time else "wall", warm_up=train.warm_up_rounds(steps), budget_s=600),
        out=out,
        sequences=sequences,
    )
    write_provenance(out, "train")


@bench.command(name="gate")
def bench_gate(
    tokens: Annotated[int, typer.Option(help="S")] = 4096,
    experts: Experts = None,
    rounds: Rounds = 15,
    threads: Threads = 2,
    cpu_time: CpuTime = False,
    device: Device = "cpu",
    out: Out = None,
) -> None:
    """Compare the gate with the mask baseline and, where installed (extra peers), DeepSpeed's."""
    check_device(device)
    from moelab.bench import gate
    from moelab.bench.harness import Timing

    timing = Timing(rounds, device, "cpu" if cpu_time else "wall")
    gate.main(tokens=tokens, experts=experts or [8, 64, 128], timing=timing, threads=threads, out=out)
    write_provenance(out, "gate")


@bench.command(name="layer")
def bench_layer(
    tokens: Annotated[int, typer.Option(help="S")] = 4096,
    hidden: Annotated[int, typer.Option(help="M")] = 512,
    ffn: Annotated[int, typer.Option(help="F")] = 2048,
    experts: Experts = None,
    dtype: Annotated[list[str] | None, typer.Option(help="fp32 or bf16; repeat (default: both)")] = None,
    threads: Annotated[list[int] | None, typer.Option(help="CPU threads; repeat (default: 1, 2)")] = None,
    top_k: Annotated[int, typer.Option(help="experts of a token, K")] = 1,
    forward: Annotated[bool, typer.Option("--forward", help="the forward pass alone, as at inference")] = False,
    only: Annotated[list[str] | None, typer.Option(help="a candidate to compare with the dense layer; repeat")] = None,
    rounds: Rounds = 7,
    cpu_time: CpuTime = False,
    device: Device = "cpu",
    out: Out = None,
) -> None:
    """Compare the MoE layer with a dense one of equal FLOPs, the einsum baseline, torch and other libraries (peers)."""
    check_device(device)
    check_dtypes(dtype or ())
    from moelab.bench import layer
    from moelab.bench.harness import Timing

    sizes = [
        layer.LayerSize(tokens, hidden, ffn, E, name, top_k)
        for name in dtype or ["fp32", "bf16"]
        for E in experts or [8, 64, 128]
    ]
    slow_s = 8 if device == "cpu" else None  # on a GPU the first turns compile
    timing = Timing(rounds, device, "cpu" if cpu_time else "wall", budget_s=120, longest_s=slow_s)
    layer.main(
        sizes=sizes,
        threads=threads or ([1] if cpu_time or device == "cuda" else [1, 2]),
        timing=timing,
        only=only or (),
        out=out,
        backward=not forward,
    )
    write_provenance(out, "layer")


@bench.command(name="decode")
def bench_decode(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help="name, or directory of an imported model; repeat (default: seven, from the dense twin to an OLMoE)",
        ),
    ] = None,
    batch: Annotated[list[int] | None, typer.Option("--batch", help="sequences; repeat for several")] = None,
    ranks: Annotated[
        list[int] | None, typer.Option("--ranks", help="ranks that share the experts; repeat; 0 leaves it out")
    ] = None,
    rank_batch: Annotated[int, typer.Option(help="sequences over all ranks")] = 8,
    prompt: Annotated[int, typer.Option(help="tokens of a prompt")] = 32,
    output: Annotated[int, typer.Option(help="tokens generated for each")] = 32,
    rounds: Annotated[int, typer.Option(help="times the candidates take turns, with new prompts each time")] = 5,
    threads: Threads = 2,
    device: Device = "cpu",
    tensor: Annotated[int, typer.Option(help="under torchrun or srun: tensor slicing")] = 1,
    exchange: Annotated[str, typer.Option(help="under torchrun or srun: the optimised mode's exchange")] = "flat",
    dtype: Annotated[str, typer.Option(help="fp32 or bf16")] = "fp32",
    out: Out = None,
) -> None:
    """Measure decoding: our modes, the paper's baseline and, with the extra peers, transformers and llama.cpp.

    Under torchrun or srun each model is measured on the ranks that were started, with --rank-batch sequences over all
    of them.
    """
    check_device(device)
    check_choice("--exchange", exchange, EXCHANGES)
    check_dtypes([dtype])
    from moelab.bench.decoders import decoders

    for name in model or ():
        if name not in decoders() and not Path(name).is_dir():
            ModelConfig.parse(name)
    from moelab.bench.decode import DecodeSettings
    from moelab.bench.decode import main as bench_main

    bench_main(
        models=model,
        batches=batch or [1, 8, 32],
        ranks=[n for n in ranks or [1, 2, 4] if n],
        rank_batch=rank_batch,
        settings=DecodeSettings(prompt, output, rounds, device, dtype),
        threads=threads,
        tensor=tensor,
        exchange=exchange,
        out=out,
    )
    write_provenance(out, "decode" if dtype == "fp32" else f"decode-{dtype}")


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
    """Measure each exchange of tokens between ranks (flat, hierarchical, coordinated), and the alpha-beta floor.

    On ranks of this machine; under torchrun or srun on the ranks that were started, and --ranks does not count.
    """
    check_device(device)
    from moelab.bench.exchange import main as bench_main

    sizes = size or [1 << 10, 1 << 14, 1 << 18, 1 << 22]
    bench_main(ranks=ranks, sizes=sizes, rounds=rounds, device=device, out=out)
    write_provenance(out, "exchange")
