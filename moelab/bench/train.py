"""`moelab bench train`: what a step of training costs, dense and MoE, fp32 and bf16, side by side.

Twins of the 350M models with the paper's own numbers of experts (`shrink(experts=1)`) take turns in the training loop
on batches of text, one family after the other; the dense one runs beside the same model in a bare, hand-written
PyTorch loop. Ratios are to the dense twin in fp32, round by round. The floor is the time of the model's FLOPs at the
rate of a large matrix product in the row's dtype. A student learns from a teacher of random weights, whose forward pass
belongs to its FLOPs. Where training on a CPU computes fp32 products by another library than PyTorch does by default
(`moelab.models.products`), each family takes part a second time with PyTorch's. On a CPU each candidate has a process
of its own, as runs have: in one process, models share the allocator's memory. They share one on a GPU, and where
processor time is measured. At the end: the dtype to use on this machine for each family.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from moelab import terminal
from moelab.bench import harness, inputs
from moelab.bench.bare import Step, bare_loop
from moelab.bench.harness import Row, Timing
from moelab.config import ModelConfig, RoutingConfig, TrainConfig
from moelab.config.distill import DistillConfig
from moelab.engine.launch import process
from moelab.engine.testing import RankError, Ranks
from moelab.inference.text import DTYPES
from moelab.models import build
from moelab.models.products import default_products, onednn_is_faster
from moelab.plotting import benchmarks
from moelab.training.distill import Distiller
from moelab.training.metrics import Window
from moelab.training.trainer import Trainer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FAMILIES = {
    "dense": "350M",
    "MoE-128": "350M+MoE-128",
    "PR-MoE-32/64": "350M+PR-MoE-32/64",
    "PR-MoE+L21 + KD": "350M+PR-MoE-32/64+L21",
}
TEACHERS = {"PR-MoE+L21 + KD": "PR-MoE-32/64"}
"""Family -> that of the teacher, which has random weights and computes every batch as well."""
BARE = "dense, bare loop"
DEFAULT = ", PyTorch's products"
"""Ends the name of a candidate with PyTorch's own library of fp32 products."""
SEQUENCES = 32
WARM_UP_STEPS = 20
"""Steps of a process that are not timed: its heap grows in the first ones, by measurement in up to 20 (`LOG.md`)."""
TURN_S = 600.0
"""Time limit of a turn in a process of its own."""


def warm_up_rounds(steps: int) -> int:
    """Return how many rounds, of `steps` steps each, have at least `WARM_UP_STEPS` steps together."""
    return math.ceil(WARM_UP_STEPS / max(1, steps))


def training_loop(
    model_config: ModelConfig, config: TrainConfig, context: int, teacher: ModelConfig | None = None
) -> Step:
    """Return the step of moelab's own training loop; with a teacher, of random weights, that of a student."""
    batches = inputs.TextBatches(config.batch_size, context, model_config.vocab)
    distiller = (
        None if teacher is None else Distiller(build(teacher, 0, config.device), DistillConfig(), config, context)
    )
    trainer = Trainer(model_config, config, batches, context, distiller=distiller)
    window = Window()

    def step(number: int) -> None:
        trainer.step(number, window)

    return step


def turns(steps: Mapping[str, Step], count: int, timing: Timing) -> dict[str, list[float]]:
    """Return each candidate's seconds a step, round by round: `count` steps a round, on the same batches for all."""
    calls = {name: functools.partial(_train, step) for name, step in steps.items()}
    times = harness.in_turns(calls, _numbers(count), timing)
    return {name: [t / count for t in rounds] for name, rounds in times.items()}


def _train(step: Step, numbers: Iterable[int]) -> None:
    for number in numbers:
        step(number)


def _numbers(count: int) -> Callable[[int], range]:
    """Return what gives the numbers of a round's steps."""
    return lambda i: range(i * count, (i + 1) * count)


def side_by_side(
    models: Mapping[str, ModelConfig], config: TrainConfig, *, steps: int, rounds: int
) -> dict[str, list[float]]:
    """Return training tokens/s of each model, round by round, models taking turns.

    Args:
        config: batch, dtype and threads of all of them.
        steps: measured steps of a model in a round.
    """
    torch.set_num_threads(config.threads)
    made = {name: training_loop(model, config, model.context) for name, model in models.items()}
    times = turns(made, steps, Timing(rounds=rounds, device=config.device, warm_up=warm_up_rounds(steps)))
    return {name: [config.batch_size * models[name].context / t for t in times[name]] for name in models}


# -- processes of their own --------------------------------------------------------------------------------------------


