"""Turn what `moelab.simulate` predicts into frames for notebooks and the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from moelab.simulate.bars import Bar
    from moelab.simulate.search import Plan


def bar_frame(bars: Sequence[Bar]) -> pd.DataFrame:
    """Return a row for each bar of a figure: the columns of `Bar.row`, and simulated_throughput in tokens / s / GPU."""
    import pandas as pd

    from moelab.simulate.bars import BATCH

    frame = pd.DataFrame([bar.row() for bar in bars])
    tokens = [BATCH / bar.parallel.tensor for bar in bars]  # of a step, a GPU
    return frame.assign(simulated_throughput=tokens / frame["simulated_ms"] * 1e3)


def front(plan: Plan) -> pd.DataFrame:
    """Return the Pareto front of a search: columns latency_ms, tokens_per_s_per_gpu, label, the fastest layout first."""
    import pandas as pd

    rows = [
        {
            "latency_ms": e.latency_ms,
            "tokens_per_s_per_gpu": e.tokens_per_s_per_gpu,
            "label": f"{e.parallel.ranks} GPUs, tensor {e.parallel.tensor}, batch {e.batch}",
        }
        for e in plan.front
    ]
    return pd.DataFrame(rows)


def front_headline(plan: Plan, gpus: int) -> str:
    """Return what the Pareto front shows, in one line."""
    fastest, most = plan.front[0], plan.front[-1]
    return (
        f"{plan.best.model} on up to {gpus} GPUs of {plan.best.cluster}: {fastest.latency_ms:.1f} ms a token at best, "
        f"{most.tokens_per_s_per_gpu:,.0f} tokens/s/GPU at most, at {most.latency_ms:.0f} ms ({plan.best.system}, simulated)"
    )
