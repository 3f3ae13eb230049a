"""The `moelab` command. Heavy modules are imported inside the commands: `moelab --help` answers at once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from moelab.cli import simulate as simulate_cli
from moelab.cli import slurm as commands
from moelab.runs import records

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Reproduce, question and extend the DeepSpeed-MoE paper (arXiv 2201.05596).",
)
bench = typer.Typer(no_args_is_help=True, help="Benchmarks; each prints ratios measured side by side in one run.")
app.add_typer(bench, name="bench")
kernels = typer.Typer(no_args_is_help=True, help="The Triton kernels, without a GPU.")
app.add_typer(kernels, name="kernels")
app.add_typer(simulate_cli.app, name="simulate")
app.add_typer(records.app, name="runs")
app.command()(simulate_cli.plan)
commands.register(app)


Experts = Annotated[list[int] | None, typer.Option("--experts", help="number of experts; repeat for several")]
Threads = Annotated[int, typer.Option(help="CPU threads")]
Device = Annotated[str, typer.Option(help="cpu or cuda")]
Out = Annotated[Path | None, typer.Option(help="folder for the numbers as JSON lines")]


@app.command(name="list")
def list_() -> None:
    """Show the experiments, their scales and what they cost."""
    from moelab import terminal
    from moelab.experiments import EXPERIMENTS

    view = terminal.table("experiment", "paper", "question", "scale", "what", "cost")
    for e in EXPERIMENTS.values():
        for i, (name, scale) in enumerate(e.scales.items()):
            view.add_row(*((e.name, e.paper, e.question) if i == 0 else ("", "", "")), name, scale.what, scale.cost)
    terminal.console().print(view)


@app.command()
def run(
    name: Annotated[str | None, typer.Argument(help="experiment, see `moelab list`")] = None,
    scale: Annotated[str, typer.Option(help="smoke, cpu, gpu or paper")] = "cpu",
    parameter: Annotated[
        list[str] | None, typer.Option("-p", "--parameter", metavar="NAME=VALUE", help="a parameter of the notebook")
    ] = None,
    all_: Annotated[bool, typer.Option("--all", help="every experiment that has the scale")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="only say what would be trained, and what it costs")
    ] = False,
) -> None:
    """Run an experiment's notebook: trains what is not trained yet, publishes figures and claims to the results."""
    from moelab.experiments import EXPERIMENTS, experiment
    from moelab.notebook import batch
    from moelab.notebook import execute as notebooks

    if all_ == (name is not None):
        raise ValueError("run: give an experiment's name or --all; see `moelab list`")
    given = commands.parse_parameters(parameter, scale)
    scale = given["scale"]
    if name is not None:
        values = notebooks.check_parameters(experiment(name), given)
        experiment(name).scale(values["scale"])
    if dry_run:
        from moelab.runs.dry_run import plan, show

        wanted = {name: given} if name else batch.chosen(scale, {k: v for k, v in given.items() if k != "scale"})
        show(plan([spec for e, taken in wanted.items() for spec in batch.specs_of(EXPERIMENTS[e], taken)]))
        return
    if name is None:
        from moelab.lab import Lab

        good = batch.run_all(scale, {k: v for k, v in given.items() if k != "scale"}, Lab().run)
    else:
        from moelab.notebook.watch import execute_watched

        good = execute_watched(experiment(name), values)
    if not good:
        raise typer.Exit(1)


@app.command()
def claims(
    as_json: Annotated[bool, typer.Option("--json", help="all of it, as JSON")] = False,
) -> None:
    """Every claim of the paper, ours beside the paper's value, and a verdict; computed from the published results."""
    import json

    from moelab import paths, terminal
    from moelab.report.ledger import counts, ledger, table

    entries = ledger(paths.results())
    if as_json:
        print(json.dumps([entry.to_json() for entry in entries], indent=2))
        return
    console = terminal.console()
    console.print(table(entries, console.width))
    console.print(f"{len(entries)} claims: " + ", ".join(f"{n} {verdict}" for verdict, n in counts(entries).items()))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def lab(context: typer.Context, profile: commands.Profile = None) -> None:
    """Open JupyterLab on the notebooks, here on 127.0.0.1 or, with --profile, on a node of a cluster; further arguments go to it."""
    from moelab import paths

    if profile is not None:
        from moelab.slurm import lab as cluster_lab
        from moelab.slurm import profiles

        raise typer.Exit(cluster_lab.start(profiles.load(profile), context.args))
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={paths.notebooks()}", *context.args]
    os.execv(sys.executable, command)


@app.command()
def browse(
    port: Annotated[int, typer.Option(help="port on 127.0.0.1")] = 8800,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="open a browser window")] = False,
    serve: Annotated[bool, typer.Option("--serve/--no-serve", help="serve the pages, or only build them")] = True,
) -> None:
    """Build the results pages and serve them on localhost."""
    import functools
    import http.server
    import webbrowser

    from moelab import paths
    from moelab.report import site

    built = site.build(paths.results())
    for line in built.unreadable:
        print(f"left out: {line}", file=sys.stderr)
    folder = built.index.parent
    if not serve:
        print(f"{built.results} results, {built.written} files written: {built.index}")
        return
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    try:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    except OSError as error:
        raise ValueError(f"port {port}: {error.strerror}; choose another with --port") from None
    address = f"http://127.0.0.1:{server.server_port}/"
    print(f"results of {folder} at {address} (Ctrl-C ends)", flush=True)
    if open_browser:
        webbrowser.open(address)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        print()


