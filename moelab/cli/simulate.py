"""`moelab simulate …` and `moelab plan`. Heavy modules are imported inside the commands."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from moelab import terminal
from moelab.cli._options import AsJson, print_json
from moelab.config import ModelConfig
from moelab.config.parallel import ParallelConfig
from moelab.files import write_json
from moelab.runs.provenance import provenance

app = typer.Typer(no_args_is_help=True, help="Compute latency, memory, throughput and cost of a layout.")

Model = Annotated[
    str, typer.Argument(help="a name such as 1.3B+MoE-128 or qwen3-235b, or a directory of an imported model")
]
Gpus = Annotated[int, typer.Option(help="GPUs")]
ClusterName = Annotated[
    str,
    typer.Option(
        help="a100, a100-40gb, a100-80gb, h100, h200, h800, or a YAML file; "
        "default a100, of a published or imported model h100"
    ),
]
SystemName = Annotated[
    str,
    typer.Option(
        help="pytorch (the paper's baseline), deepspeed (its full system), moelab; "
        "today: engine, engine-tp (inference), megatron (training); default of a model of the paper the paper's own, "
        "else today's"
    ),
]
Tensor = Annotated[int, typer.Option(help="ranks of tensor slicing")]
Context = Annotated[int, typer.Option(help="tokens a sequence, for the cache")]
Dtype = Annotated[
    str,
    typer.Option(
        help="fp16, bf16 or fp32, of weights, cache and products; fp8, of weights and products; int8, of weights; "
        "default fp16, of a published model that of its weights"
    ),
]


def plan(
    model: Model,
    gpus: Annotated[int, typer.Option(help="maximum number of GPUs")],
    cluster: ClusterName = "",
    objective: Annotated[str, typer.Option(help="latency, throughput or cost")] = "latency",
    system: SystemName = "",
    context: Context = 2048,
    batch: Annotated[
        list[int] | None, typer.Option(help="sequences of a tensor group; repeat for several; default 1 to 512")
    ] = None,
    max_latency: Annotated[float, typer.Option(help="ms; 0 is no limit")] = 0.0,
    dtype: Dtype = "",
    figure: Annotated[Path | None, typer.Option(help="PNG or SVG file for the Pareto front")] = None,
    as_json: AsJson = False,
) -> None:
    """Find the best layout to serve a model, and say why."""
    from rich.padding import Padding
    from rich.text import Text

    from moelab.simulate.search import BATCHES, describe, frame
    from moelab.simulate.search import plan as search

    if figure is not None and figure.suffix not in (".png", ".svg"):
        raise ValueError(f"--figure {figure}: must end in .png or .svg")
    cluster, system, dtype = _defaults(model, cluster, system, dtype)
    found = search(
        _opened(model),
        gpus,
        cluster,
        objective=objective,  # type: ignore[arg-type]  # `plan` checks it
        program=system,
        batches=tuple(batch or BATCHES),
        context=context,
        max_latency_ms=max_latency,
        dtype=dtype,
    )
    if as_json:
        print_json(found)
        return
    best = found.best
    console = terminal.console()
    console.print(f"{best.model} on {best.cluster}, {best.system}, best by {objective}:", highlight=False)
    speed = f"{best.latency_ms:.2f} ms a token, {best.tokens_per_s_per_gpu:,.1f} tokens/s/GPU{_price(best)}"
    for line in (describe(best), speed, *found.why, *_experience(model, best)):
        console.print(Padding(Text(line), (0, 0, 0, 2)))
    console.print("Pareto front:")
    several = len({e.parallel.exchange for e in found.front}) > 1
    columns = ("GPUs", "tensor", "experts", *["exchange"] * several, "batch", "ms", "tokens/s", "GiB", "bound by")
    front = terminal.table(*columns)
    for e in found.front:
        p = e.parallel
        over = (f"{p.expert} x {p.expert_slicing}" if p.expert else "", *[p.exchange] * several)
        numbers = (f"{e.latency_ms:.1f}", f"{e.tokens_per_s_per_gpu:,.1f}", f"{e.total_gib:.1f}", e.bound)
        front.add_row(str(p.ranks), str(p.tensor), *over, str(e.batch), *numbers)
    console.print(front)
    console.print(
        "experts: ranks x slices of an expert; batch: sequences of a tensor group; tokens/s and GiB: per GPU",
        highlight=False,
    )
    if figure is not None:
        import matplotlib

        matplotlib.use("Agg")

        from moelab.plotting import figures, serving

        figures.theme()
        drawing, (ax,) = figures.panels(height=3.6)
        chosen = (best.latency_ms, best.tokens_per_s_per_gpu)
        serving.pareto(frame(found.front), ax, best=chosen, objective=objective)
        figures.title(drawing, found.headline)
        drawing.savefig(figure, dpi=200)
        terminal.say(f"figure: {figure}")


@app.command()
def decode(
    model: Model,
    gpus: Gpus = 8,
    cluster: ClusterName = "",
    system: SystemName = "",
    tensor: Tensor = 1,
    expert: Annotated[int, typer.Option(help="ranks that share a layer's experts; 0 is as many as there can be")] = 0,
    slicing: Annotated[int, typer.Option(help="ranks that share one expert")] = 1,
    exchange: Annotated[str, typer.Option(help="flat, hierarchical, …; default the system's own")] = "",
    batch: Annotated[int, typer.Option(help="sequences of a tensor group")] = 8,
    context: Context = 128,
    dtype: Dtype = "",
    imbalance: Annotated[
        float, typer.Option(help="tokens of the busiest rank over an even share; for systems without slots")
    ] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Show one decoding step of one layout: latency by part, memory, throughput, cost."""
    from moelab import simulate

    cluster, system, dtype = _defaults(model, cluster, system, dtype)
    code = simulate.system(system)
    if code.sliced and (expert or slicing != 1 or exchange):
        raise ValueError(
            f"--system {code.name} slices every expert over the tensor group; leave out --expert, --slicing, --exchange"
        )
    parallel = _parallel(simulate, cluster, gpus, tensor, expert, slicing, exchange or code.exchange)
    options = {"program": system, "batch": batch, "context": context, "dtype": dtype, "imbalance": imbalance}
    got = simulate.decode(_opened(model), parallel, cluster, **options)
    if as_json:
        print_json(got)
        return
    terminal.say(f"{got.model} on {gpus} GPUs of {got.cluster}, {got.system}: {got.latency_ms:.2f} ms a token")
    for part, ms in got.parts_ms.items():
        if ms >= 0.0005:
            terminal.say(f"  {part:<12} {ms:9.3f} ms  {ms / got.latency_ms:4.0%}")
    terminal.say(f"{got.tokens_per_s_per_gpu:,.1f} tokens/s/GPU{_price(got)}")
    _print_memory(got)
    for line in _experience(model, got):
        terminal.say(line)