_STEPS: list[Step] = []
"""In a candidate's own process: its step, once it is made."""


def _turn(make: Callable[[], Step], numbers: Sequence[int]) -> float:
    """In a candidate's own process: train the steps of those numbers and return the seconds of one."""
    if not _STEPS:
        process.keep_freed_memory()
        _STEPS.append(make())
    started = time.perf_counter()
    _train(_STEPS[0], numbers)
    return (time.perf_counter() - started) / len(numbers)


def apart(made: Mapping[str, Callable[[], Step]], count: int, threads: int, timing: Timing) -> dict[str, list[float]]:
    """Do what `turns` does, each candidate in a process of its own.

    Args:
        made: returns a candidate's step, in its process; must be picklable.

    Raises:
        ValueError: one line: a process failed.
    """
    with contextlib.ExitStack() as stack:
        ranks = {name: stack.enter_context(Ranks(1, threads=threads)) for name in made}

        def turn(name: str, numbers: Sequence[int]) -> float:
            try:
                (measured,) = ranks[name].run(_turn, made[name], numbers, timeout_s=TURN_S)
            except RankError as error:
                raise ValueError(f"bench train: {name}: {str(error).splitlines()[-1]}") from error
            return measured

        calls = {name: functools.partial(turn, name) for name in made}
        return harness.in_turns(calls, _numbers(count), timing, lambda call, numbers: call(numbers))


# -- the benchmarks ----------------------------------------------------------------------------------------------------


def twin(family: str, width: int) -> ModelConfig:
    """Return the twin of a family, `width` wide, with the paper's own numbers of experts, drop-free."""
    base = ModelConfig.parse(FAMILIES[family], routing=RoutingConfig(drop_tokens=False))
    return base.shrink(hidden=base.hidden / width, experts=1, vocab=inputs.VOCAB, context=inputs.CONTEXT)


def flops_per_token(family: str, width: int) -> float:
    """Return the FLOPs of a token's training step; of a teacher, the forward pass, a third of its step."""
    flops = twin(family, width).flops_per_token()
    return flops + twin(TEACHERS[family], width).flops_per_token() / 3 if family in TEACHERS else flops


def measure(
    width: int,
    *,
    families: Sequence[str],
    dtypes: Sequence[str],
    steps: int,
    threads: int,
    timing: Timing,
    sequences: int = SEQUENCES,
) -> list[Row]:
    """Return the rows of one width: times are those of a step, `tokens_per_s` is in the numbers.

    Args:
        sequences: of a step.
    """
    torch.set_num_threads(threads)
    T, device = inputs.CONTEXT, timing.device
    made: dict[str, Callable[[], Step]] = {}
    models: dict[str, tuple[str, ModelConfig, str]] = {}
    for family, dtype in itertools.product(families, dtypes):
        model = twin(family, width)
        config = TrainConfig(
            batch_size=sequences,
            dtype=dtype,  # type: ignore[arg-type]  # the class checks it
            threads=threads,
            device=device,  # type: ignore[arg-type]  # the class checks it
        )
        teacher = twin(TEACHERS[family], width) if family in TEACHERS else None
        ours = functools.partial(training_loop, model, config, T, teacher)
        candidates = {family: ours}
        if family == "dense":
            candidates[BARE] = functools.partial(bare_loop, model, config, T)
        if device == "cpu" and dtype == "fp32" and onednn_is_faster():
            candidates[f"{family}{DEFAULT}"] = functools.partial(_by_default_products, ours)
        for label, make in candidates.items():
            made[f"{label}, {dtype}"] = make
            models[f"{label}, {dtype}"] = (family, model, dtype)
    if own_processes := device == "cpu" and timing.clock == "wall":
        times = apart(made, steps, threads, timing)
    else:
        times = turns({name: make() for name, make in made.items()}, steps, timing)
    rates = {dtype: harness.product_rate(DTYPES[dtype], timing) for dtype in dtypes}
    flops = {name: sequences * T * flops_per_token(family, width) for name, (family, _, _) in models.items()}
    numbers = {
        name: {
            "family": family,
            "dtype": dtype,
            "parameters": model.parameters(),
            "tokens_per_s": sequences * T / statistics.median(times[name]),
            "product_flop_per_s": rates[dtype],
        }
        for name, (family, model, dtype) in models.items()
    }
    case = {"width": width, "sequences": sequences, "context": T, "steps": steps, "threads": threads}
    return harness.rows(
        {**case, "apart": own_processes},
        times,
        against=next(iter(times)),
        floor_s={name: flops[name] / rates[dtype] for name, (_, _, dtype) in models.items()},
        timing=timing,
        inputs=inputs.described(f"{sequences} x {T} tokens of {inputs.TEXT}"),
        numbers=numbers,
    )


