"""`moelab bench train`: what a step of training costs, dense and MoE, fp32 and bf16, side by side.

Twins of the 350M models with the paper's own numbers of experts (`shrink(experts=1)`) take turns in the training loop
on batches of text, one family after the other; the dense one runs beside the same model in a bare, hand-written
PyTorch loop. Ratios are to the dense twin in fp32, round by round. The floor is the time of the model's FLOPs at the
rate of a large matrix product in the row's dtype. A student learns from a teacher of random weights, whose forward pass
belongs to its FLOPs. Where training computes fp32 products by another library than PyTorch does by default
(`moelab.models.products`), each family takes part a second time with PyTorch's. All share a process, or each has its
own (`moelab.bench.apart`). At the end: the dtype to use on this machine for each family.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelab import terminal
from moelab.bench import apart as processes
from moelab.bench import harness, inputs, plot
from moelab.bench.harness import Row, Timing
from moelab.config import ModelConfig, RoutingConfig, TrainConfig
from moelab.config.distill import DistillConfig
from moelab.inference.text import DTYPES
from moelab.models import build
from moelab.models.products import default_products, onednn_is_faster
from moelab.training.distill import Distiller
from moelab.training.loop import Trainer, Window

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
Step = Callable[[int], None]
"""One optimizer step on the batch of that number."""


class BareGPT(nn.Module):
    """The dense decoder as one writes it in ten minutes; our model is held against it."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        self.heads = c.heads
        self.wte, self.wpe = nn.Embedding(c.vocab, c.hidden), nn.Embedding(c.context, c.hidden)
        M = c.hidden
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "ln1": nn.LayerNorm(M),
                    "qkv": nn.Linear(M, 3 * M),
                    "proj": nn.Linear(M, M),
                    "ln2": nn.LayerNorm(M),
                    "fc": nn.Linear(M, 4 * M),
                    "fc2": nn.Linear(4 * M, M),
                }
            )
            for _ in range(c.layers)
        )
        self.ln = nn.LayerNorm(M)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the loss."""
        B, T = tokens_BT.shape
        x = self.wte(tokens_BT) + self.wpe.weight[:T]
        for layer in self.layers:
            q, k, v = layer["qkv"](layer["ln1"](x)).chunk(3, dim=-1)
            q, k, v = (t.view(B, T, self.heads, -1).transpose(1, 2) for t in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + layer["proj"](y.transpose(1, 2).reshape(B, T, -1))
            x = x + layer["fc2"](F.gelu(layer["fc"](layer["ln2"](x)), approximate="tanh"))
        logits = F.linear(self.ln(x), self.wte.weight)
        return F.cross_entropy(logits.view(B * T, -1).float(), targets_BT.reshape(-1))


def bare_loop(model_config: ModelConfig, config: TrainConfig, context: int) -> Step:
    """Return the step of a hand-written loop around `BareGPT`."""
    torch.manual_seed(0)
    model = BareGPT(model_config)
    nn.init.normal_(model.wte.weight, 0.0, 0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=config.betas, weight_decay=0.1, fused=True)
    batches = inputs.TextBatches(config.batch_size, context, model_config.vocab)

    def step(number: int) -> None:
        tokens_BT, targets_BT = batches.batch(number)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.dtype == "bf16"):
            loss = model(tokens_BT, targets_BT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def training_loop(
    model_config: ModelConfig, config: TrainConfig, context: int, teacher: ModelConfig | None = None
) -> Step:
    """Return the step of moelab's own training loop; with a teacher, of random weights, that of a student."""
    batches = inputs.TextBatches(config.batch_size, context, model_config.vocab)
    distiller = None if teacher is None else Distiller(build(teacher, 0), DistillConfig(), config, context)
    trainer = Trainer(model_config, config, batches, context, distiller=distiller)
    window = Window()

    def step(number: int) -> None:
        trainer.step(number, window)

    return step


def turns(steps: Mapping[str, Step], count: int, timing: Timing) -> dict[str, list[float]]:
    """Return each candidate's seconds a step, round by round: `count` steps a round, on the same batches for all."""

    def run(step: Step) -> Callable[[Iterable[int]], None]:
        def steps_of_round(numbers: Iterable[int]) -> None:
            for number in numbers:
                step(number)

        return steps_of_round

    times = harness.in_turns(
        {name: run(step) for name, step in steps.items()}, lambda i: range(i * count, (i + 1) * count), timing
    )
    return {name: [t / count for t in rounds] for name, rounds in times.items()}


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
    times = turns(made, steps, Timing(rounds=rounds, warm_up=1))
    return {name: [config.batch_size * models[name].context / t for t in times[name]] for name in models}


