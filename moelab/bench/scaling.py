"""`moelab bench scaling`: weak scaling of training over gloo ranks of this machine, and where the time goes.

Every rank keeps the same number of tokens; P ranks do P times the work. Three ways take turns: one rank alone; P independent ranks at
once, which share the machine's memory and caches but no tokens (what the hardware allows); and P ranks training one model. The first ratio
is the usual efficiency, the second what the engine itself costs. Time inside communication calls is counted by kind on rank 0: it
includes waiting for slower ranks.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from moelab.bench.train import RandomBatches
from moelab.config import ModelConfig, RoutingConfig, TrainConfig
from moelab.config.parallel import ParallelConfig
from moelab.engine.collectives import Collective, observe
from moelab.engine.mesh import Mesh
from moelab.engine.testing import Ranks
from moelab.files import write_text
from moelab.training.loop import Trainer, Window


@contextlib.contextmanager
def _clock_calls() -> Iterator[dict[str, float]]:
    """Yield the seconds that this rank spends in collectives, by kind, while the context lasts."""
    seconds = {"exchange": 0.0, "gradients": 0.0, "agreement": 0.0}
    kinds = {"gradients": "gradients", "norm": "agreement", "metrics": "agreement"}

    @contextlib.contextmanager
    def clock(call: Collective) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds[kinds.get(call.kind, "exchange")] += time.perf_counter() - started

    with observe(clock):
        yield seconds


_TRAINERS: dict[tuple[str, int], tuple[Trainer, Iterator[int]]] = {}
"""On a rank: the trainers by model and number of ranks, kept between rounds."""


def _steps(name: str, layout: ParallelConfig, per_rank: int, steps: int) -> tuple[float, dict[str, float]]:
    """On a rank: seconds a step, and of it seconds in communication by kind."""
    key = (name, layout.ranks)
    if key not in _TRAINERS:
        model = ModelConfig.parse(name, routing=RoutingConfig(drop_tokens=False))
        config = TrainConfig(batch_size=per_rank * layout.data, micro_batch=per_rank)
        # Random tokens, this rank's part only.
        batches = RandomBatches(TrainConfig(batch_size=per_rank), model)
        mesh = Mesh(layout, model.experts)
        _TRAINERS[key] = (Trainer(model, config, batches, model.context, mesh), itertools.count())
    trainer, counter = _TRAINERS[key]
    window = Window()
    trainer.step(next(counter), window)
    with _clock_calls() as seconds:
        started = time.perf_counter()
        for _ in range(steps):
            trainer.step(next(counter), window)
        total = time.perf_counter() - started
    return total / steps, {kind: value / steps for kind, value in seconds.items()}


def measure(*, models: list[str], ranks: int, per_rank: int, steps: int, rounds: int) -> list[dict[str, Any]]:
    """One row a model: seconds a step of the three ways by round, efficiencies, and time by kind.

    Args:
        models: names that `ModelConfig.parse` understands.
        ranks: P.
        per_rank: sequences a rank and step.
        steps, rounds: measured steps of each way in a round; rounds.
    """
    times: dict[str, dict[str, list[float]]] = {m: {"alone": [], "independent": [], "together": []} for m in models}
    kinds: dict[str, list[dict[str, float]]] = {m: [] for m in models}
    with contextlib.ExitStack() as stack:
        together = stack.enter_context(Ranks(ranks))
        singles = [stack.enter_context(Ranks(1)) for _ in range(ranks)]
        pool = stack.enter_context(ThreadPoolExecutor(ranks))
        for measured in range(rounds + 1):
            for model in models:
                one = (_steps, model, ParallelConfig(), per_rank, steps)
                alone = singles[0].run(*one, timeout_s=600)[0][0]
                independent = max(r[0][0] for r in pool.map(lambda s, one=one: s.run(*one, timeout_s=600), singles))
                joint = together.run(_steps, model, ParallelConfig(data=ranks), per_rank, steps, timeout_s=600)
                if measured:  # the first round warms up
                    times[model]["alone"].append(alone)
                    times[model]["independent"].append(independent)
                    times[model]["together"].append(max(t for t, _ in joint))
                    kinds[model].append(joint[0][1])
    rows = []
    for model in models:
        t = times[model]
        seconds = {kind: statistics.median(k[kind] for k in kinds[model]) for kind in kinds[model][0]}
        seconds["computation"] = statistics.median(t["together"]) - sum(seconds.values())
        rows.append(
            {
                "model": model,
                "ranks": ranks,
                "sequences_per_rank": per_rank,
                "seconds_per_step": t,
                "efficiency": _ratio(t["alone"], t["together"]),
                "efficiency_over_independent": _ratio(t["independent"], t["together"]),
                "seconds_by_kind": seconds,
            }
        )
    return rows


def _ratio(over: list[float], under: list[float]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(over, under, strict=True)]
    return {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def main(*, models: list[str], ranks: int, per_rank: int, steps: int, rounds: int, out: Path | None) -> None:
    """Measure, print, and write `scaling.jsonl` into `out` if given."""
    from moelab import terminal

    for what, value in (("ranks", ranks), ("sequences", per_rank), ("steps", steps), ("rounds", rounds)):
        if value < (2 if what == "ranks" else 1):
            raise ValueError(f"bench scaling: --{what} must be at least {2 if what == 'ranks' else 1}, got {value}")
    for name in models:
        model = ModelConfig.parse(name)
        ParallelConfig(data=ranks).check(model.experts, heads=model.heads, ffn=model.ffn)
    rows = measure(models=models, ranks=ranks, per_rank=per_rank, steps=steps, rounds=rounds)
    title = (
        f"weak scaling 1 -> {ranks} ranks, 1 thread each, {per_rank} sequences a rank, {rounds} rounds of {steps} steps"
    )
    kinds = ("computation", "exchange", "gradients", "agreement")
    view = terminal.table("model", "alone, ms", "together, ms", "efficiency", "of independent", *kinds, title=title)
    for row in rows:
        t, e, i = row["seconds_per_step"], row["efficiency"], row["efficiency_over_independent"]
        total = sum(row["seconds_by_kind"].values())
        view.add_row(
            row["model"],
            f"{1e3 * statistics.median(t['alone']):.0f}",
            f"{1e3 * statistics.median(t['together']):.0f}",
            f"{e['median']:.0%} ({e['low']:.0%} to {e['high']:.0%})",
            f"{i['median']:.0%} ({i['low']:.0%} to {i['high']:.0%})",
            *(f"{row['seconds_by_kind'][kind] / total:.0%}" for kind in kinds),
        )
    console = terminal.console()
    console.print(view)
    if out is not None:
        path = out / "scaling.jsonl"
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        console.print(f"written to {path}")
