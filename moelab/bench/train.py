"""`moelab bench train`: what a step of training costs, side by side in one process.

Two ratios: the MoE twin's tokens/s over its dense base's (both through the training loop), and the dense twin through the training
loop over the same model in a bare, hand-written PyTorch loop. Models take turns; a ratio is taken round by round and its median
and range printed. The floor is the time of the model's FLOPs at the matrix-product rate measured in the same run.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelab.config import ModelConfig, RoutingConfig, TrainConfig
from moelab.files import write_text
from moelab.training.loop import Trainer, Window


class RandomBatches:
    """Batches of random tokens: a function of the step, like the real ones."""

    def __init__(self, config: TrainConfig, model: ModelConfig) -> None:
        generator = torch.Generator().manual_seed(0)
        self._tokens = torch.randint(model.vocab, (config.batch_size, model.context + 1), generator=generator)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        return self._tokens[:, :-1], self._tokens[:, 1:]


class BareGPT(nn.Module):
    """The dense decoder as one would write it in ten minutes; what the workbench's model is held against."""

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

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        B, T = tokens.shape
        x = self.wte(tokens) + self.wpe.weight[:T]
        for layer in self.layers:
            q, k, v = layer["qkv"](layer["ln1"](x)).chunk(3, dim=-1)
            q, k, v = (t.view(B, T, self.heads, -1).transpose(1, 2) for t in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + layer["proj"](y.transpose(1, 2).reshape(B, T, -1))
            x = x + layer["fc2"](F.gelu(layer["fc"](layer["ln2"](x)), approximate="tanh"))
        logits = F.linear(self.ln(x), self.wte.weight)
        return F.cross_entropy(logits.view(B * T, -1).float(), targets.reshape(-1))


def _bare(model_config: ModelConfig, config: TrainConfig) -> Callable[[], None]:
    torch.manual_seed(0)
    model = BareGPT(model_config)
    nn.init.normal_(model.wte.weight, 0.0, 0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=config.betas, weight_decay=0.1, fused=True)
    batches = RandomBatches(config, model_config)

    def step() -> None:
        tokens, targets = batches.batch(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=config.dtype == "bf16"):
            loss = model(tokens, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _ours(model_config: ModelConfig, config: TrainConfig) -> Callable[[], None]:
    trainer = Trainer(model_config, config, RandomBatches(config, model_config), model_config.context)
    steps, window = itertools.count(), Window()

    def step() -> None:
        trainer.step(next(steps), window)

    return step


def _gemm_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product on this machine at the current number of threads."""
    n = 2048
    a, b = torch.randn(n, n, dtype=dtype), torch.randn(n, n, dtype=dtype)
    times = []
    for _ in range(5):
        started = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - started)
    return 2 * n**3 / statistics.median(times)


def side_by_side(
    models: dict[str, ModelConfig], config: TrainConfig, *, steps: int, rounds: int
) -> dict[str, list[float]]:
    """Training tokens/s of each model, round by round: models take turns, so that other load of the machine meets all.

    Args:
        config: batch, dtype and threads of all of them.
        steps: measured steps of a model in a round, after three to warm up.
    """
    torch.set_num_threads(config.threads)
    calls = {name: _ours(model, config) for name, model in models.items()}
    for call in calls.values():
        for _ in range(3):
            call()
    speeds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            for _ in range(steps):
                call()
            tokens = steps * config.batch_size * models[name].context
            speeds[name].append(tokens / (time.perf_counter() - started))
    return speeds


def measure(*, steps: int, rounds: int, threads: int, dtype: str) -> list[dict[str, Any]]:
    """One row per model: tokens/s of each round, the ratio to what it is held against, and the floor."""
    torch.set_num_threads(threads)
    config = TrainConfig(dtype=dtype, threads=threads)
    drop_free = RoutingConfig(drop_tokens=False)
    dense = ModelConfig.parse("350M twin")
    models = {
        "dense twin, bare loop": (dense, _bare, None),
        "dense twin": (dense, _ours, "dense twin, bare loop"),
        "MoE twin, 16 experts": (ModelConfig.parse("350M+MoE-128 twin", routing=drop_free), _ours, "dense twin"),
        "PR-MoE twin, 4 and 8 experts": (
            ModelConfig.parse("350M+PR-MoE-32/64 twin", routing=drop_free),
            _ours,
            "dense twin",
        ),
    }
    calls = {name: make(model, config) for name, (model, make, _) in models.items()}
    tokens = steps * config.batch_size * dense.context
    speeds: dict[str, list[float]] = {name: [] for name in models}
    for call in calls.values():
        for _ in range(3):
            call()
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            for _ in range(steps):
                call()
            speeds[name].append(tokens / (time.perf_counter() - started))
    rate = _gemm_rate(torch.bfloat16 if dtype == "bf16" else torch.float32)
    rows = []
    for name, (model, _, against) in models.items():
        ratios = [a / b for a, b in zip(speeds[name], speeds[against], strict=True)] if against else []
        rows.append(
            {
                "model": name,
                "tokens_per_s": statistics.median(speeds[name]),
                "rounds": speeds[name],
                "against": against,
                "ratio": statistics.median(ratios) if ratios else None,
                "ratio_low": min(ratios, default=None),
                "ratio_high": max(ratios, default=None),
                "share_of_floor": statistics.median(speeds[name]) * model.flops_per_token() / rate,
                "gemm_flop_per_s": rate,
                "threads": threads,
                "dtype": dtype,
            }
        )
    return rows


def main(*, steps: int, rounds: int, threads: int, dtype: str, out: Path | None) -> None:
    """Measure, print, and write `train.jsonl` into `out` if given."""
    import json

    from moelab import terminal

    if dtype not in ("fp32", "bf16"):
        raise ValueError(f"bench train: dtype must be fp32 or bf16, got {dtype!r}")
    rows = measure(steps=steps, rounds=rounds, threads=threads, dtype=dtype)
    title = f"training, {dtype}, {threads} thread{'s' if threads > 1 else ''}, {rounds} rounds of {steps} steps"
    view = terminal.table("model", "tokens/s (median)", "ratio (median, range)", "against", "of the floor", title=title)
    for row in rows:
        ratio = f"{row['ratio']:.2f} ({row['ratio_low']:.2f} to {row['ratio_high']:.2f})" if row["ratio"] else ""
        view.add_row(
            row["model"], f"{row['tokens_per_s']:,.0f}", ratio, row["against"] or "", f"{row['share_of_floor']:.0%}"
        )
    console = terminal.console()
    console.print(view)
    console.print(
        f"floor: the model's FLOPs at {rows[0]['gemm_flop_per_s'] / 1e9:.0f} GFLOP/s, measured on a 2048^3 product"
    )
    if out is not None:
        path = out / "train.jsonl"
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        console.print(f"written to {path}")