def twin(family: str, width: int) -> ModelConfig:
    """Return the twin of a family, `width` wide, with the paper's own numbers of experts, drop-free."""
    base = ModelConfig.parse(FAMILIES[family], routing=RoutingConfig(drop_tokens=False))
    return base.shrink(hidden=base.hidden // width, experts=1, vocab=inputs.VOCAB, context=inputs.CONTEXT)


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
    apart: bool = False,
) -> list[Row]:
    """Return the rows of one width: times are those of a step, `tokens_per_s` is in the numbers.

    Args:
        apart: give each candidate a process of its own.
    """
    torch.set_num_threads(threads)
    T = inputs.CONTEXT
    made: dict[str, Callable[[], Step]] = {}
    models: dict[str, tuple[str, ModelConfig, str]] = {}
    for family, dtype in itertools.product(families, dtypes):
        model, config = twin(family, width), TrainConfig(batch_size=SEQUENCES, dtype=dtype, threads=threads)
        teacher = twin(TEACHERS[family], width) if family in TEACHERS else None
        ours = functools.partial(training_loop, model, config, T, teacher)
        candidates = {family: ours} | (
            {BARE: functools.partial(bare_loop, model, config, T)} if family == "dense" else {}
        )
        if dtype == "fp32" and onednn_is_faster():
            candidates[f"{family}{DEFAULT}"] = functools.partial(_by_default_products, ours)
        for label, make in candidates.items():
            made[f"{label}, {dtype}"] = make
            models[f"{label}, {dtype}"] = (family, model, dtype)
    with contextlib.ExitStack() as stack:
        if apart:
            steps_of = {
                name: stack.enter_context(processes.training(name, make, threads)).step for name, make in made.items()
            }
        else:
            steps_of = {name: make() for name, make in made.items()}
        times = turns(steps_of, steps, timing)
    rates = {dtype: harness.product_rate(DTYPES[dtype], timing) for dtype in dtypes}
    flops = {name: SEQUENCES * T * flops_per_token(family, width) for name, (family, _, _) in models.items()}
    numbers = {
        name: {
            "family": family,
            "dtype": dtype,
            "parameters": model.parameters(),
            "tokens_per_s": SEQUENCES * T / statistics.median(times[name]),
            "product_flop_per_s": rates[dtype],
        }
        for name, (family, model, dtype) in models.items()
    }
    return harness.rows(
        {"width": width, "sequences": SEQUENCES, "context": T, "steps": steps, "threads": threads, "apart": apart},
        times,
        against=next(iter(times)),
        floor_s={name: flops[name] / rates[dtype] for name, (_, _, dtype) in models.items()},
        timing=timing,
        inputs=f"{SEQUENCES} x {T} tokens of {inputs.TEXT}",
        numbers=numbers,
    )


def _by_default_products(make: Callable[[], Step]) -> Step:
    return default_products()(make())


def advice(found: Sequence[Row]) -> list[str]:
    """Return a line for each width and family measured in both dtypes: speeds, their ratio, the dtype to use."""
    lines = []
    for row in found:
        family, width = row.numbers["family"], row.case["width"]
        if row.candidate != f"{family}, fp32":
            continue
        other = next((r for r in found if r.case["width"] == width and r.candidate == f"{family}, bf16"), None)
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


def check(command: str, widths: Sequence[int], families: Sequence[str], dtypes: Sequence[str], steps: int) -> None:
    """Raise ValueError, in the name of `command`, for a family, dtype or width that there is not, or no steps."""
    for what, given, allowed in (("family", families, FAMILIES), ("dtype", dtypes, DTYPES)):
        if unknown := [name for name in given if name not in allowed]:
            raise ValueError(f"{command}: {what} must be one of {', '.join(allowed)}, got {unknown[0]!r}")
    if odd := [w for w in widths if not 16 <= w <= 1024 or w % 16]:
        raise ValueError(f"{command}: width must be a multiple of 16 up to 1024, got {odd[0]}")
    if steps < 1:
        raise ValueError(f"{command}: steps must be at least 1, got {steps}")


def main(
    *,
    widths: Sequence[int],
    families: Sequence[str],
    dtypes: Sequence[str],
    steps: int,
    threads: int,
    timing: Timing,
    out: Path | None,
    apart: bool = False,
) -> None:
    """Measure, print and, with `out` (a folder), write `train.jsonl` and its figure, apart `train-apart`.

    Raises:
        ValueError: a family, dtype or width that there is not, or no steps.
    """
    timing.check_threads(threads)
    check("bench train", widths, families, dtypes, steps)
    if apart and timing.clock == "cpu":
        raise ValueError("bench train: processor time is that of one process; leave --apart or --cpu-time out")
    found: list[Row] = []
    for width in terminal.announced(
        widths, lambda width: f"training {width} wide: {', '.join(families)}; {', '.join(dtypes)}"
    ):
        shared = {"dtypes": dtypes, "steps": steps, "threads": threads, "timing": timing}
        case = measure(width, families=families, apart=apart, **shared)
        title = f"training, {width} wide, {SEQUENCES} x {inputs.CONTEXT} tokens a step, {steps} steps a round"
        columns = {
            "tokens/s": lambda row: f"{row.numbers['tokens_per_s']:,.0f}",
            "parameters": lambda row: f"{row.numbers['parameters'] / 1e6:.1f} M",
        }
        harness.show(title, case, columns)
        found += case
    console = terminal.console()
    for line in advice(found):
        console.print(line, highlight=False)
    if out is not None:
        name = "train-apart" if apart else "train"
        objects = harness.write(found, out / f"{name}.jsonl")
        plot.save(drawn(objects), out / name)


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
        row if row["candidate"] == against else row | {"candidate": row["candidate"].rpartition(", ")[0]}
        for row in shown
    ]
    return plot.ratios(families, title=title, x="width", xlabel="hidden size", panel="dtype")