@app.command()
def tensorboard(
    run: Annotated[list[str] | None, typer.Argument(help="runs, by the beginning of their id; all without")] = None,
    port: Annotated[int, typer.Option(help="port on 127.0.0.1")] = 6006,
) -> None:
    """Show runs in TensorBoard, those still training too: losses, speed, and the experts' load by layer."""
    from moelab.report import tensorboard as board

    raise typer.Exit(board.serve(board.select(run or []), port))


@app.command()
def doctor() -> None:
    """Check this installation: what works, what is missing, how to get it."""
    from moelab.cli.doctor import report

    if not report():
        raise typer.Exit(1)


@app.command()
def generate(
    run: Annotated[
        str, typer.Argument(help="id of a run, or the beginning of it, or a directory of a run or an exported model")
    ],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="text to continue; repeat for several")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="tokens at most")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token")] = 0.8,
    top_k: Annotated[int, typer.Option(help="draw from the k likeliest tokens; 0 is all")] = 0,
    top_p: Annotated[float, typer.Option(help="draw from the likeliest tokens of this probability")] = 1.0,
    seed: Annotated[int, typer.Option(help="of the draws")] = 0,
    mode: Annotated[str, typer.Option(help="optimised, or baseline: the paper's PyTorch")] = "optimised",
    dtype: Annotated[str, typer.Option(help="fp32 or bf16")] = "fp32",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    tensor: Annotated[int, typer.Option(help="on ranks: tensor slicing")] = 1,
    expert: Annotated[int, typer.Option(help="on ranks: that share a layer's experts; 0 is as many as can")] = 0,
    expert_slicing: Annotated[int, typer.Option(help="on ranks: that share one expert")] = 1,
    exchange: Annotated[
        str, typer.Option(help="on ranks: flat, hierarchical, coordinated or coordinated-hierarchical")
    ] = "flat",
    gpus_per_node: Annotated[int, typer.Option(help="on ranks: of a node")] = 8,
) -> None:
    """Continue prompts with a trained run; a single one is shown as it comes. Under torchrun or srun, ranks share the model."""
    _check_device(device)
    from moelab import paths
    from moelab.engine.checkpoint import CheckpointError
    from moelab.engine.launch import process
    from moelab.inference import Sampling
    from moelab.inference.text import join_ranks, open_text
    from moelab.runs.store import RunStore

    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    prompts = prompt or [""]
    directory = RunStore().find(run)
    layout = dict(tensor=tensor, expert=expert, expert_slicing=expert_slicing, exchange=exchange)
    mesh = join_ranks(directory, device, **layout, gpus_per_node=gpus_per_node)
    cache, batch = paths.home() / "data", min(len(prompts), 32)
    try:
        writer = open_text(directory, cache=cache, mode=mode, dtype=dtype, device=device, batch=batch, mesh=mesh)
    except CheckpointError as error:
        raise ValueError(str(error)) from None
    if len(prompts) == 1 and mesh is None:
        print(prompts[0], end="", flush=True)
        for _, text in writer.stream(prompts, sampling):
            print(text, end="", flush=True)
        print()
        return
    found = writer.generate(prompts, sampling)
    if mesh is None or mesh.rank == 0:
        print("\n\n".join(str(text) for text in found))
    process.leave()


