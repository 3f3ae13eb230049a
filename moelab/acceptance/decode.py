"""Measure decoding steps on the card beside what the simulator says of the same model, batch and precision.

First the host's time to issue a kernel (the simulator's constant `eager_us`), from models so small that the device
always waits; then a dense model of the 6.7B's shape and the paper's 350M+PR-MoE-32/64, replayed from a CUDA graph and
issued one by one. Weights are random, prompts random tokens; a time is the median over steps after the first.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moelab import simulate
from moelab.acceptance import speed, stages
from moelab.acceptance.cases import Case, Context, Numbers
from moelab.bench.decode_steps import our_turns
from moelab.config import ModelConfig, ParallelConfig
from moelab.inference.generate import Generator
from moelab.inference.modes import set_mode
from moelab.models import GPT, empty
from moelab.simulate.hardware import Cluster, Gpu
from moelab.simulate.systems import system

PROMPT, OUTPUT = 64, 64


def cases(context: Context) -> Iterator[Case]:
    """Yield the cases."""
    small = ModelConfig(24, 256, 4, vocab=1024, context=256, name="dense, 24 layers, 256 wide")
    moe = replace(small, experts=(0, 8) * 12, name="MoE-8, 24 layers, 256 wide")
    if context.tiny:
        small, moe = (replace(c, layers=2, hidden=32, heads=2, experts=c.experts[:2]) for c in (small, moe))
    for config in (small, moe):
        yield Case(f"host time of a kernel: {config.name}", lambda config=config: host_time(config, context))
    large = [("6.7B", (1, 8)), ("350M+PR-MoE-32/64", (1, 8, 64))]
    for name, batches in [("350M+PR-MoE-32/64 twin", (2,))] if context.tiny else large:
        for batch in batches:
            yield Case(
                f"decode {name}, batch {batch}",
                lambda n=name, b=batch: decoding(n, b, context),
                (),
                20 - 18 * context.tiny,
            )


# -- the host's time -------------------------------------------------------------------------------------------------


def host_time(config: ModelConfig, context: Context) -> list[Numbers]:
    """Return the host's time per kernel of a decoding step, in the optimised and in the baseline's form."""
    constant = simulate.fitted().eager_us
    found = []
    for mode, program in (("optimised", "moelab"), ("baseline", "pytorch")):
        generator = Generator(_made(config, context.device, torch.float32, mode), batch=1, static=False)
        ms = step_ms(generator, 1)
        kernels, source = kernels_of_a_step(generator)
        us = ms * 1e3 / kernels
        found.append(
            {
                "candidate": mode,
                "step_ms": ms,
                "kernels": kernels,
                "counted_by": source,
                "simulator_kernels": simulated_kernels(config, program),
                "host_us_a_kernel": us,
                "simulator_eager_us": constant,
            }
        )
    text = ", ".join(f"{row['candidate']} {row['host_us_a_kernel']:.1f} us ({row['kernels']} kernels)" for row in found)
    found[0]["finding"] = f"{text}; the simulator's constant is {constant:.1f} us"
    return found


class _Operators(TorchDispatchMode):
    """Counts the operators that compute, where there is no profiler of the device: views and allocations do not."""

    VIEWS = (
        "view", "reshape", "transpose", "t", "expand", "slice", "select", "unsqueeze", "squeeze", "permute", "split",
        "split_with_sizes", "detach", "alias", "as_strided", "unbind", "empty", "_unsafe_view",
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = op.overloadpacket.__name__
        if name not in self.VIEWS:
            self.counted[name] += 1
        return op(*args, **(kwargs or {}))


def kernels_of_a_step(generator: Generator) -> tuple[int, str]:
    """Return how many kernels a decoding step launches, and what counted them: the profiler, else PyTorch's operators.

    A generation of three tokens has one step more than one of two.
    """
    counts = []
    if generator.cache.device.type == "cuda":
        from torch.profiler import ProfilerActivity, profile

        for tokens in (2, 3):
            with profile(activities=[ProfilerActivity.CUDA]) as profiled:
                our_turns(generator, [[1, 2, 3]], tokens)
                torch.cuda.synchronize()
            counts.append(sum("cuda" in str(event.device_type).lower() for event in profiled.events()))
        if counts[1] > counts[0]:
            return counts[1] - counts[0], "profiler"
    counts = []
    for tokens in (2, 3):
        with _Operators() as operators:
            our_turns(generator, [[1, 2, 3]], tokens)
        counts.append(operators.counted.total())
    return counts[1] - counts[0], "operators"


def simulated_kernels(config: ModelConfig, program: str) -> int:
    """Return how many kernels the simulator counts in a step: its time when each takes 1 us and the host 1000."""
    known = replace(simulate.fitted(), eager_us=1000.0, kernel_us=1e-3)
    code = replace(system(program), graph=False)
    options = {"program": code, "batch": 1, "dtype": "bf16", "constants": known}
    return round(simulate.decode(config, ParallelConfig(), "h100", **options).latency_ms)


# -- models ----------------------------------------------------------------------------------------------------------


def decoding(name: str, batch: int, context: Context) -> list[Numbers]:
    """Return the step's time from a graph, one kernel after the other, and in the baseline's form, with predictions."""
    config = ModelConfig.parse(name)
    dtype = torch.float32 if context.tiny else torch.bfloat16
    model = _made(config, context.device, dtype, "optimised")
    measured: dict[str, float] = {}
    for candidate, options in (("graph", {}), ("no graph", {"capture": False})):
        measured[candidate] = step_ms(Generator(model, batch=batch, length=PROMPT + OUTPUT, **options), batch)
    if config.is_moe:
        if context.tiny:  # its weights were packed for the CPU
            model = _made(config, context.device, dtype, "baseline")
        else:
            set_mode(model, "baseline")
        for candidate, options in (("baseline, graph", {}), ("baseline, no graph", {"static": False})):
            measured[candidate] = step_ms(Generator(model, batch=batch, length=PROMPT + OUTPUT, **options), batch)
    programs = {
        "graph": system("moelab"),
        "no graph": replace(system("moelab"), graph=False),
        "baseline, graph": replace(system("pytorch"), graph=True, layer_waits=False, gate_wait=0),
        "baseline, no graph": system("pytorch"),
    }
    found = []
    for candidate, ms in measured.items():
        predicted = predict(config, programs[candidate], batch, context)
        ratios = {f"{where}_ratio": ms / value for where, value in predicted.items()}
        predicted = {f"{where}_ms": value for where, value in predicted.items()}
        memory = torch.cuda.max_memory_allocated() / 2**30 if context.device == "cuda" else None
        found.append(
            {
                "model": name, "batch": batch, "candidate": candidate, "step_ms": ms, "tokens_per_s": batch / ms * 1e3,
                "dtype": "fp32" if context.tiny else "bf16", "peak_gib": memory, **predicted, **ratios,
            }
        )  # fmt: skip
    text = ", ".join(f"{candidate} {ms:.3g} ms" for candidate, ms in measured.items())
    first = {key: value for key, value in found[0].items() if key in ("data_sheet_ms", "ceilings_ms")}
    says = ", ".join(f"{value:.3g} by the {key.removesuffix('_ms').replace('_', ' ')}" for key, value in first.items())
    found[0]["finding"] = f"{text}; the simulator: {says}" if says else text
    return found


def predict(config: ModelConfig, program, batch: int, context: Context) -> dict[str, float]:
    """Return the simulator's step in ms, by the card's data sheet and by the ceilings measured on it, where known."""
    options = {"program": program, "batch": batch, "context": PROMPT + OUTPUT // 2, "dtype": "bf16"}
    found = {}
    if (where := speed.cluster_of(context.device)) is not None:
        found["data_sheet"] = simulate.decode(config, ParallelConfig(), where, **options).latency_ms
    if measured := context.earlier("speed", "ceilings"):
        row = measured[-1]
        gpu = Gpu(stages.card(context.device), 80.0, row["read_gb_s"], row["product_bf16_tflops"])
        card = Cluster("measured", gpu, gpus_per_node=8, near_gb_s=300.0, far_gb_s=25.0)  # links do not count here
        host = [row["host_us_a_kernel"] for row in context.rows if row.get("host_us_a_kernel")]
        known = replace(simulate.fitted(), memory_share=1.0, matmul_share=1.0)
        known = replace(known, eager_us=statistics.median(host)) if host else known
        found["ceilings"] = simulate.decode(config, ParallelConfig(), card, constants=known, **options).latency_ms
    return found


def _made(config: ModelConfig, device: str, dtype: torch.dtype, mode: str) -> GPT:
    """Return a model of random weights in a mode of inference, made on the device."""
    model = empty(config, device, dtype)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                parameter.normal_(0.0, config.init_std)
    return set_mode(model, mode)


def step_ms(generator: Generator, batch: int, rounds: int = 3) -> float:
    """Return the median time of a step in ms, over rounds of new prompts after one that warms up."""
    config, tiny = generator.model.config, generator.cache.device.type == "cpu"
    length, output = (4, 4) if tiny else (PROMPT, OUTPUT)
    draw = torch.Generator().manual_seed(0)
    times: list[float] = []
    for number in range(1 if tiny else rounds + 1):
        prompts = torch.randint(config.vocab, (batch, length), generator=draw).tolist()
        turns = our_turns(generator, prompts, output)
        times += turns[1:] if number or tiny else []
    return statistics.median(times) * 1e3