def _by_default_products(make: Callable[[], Step]) -> Step:
    return default_products()(make())


def advice(measured: Sequence[Row]) -> list[str]:
    """Return a line for each width and family measured in both dtypes: speeds, their ratio, the dtype to use."""
    lines = []
    for row in measured:
        family, width = row.numbers["family"], row.case["width"]
        if row.candidate != f"{family}, fp32":
            continue
        other = next((r for r in measured if r.case["width"] == width and r.candidate == f"{family}, bf16"), None)
        if other is None:
            continue
        ratios = [a / b for a, b in zip(row.rounds_ms, other.rounds_ms, strict=True)]
        low, high = min(ratios), max(ratios)
        use = "use bf16" if low > 1 else "use fp32" if high < 1 else "equal within the spread: use fp32"
        speeds = [f"{r.numbers['tokens_per_s'] / 1e3:.1f} k" for r in (row, other)]
        lines.append(
            f"{family}, {width} wide: fp32 {speeds[0]} tokens/s, bf16 {speeds[1]} "
            f"({statistics.median(ratios):.2f} times, {low:.2f} to {high:.2f}): {use}"
        )
    return lines


def check(widths: Sequence[int], families: Sequence[str], dtypes: Sequence[str], steps: int, sequences: int) -> None:
    """Raise ValueError for a family, dtype or width that there is not, no steps or no sequences."""
    for what, given, allowed in (("family", families, FAMILIES), ("dtype", dtypes, DTYPES)):
        if unknown := [name for name in given if name not in allowed]:
            raise ValueError(f"bench train: {what} must be one of {', '.join(allowed)}, got {unknown[0]!r}")
    if odd := [w for w in widths if not 16 <= w <= 1024 or w % 16]:
        raise ValueError(f"bench train: width must be a multiple of 16 up to 1024, got {odd[0]}")
    for what, number in (("steps", steps), ("sequences", sequences)):
        if number < 1:
            raise ValueError(f"bench train: {what} must be at least 1, got {number}")


def main(
    *,
    widths: Sequence[int],
    families: Sequence[str],
    dtypes: Sequence[str],
    steps: int,
    threads: int,
    timing: Timing,
    out: Path | None,
    sequences: int = SEQUENCES,
) -> None:
    """Measure and print; with `out` (a folder), write the rows after each width, and a figure.

    Raises:
        ValueError: a setting that there is not, or that does not go with another one; a process died.
    """
    timing.check_threads(threads)
    check(widths, families, dtypes, steps, sequences)
    measured: list[Row] = []
    said = f"{sequences} x {inputs.CONTEXT} tokens a step, {steps} steps a round"
    for width in terminal.announced(widths, lambda width: f"training {width} wide: {', '.join(families)}"):
        case = measure(
            width,
            families=families,
            dtypes=dtypes,
            steps=steps,
            threads=threads,
            timing=timing,
            sequences=sequences,
        )
        harness.show(f"training, {width} wide, {said}", case, COLUMNS)
        measured += case
        if out is not None:
            objects = harness.write(measured, out / "train.jsonl")
    for line in advice(measured):
        terminal.console().print(line, highlight=False)
    if out is not None and benchmarks.possible():
        benchmarks.save(drawn(objects), out / "train")


COLUMNS: dict[str, Callable[[Row], str]] = {
    "tokens/s": lambda row: f"{row.numbers['tokens_per_s']:,.0f}",
    "parameters": lambda row: f"{row.numbers['parameters'] / 1e6:.1f} M",
}


def drawn(objects: Sequence[Mapping[str, Any]]) -> Figure:
    """Return the figure of rows as read from `train.jsonl`, a panel for each dtype.

    Those of PyTorch's products and of students with a teacher are left out.
    """
    shown = [row for row in objects if DEFAULT not in row["candidate"] and row["family"] not in TEACHERS]
    against = objects[0]["against"]
    first = against.rpartition(", ")[2]  # a dtype
    said = [name for name in dict.fromkeys(row["candidate"] for row in shown) if name.startswith("MoE")]
    ratios = [f"{name} {harness.span(shown, name)} times" for name in said if name.endswith(first)]
    title = ": ".join([f"Time of a training step over {against}", *filter(None, [", ".join(ratios)])])
    families = [
        row if row["candidate"] == against else {**row, "candidate": row["candidate"].rpartition(", ")[0]}
        for row in shown
    ]
    return benchmarks.ratios(families, title=title, x="width", xlabel="hidden size", panel="dtype")