@app.command(name="eval")
def eval_(
    run: Annotated[
        str,
        typer.Argument(
            help="id of a run, or the beginning of it, or a directory of a run or a model (ours exported, or one that transformers opens), or "
            "smollm2: a small real model, fetched, to check the pipeline with"
        ),
    ],
    tasks: Annotated[
        str, typer.Option(help="comma-separated: packaged ones (default: all six), or lm-eval's own with a network")
    ] = "",
    limit: Annotated[int, typer.Option(help="only the first items of each task; 0 is all")] = 0,
    batch: Annotated[int, typer.Option(help="sequences at a time")] = 16,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16")] = "fp32",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="the scores as JSON")] = False,
    out: Out = None,
) -> None:
    """Zero-shot tasks (the paper's Table 2): accuracy beside chance and the answers' bits per byte. Killed, it goes on where it was."""
    import json
    from dataclasses import asdict

    _check_device(device)
    from moelab import paths
    from moelab.data.packages import CorpusUnavailable
    from moelab.engine.checkpoint import CheckpointError
    from moelab.evaluation.models import REFERENCES, reference_directory
    from moelab.evaluation.zero_shot import PACKAGED, evaluate
    from moelab.report import scores as report
    from moelab.runs.store import RunStore
    from moelab.terminal import task_progress

    wanted = tuple(dict.fromkeys(name for name in map(str.strip, tasks.split(",")) if name)) or PACKAGED
    options = dict(cache=paths.home() / "data", limit=limit, batch=batch, dtype=dtype, device=device)
    try:
        reference = run in REFERENCES
        directory = reference_directory(run, options["cache"]) if reference else RunStore().find(run)
        with task_progress() as show:
            scores = evaluate(directory, wanted, **options, on_progress=show)
    except (CheckpointError, CorpusUnavailable) as error:
        raise ValueError(str(error)) from None
    if out is not None:
        report.save(scores, out, run if reference else directory.resolve().name, options)
    if as_json:
        print(json.dumps([asdict(score) for score in scores], indent=2))
        return
    report.show(scores)


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="id of a run, or the beginning of it, or its directory")],
    directory: Annotated[Path, typer.Argument(help="new directory")],
) -> None:
    """Write a run's weights and tokenizer for others: GPT-2's format if the model is dense, our safetensors format if it has experts."""
    from moelab import paths
    from moelab.data import prepare
    from moelab.engine.checkpoint import CheckpointError, hf
    from moelab.inference.text import load_run, run_configs
    from moelab.runs.store import RunStore

    source = RunStore().find(run)
    config, data = run_configs(source)
    try:
        model = load_run(source)
    except CheckpointError as error:
        raise ValueError(str(error)) from None
    hf.export(model, directory, prepare(data, paths.home() / "data").tokenizer())
    print(f"{config}: {'our format' if config.is_moe else 'GPT-2'} in {directory}")


@bench.command(name="train")
def bench_train(
    steps: Annotated[int, typer.Option(help="measured steps of each model")] = 20,
    rounds: Annotated[int, typer.Option(help="times the models take turns")] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 1,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16")] = "fp32",
    out: Annotated[Path | None, typer.Option(help="folder for the numbers as JSON lines")] = None,
) -> None:
    """Training speed of the twins: MoE over its dense base, and our dense twin over a bare PyTorch loop."""
    from moelab.bench.train import main as bench_main

    bench_main(steps=steps, rounds=rounds, threads=threads, dtype=dtype, out=out)
    _write_provenance(out, "train")


def _write_provenance(out: Path | None, name: str) -> None:
    """Commit, versions and hardware beside a benchmark's numbers."""
    if out is not None:
        from moelab.files import write_json
        from moelab.runs.provenance import provenance

        write_json(out / f"{name}.provenance.json", provenance())


def _check_device(device: str) -> None:
    import torch

    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device is available; allowed here: cpu")


@bench.command(name="gate")
def bench_gate(
    tokens: Annotated[int, typer.Option(help="S")] = 4096,
    experts: Experts = None,
    rounds: Annotated[int, typer.Option(help="times the candidates take turns")] = 15,
    threads: Threads = 2,
    device: Device = "cpu",
    out: Out = None,
) -> None:
    """The gate against the mask baseline and, where installed (extra peers), DeepSpeed's."""
    _check_device(device)
    from moelab.bench.gate import main as bench_main

    bench_main(tokens=tokens, experts=experts or [8, 64, 128], rounds=rounds, threads=threads, device=device, out=out)
    _write_provenance(out, "gate")


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
    """The MoE layer against the dense layer of equal FLOPs, the einsum baseline and, where installed (extra peers), others' layers."""
    _check_device(device)
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
    _write_provenance(out, "layer")


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
    """Latency and throughput of decoding: optimised, the paper's baseline and, where installed (extra peers), transformers.

    Under torchrun or srun each model is measured on the ranks that were started, --rank-batch sequences over all of them.
    """
    _check_device(device)
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
        _write_provenance(out, "decode")


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
    _write_provenance(out, "scaling")


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
    _check_device(device)
    from moelab.bench.exchange import main as bench_main
    from moelab.engine.launch import process

    sizes = size or [1 << 10, 1 << 14, 1 << 18, 1 << 22]
    bench_main(ranks=ranks or [4, 8, 16], sizes=sizes, rounds=rounds, device=device, out=out)
    place = process.find()
    if place is None or place.rank == 0:
        _write_provenance(out, "exchange")


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
    _write_provenance(out, "submit")


@kernels.command(name="compile")
def kernels_compile(
    arch: Annotated[list[str] | None, typer.Option(help="sm_80 (A100), sm_90 (H100); repeat for several")] = None,
    out: Annotated[Path | None, typer.Option(help="CSV file for the table")] = None,
) -> None:
    """Compile every kernel ahead of time; print registers, shared memory, spills and occupancy. Exit code 1 if one spills."""
    from moelab.kernels.compile import main as compile_main

    arguments = [item for name in arch or ["sm_80", "sm_90"] for item in ("--arch", name)]
    raise typer.Exit(compile_main(arguments + (["--out", str(out)] if out else [])))


def main() -> None:
    """Entry point: bad input is one line on standard error and exit code 2."""
    try:
        app()
    except ValueError as error:
        print(f"moelab: {error}", file=sys.stderr)
        sys.exit(2)