def _experience(model: str, got) -> list[str]:
    """Return the range of a step of a program of today, and the nearest public measurement, as lines."""
    from moelab.simulate import public
    from moelab.simulate.systems import system

    code = system(got.system)
    if not code.modern:
        return []
    factor, within, rows = public.experience("decode")
    low, high = got.latency_ms / factor, got.latency_ms * factor
    held = f"range {low:.2f} to {high:.2f} ms a token: ranges like it held for {within} of {rows} sealed measurements"
    p = got.parallel
    expert = p.expert or (1 if code.sliced else p.ranks // p.expert_slicing)  # 0: as many as there can be
    near = public.nearest("decode", model.lower(), got.cluster, batch=got.batch, tensor=p.tensor, expert=expert)
    if near is None:
        return [held]
    outside = ", outside this range" if near.metric == "step" and not low <= near.value <= high else ""
    return [held, f"nearest measurement: {near.in_words} ({near.settings}){outside}"]


@app.command()
def train(
    model: Model,
    gpus: Gpus = 128,
    cluster: ClusterName = "",
    system: SystemName = "",
    tensor: Tensor = 1,
    batch: Annotated[int, typer.Option(help="sequences a step, over all GPUs")] = 512,
    micro_batch: Annotated[int, typer.Option(help="sequences a forward pass of a data rank")] = 1,
    recompute: Annotated[bool, typer.Option(help="activation checkpointing")] = True,
    zero: Annotated[int, typer.Option(help="0, 1 or 2")] = 0,
    tokens: Annotated[float, typer.Option(help="tokens of the whole training, for the days it takes")] = 300e9,
    as_json: AsJson = False,
) -> None:
    """Show a training step of one layout: time by part, samples/s, memory with optimizer, days of the training."""
    from moelab import simulate

    if not 0 < tokens < float("inf"):
        raise ValueError(f"--tokens must be a positive number, got {tokens:g}")
    cluster, system, _ = _defaults(model, cluster, system, training=True)
    parallel = _parallel(simulate, cluster, gpus, tensor, 0, 1, simulate.system(system).exchange)
    got = simulate.training(
        _opened(model),
        replace(parallel, recompute=recompute),
        cluster,
        batch=batch,
        micro_batch=micro_batch,
        program=system,
        zero=zero,
    )
    if as_json:
        print_json({**asdict(got), "days": got.days(tokens)})
        return
    terminal.say(
        f"{got.model} on {gpus} GPUs of {got.cluster}, {got.system}: {got.step_s:.3f} s a step of {batch} sequences"
    )
    for part, seconds in got.parts_s.items():
        if seconds > 0:
            terminal.say(f"  {part:<12} {seconds:9.4f} s  {seconds / got.step_s:4.0%}")
    terminal.say(f"{got.samples_per_s:,.1f} samples/s, {got.tflops_per_gpu:.1f} model TFLOP/s/GPU")
    terminal.say(f"{got.days(tokens):,.1f} days for {tokens / 1e9:,g} billion tokens")
    _print_memory(got)


@app.command()
def clusters(as_json: AsJson = False) -> None:
    """Show the clusters that come with the package."""
    from moelab import simulate

    if as_json:
        print_json({name: simulate.cluster(name) for name in simulate.clusters()})
        return
    view = terminal.table("name", "GPUs of a node", "memory GB/s", "TFLOP/s", "NVLink GB/s", "between nodes GB/s")
    for name in simulate.clusters():
        c = simulate.cluster(name)
        rates = (f"{c.gpu.memory_gb_s:,.0f}", f"{c.gpu.tflops:,.0f}", f"{c.near_gb_s:g}", f"{c.far_gb_s:g}")
        view.add_row(name, f"{c.gpus_per_node} x {c.gpu.name}", *rates)
    terminal.console().print(view)


@app.command()
def score(
    public: Annotated[
        bool, typer.Option("--public", help="public measurements of today's systems, with ranges")
    ] = False,
    group: Annotated[str, typer.Option(help="of --public, every row of a group, such as decode")] = "",
    as_json: AsJson = False,
) -> None:
    """Compare the simulator with every number of the paper, or with public measurements of today's systems."""
    if public or group:
        _score_public(group, as_json)
        return
    from moelab.simulate.scoreboard import median_error, rows

    found = rows()
    if as_json:
        print_json(found)
        return
    view = terminal.table("number", "paper", "simulated", "unit", "error", "kind")
    for row in found:
        numbers = (f"{row['paper']:.4g}", f"{row['simulated']:.4g}")
        view.add_row(row["what"], *numbers, row["unit"], f"{row['error_percent']:+.1f} %", row["kind"])
    terminal.console().print(view)
    for kind in ("fitted", "predicted"):
        terminal.say(f"median absolute error, {kind}: {median_error(found, kind=kind):.1f} %")


def _score_public(group: str, as_json: bool) -> None:
    from moelab.config import unknown
    from moelab.simulate import judge
    from moelab.simulate.public import GROUPS, measurements, seal

    if group and group not in GROUPS:
        raise ValueError(unknown(f"no group {group!r}", group, GROUPS))
    found = judge.rows([m for m in measurements() if not group or m.group == group])
    if as_json:
        print_json({"seal": seal(), "summary": judge.summary(found), "rows": found})
        return
    if group:
        table = terminal.table("row", "published", "simulated", "range", "unit", "error of the time", "kind")
        for r in found:
            numbers = (f"{r['published']:.4g}", f"{r['simulated']:.4g}", f"{r['low']:.4g} to {r['high']:.4g}")
            table.add_row(r["id"], *numbers, r["unit"], f"{r['error_percent']:+.0f} %", r["kind"])
    else:
        table = terminal.table("group", "half", "rows", "median error", "worst", "in range", "range")
        for r in judge.summary(found):
            errors = (f"{r['median_error_percent']:.0f} %", f"{r['worst_error_percent']:+.0f} %")
            within = f"{r['within']} of {r['rows']}"
            table.add_row(r["group"], r["half"], str(r["rows"]), *errors, within, f"x or / {r['range_factor']:.2f}")
    terminal.console().print(table)


@app.command()
def fit(
    modern: Annotated[bool, typer.Option("--modern", help="the constants of today's programs")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file; default: the package's own")] = None,
) -> None:
    """Fit the free constants to the 52B scaling figure (arXiv Fig 10) or, with --modern, to open rows; store them."""
    from importlib import resources

    from moelab.simulate import judge
    from moelab.simulate.calibrate import fit as run_fit
    from moelab.simulate.constants import FREE

    found = judge.fit() if modern else run_fit()
    if modern:
        for name, value in found["constants"].items():
            terminal.say(f"{name:<14} {value:10.4g}{'  at its bound' if name in found['at_bound'] else ''}")
    else:
        _print_fit(found, FREE)
    record = provenance()
    found["made"] = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": "moelab simulate fit" + " --modern" * modern,
        **{k: record[k] for k in ("commit", "modified") if k in record},
    }
    name = "calibration_modern.json" if modern else "calibration.json"
    file = out or Path(str(resources.files("moelab.simulate").joinpath(name)))
    write_json(file, found)
    terminal.say(f"written: {file}")


def _print_fit(found, free) -> None:
    for name, value in found["constants"].items():
        low, high, _ = free[name]
        error = found["standard_errors"][name]
        spread = "at its bound" if error is None else f"± {error:.0%}"
        terminal.say(f"{name:<14} {value:8.3f}  {spread}, allowed {low:g} to {high:g}")
    for bar in found["bars"]:
        ratio = bar["simulated_ms"] / bar["paper_ms"] - 1
        terminal.say(
            f"{bar['system']:<10} {bar['gpus']:>3} GPUs  paper {bar['paper_ms']:5.1f}  "
            f"simulated {bar['simulated_ms']:5.1f} ms  {ratio:+.1%}"
        )


def _parallel(simulate, cluster: str, gpus: int, tensor: int, expert: int, slicing: int, exchange: str):
    if gpus < 1 or tensor < 1:
        raise ValueError(f"--gpus and --tensor must be at least 1, got {gpus} and {tensor}")
    if gpus % tensor:
        raise ValueError(f"--tensor {tensor} does not divide --gpus {gpus}")
    return ParallelConfig(
        tensor=tensor,
        data=gpus // tensor,
        expert=expert,
        expert_slicing=slicing,
        gpus_per_node=simulate.cluster(cluster).gpus_per_node,
        exchange=exchange,  # type: ignore[arg-type]  # the class checks it
    )


def _defaults(
    model: str, cluster: str, system: str, dtype: str = "", *, training: bool = False
) -> tuple[str, str, str]:
    """Return the cluster, system and dtype that were named, else the paper's, or today's for a model of others."""
    from moelab import simulate
    from moelab.simulate.published import DTYPES

    theirs = DTYPES.get(model.lower(), "bf16" if (Path(model) / "config.json").is_file() else "")
    cluster = cluster or ("h100" if theirs else "a100")
    if theirs == "fp8" and not simulate.cluster(cluster).gpu.fp8:
        theirs = "bf16"
    own = ("megatron" if theirs else "pytorch") if training else "engine" if theirs else "deepspeed"
    return cluster, system or own, dtype or theirs or "fp16"


def _opened(model: str) -> ModelConfig | str:
    """Return a model's name, or the configuration of the model in a directory."""
    if not (Path(model) / "config.json").is_file():
        return model
    from moelab.engine.checkpoint import hf

    return hf.read_config(Path(model))


def _price(got) -> str:
    if not got.cost_per_million:
        return ""
    return f", {got.cost_per_million:,.2f}{f' {got.currency}' if got.currency else ''} per million tokens"


def _print_memory(got) -> None:
    used = ", ".join(f"{name} {size:.1f}" for name, size in got.memory_gib.items() if size >= 0.05)
    fits = "fits" if got.fits else "does NOT fit"
    terminal.say(f"memory a GPU: {got.total_gib:.1f} of {got.capacity_gib:.1f} GiB ({used}): {fits}")
