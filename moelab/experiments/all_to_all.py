"""Three ways for tokens to reach their experts: flat, hierarchical, coordinated with tensor slicing (paper section 5.3, Figs 8 and 9).

Shows: messages and bytes of one all-to-all on 4 to 256 ranks, counted while the engine runs, beside the formulas; time of a layer's exchange on ranks of
this machine over message sizes; the same on the simulated cluster.

Paper: hierarchical takes a rank's messages from O(p) to O(G + p/G) for twice the bytes; coordination (PCC) from 128 C1 + C2 to 16 C1 + C2 at 8-way tensor
slicing. No measurement.

Here: large worlds are threads that run the real exchange (`moelab.engine.threads`), so counts are exact and times mean nothing; times come from gloo
processes on one machine, which saves messages but has no slow links, or, at scale paper, from `srun moelab bench exchange` on the cluster. One GPU alone has
nobody to send to, so there is no scale gpu.

Expect: counts equal to the formulas; hierarchical slower than flat on few ranks and large messages; coordinated faster where tensor ranks share tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from moelab import paper
from moelab.config.parallel import ParallelConfig
from moelab.experiments.base import Experiment, Scale, no_runs
from moelab.experiments.measured import read
from moelab.experiments.verdicts import Verdict, judge

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from moelab.experiments.base import Measure

NODE = 8
"""G, GPUs of a node, and L, the tensor slicing of the coordinated way: the paper's."""
COLORS = {"flat": "#6E6E6E", "hierarchical": "#0072B2", "coordinated": "#D55E00"}
WORLDS = {"smoke": (4, 8, 32, 128), "cpu": (4, 8, 16, 32, 64, 128, 256), "paper": (4, 8, 16, 32, 64, 128, 256)}
MEASURED: dict[str, tuple[tuple[int, ...], tuple[int, ...], int]] = {
    "smoke": ((4,), (1 << 10, 1 << 14), 2),
    "cpu": ((4, 8, 16), (1 << 10, 1 << 14, 1 << 18, 1 << 22), 7),
}
"""scale -> ranks, bytes of tokens a rank, rounds."""


def layouts(ranks: int) -> dict[str, ParallelConfig]:
    """Way -> layout; one expert a rank."""
    tensor = min(NODE, ranks)
    return {
        "flat": ParallelConfig(data=ranks, gpus_per_node=NODE),
        "hierarchical": ParallelConfig(data=ranks, gpus_per_node=NODE, exchange="hierarchical"),
        "coordinated": ParallelConfig(tensor=tensor, data=ranks // tensor, gpus_per_node=NODE, exchange="coordinated"),
    }


def formula(way: str, ranks: int) -> tuple[int, int, int]:
    """(messages, rows, rows gathered after the way back) that a rank sends in one all-to-all, one row for every rank, after section 5.3.

    flat: p - 1 messages of a row. hierarchical: G - 1 messages of p / G rows, then p / G - 1 of G rows. coordinated: p / L - 1 messages of a row; later each of the L
    tensor ranks gives the others its p / L results.
    """
    G = min(NODE, ranks)
    nodes = ranks // G
    if way == "flat":
        return ranks - 1, ranks - 1, 0
    if way == "hierarchical":
        return G - 1 + nodes - 1, (G - 1) * nodes + (nodes - 1) * G, 0
    return nodes - 1, nodes - 1, (G - 1) * nodes


def counts(worlds: Iterable[int]) -> list[dict]:
    """What the busiest rank sends in one all-to-all: a row for each world and way.

    Fields: ranks, way; `messages`, `rows`, `gathered_rows` (of the all-gather after the way back) counted in the engine; the same with `formula_` and, from the
    simulator, `simulated_`; `moved_rows`: rows with those that a rank keeps for itself at each hop, as the paper counts bytes.
    """
    from moelab.engine.collectives import Sent
    from moelab.engine.threads import traffic

    found = []
    for ranks in worlds:
        for way, config in layouts(ranks).items():
            sent = traffic(config, ranks)
            out = max((t.sent.get(("dispatch", "forward"), Sent()) for t in sent), key=lambda s: s.bytes)
            back = max(t.total("tensor").bytes for t in sent)
            messages, rows = out.messages, out.bytes // 4
            own = _kept(way, ranks)
            expected = dict(zip(("messages", "rows", "gathered_rows"), formula(way, ranks), strict=True))
            simulated = _simulated_counts(config, ranks)
            found.append(
                {
                    "ranks": ranks,
                    "way": way,
                    "messages": messages,
                    "rows": rows,
                    "gathered_rows": back // 4,
                    "moved_rows": rows + own,
                    **{f"formula_{name}": value for name, value in expected.items()},
                    **{f"simulated_{name}": value for name, value in simulated.items()},
                }
            )
    return found


def _kept(way: str, ranks: int) -> int:
    """Rows that a rank keeps for itself: one of the p; hierarchical, p / G at the first hop and G at the second."""
    G = min(NODE, ranks)
    return {"flat": 1, "hierarchical": ranks // G + (G if ranks > G else 0), "coordinated": 1}[way]


def _stages(config: ParallelConfig, ranks: int) -> tuple[list, object]:
    import numpy as np

    from moelab.simulate.exchange import all_to_all, rows_to_send, share_gather
    from moelab.simulate.layouts import ExpertLayouts, Layouts

    layouts_ = Layouts.of([config])
    spread = ExpertLayouts.of(layouts_, ranks)
    rows = rows_to_send(spread, np.array([ranks]), 1, 0)
    return all_to_all(layouts_, spread, rows, config.ranks_per_node), share_gather(spread, rows)


def _simulated_counts(config: ParallelConfig, ranks: int) -> dict[str, int]:
    stages, gather = _stages(config, ranks)

    def total(parts: Sequence, *names: str) -> int:
        return round(sum(float(getattr(part, name)[0]) for part in parts for name in names))

    return {
        "messages": total(stages, "near_messages", "far_messages"),
        "rows": total(stages, "near_rows", "far_rows"),
        "gathered_rows": total([gather], "near_rows", "far_rows"),
    }


def measured(measure: Measure, scale: str, rounds: int = 0, file: str = "") -> list[dict]:
    """Times on gloo ranks of this machine, or at scale paper those in `file`: rows of `moelab bench exchange`.

    Args:
        measure: `Lab.measure`, which stores what is measured here.
        rounds: 0 is the scale's own.

    Raises:
        ValueError: one line: no such file at scale paper.
    """
    if scale == "paper":
        return read(EXPERIMENT.name, file, "exchange")
    return measure(times, scale, rounds)


def times(scale: str, rounds: int) -> list[dict]:
    """The measurement of `measured`, here and now."""
    from moelab.bench import exchange as bench
    from moelab.engine.testing import Ranks

    worlds, sizes, own = MEASURED[scale]
    found = []
    for ranks in worlds:
        with Ranks(ranks) as pool:
            for size in sizes:
                found += bench.measure(pool, size, rounds or own, "cpu")
    return found


def simulated(
    worlds: Iterable[int] = (8, 16, 32, 64, 128, 256),
    sizes: Iterable[int] = (1 << 14, 1 << 18, 1 << 22),
    cluster: str = "a100-40gb",
) -> pd.DataFrame:
    """Microseconds of dispatch, combine and the gather after it on the simulated cluster: columns ranks, bytes, way, us, ratio (over flat).

    Args:
        sizes: bytes of tokens that each rank holds, an equal part of them for every rank.
    """
    import pandas as pd

    from moelab import simulate

    machine, constants = simulate.cluster(cluster), simulate.fitted()
    found = []
    for ranks in worlds:
        for size in sizes:
            flat = 0.0
            for way, config in layouts(ranks).items():
                stages, gather = _stages(config, ranks)
                each = [float(s.microseconds(size / ranks, machine, constants)[0]) for s in (*stages, *stages, gather)]
                flat = sum(each) if way == "flat" else flat
                found.append({"ranks": ranks, "bytes": size, "way": way, "us": sum(each), "ratio": sum(each) / flat})
    return pd.DataFrame(found)


def verdicts(counted: pd.DataFrame) -> list[Verdict]:
    """The claims on messages and bytes, from `counts`: exact, at the worlds that the claims name (32 and 128 ranks)."""
    at = counted.set_index(["ranks", "way"])
    hops = at["messages"][32, "hierarchical"] / at["messages"][32, "flat"]
    volume = at["moved_rows"][32, "hierarchical"] / at["moved_rows"][32, "flat"]
    leaving = at["rows"][32, "hierarchical"] / at["rows"][32, "flat"]
    # A rank's all-to-all has one rank more than it sends messages.
    group = (at["messages"][128, "coordinated"] + 1) / (at["messages"][128, "flat"] + 1)
    found = {
        "hierarchical-hops": (hops, "Counted in the engine on 4 nodes of 8."),
        "hierarchical-volume": (
            volume,
            f"Counted on 4 nodes of 8, a rank's own rows included; {leaving:.2f} times the bytes leave the rank.",
        ),
        "pcc-hops": (group, "Counted in the engine on 128 ranks, tensor slicing 8."),
    }
    return [judge(c, [float(found[c.id][0])], exact=True, note=found[c.id][1]) for c in paper.claims("exchange")]


def draw_counts(counted: pd.DataFrame, left: Axes, right: Axes) -> None:
    """Messages over ranks, and rows over flat's: formulas as lines, counts as dots."""
    worlds = sorted(counted["ranks"].unique())
    flat = counted[counted["way"] == "flat"].set_index("ranks")
    for way, color in COLORS.items():
        there = counted[counted["way"] == way].set_index("ranks")
        there = there[there["messages"] > 0]
        left.plot(there.index, there["formula_messages"], color=color, label=f"{way}, the paper's formula")
        left.plot(there.index, there["messages"], "o", color=color, label=f"{way}, counted")
        out = (there["rows"] + there["gathered_rows"]) / flat["rows"]
        expected = (there["formula_rows"] + there["formula_gathered_rows"]) / flat["formula_rows"]
        right.plot(there.index, expected[there.index], color=color)
        right.plot(there.index, out[there.index], "o", color=color)
    left.set(yscale="log", ylabel="messages a rank")
    right.set(ylabel="rows that leave a rank, over flat", ylim=(0, 2.1))
    left.yaxis.set_major_formatter("{x:g}")
    for ax in (left, right):
        ax.set(xscale="log", xlabel="ranks")
        ax.set_xticks(worlds, [str(p) for p in worlds])
        ax.minorticks_off()
    left.legend()


def draw_simulated(predicted: pd.DataFrame, axes: Sequence[Axes]) -> None:
    """Time over flat's over ranks, a panel for each size."""
    for ax, (size, part) in zip(axes, predicted.groupby("bytes"), strict=True):
        for way, color in COLORS.items():
            there = part[part["way"] == way]
            ax.plot(there["ranks"], there["ratio"], "o-", color=color, label=way)
        ax.set(xscale="log", xlabel="GPUs", title=f"{size // 1024} KiB a GPU", ylim=(0, None))
        ax.set_xticks(sorted(part["ranks"].unique()), [str(p) for p in sorted(part["ranks"].unique())])
        ax.minorticks_off()
    axes[0].set_ylabel("time / flat, simulated")
    axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))


EXPERIMENT = Experiment(
    name="all-to-all",
    title="Hierarchical and coordinated all-to-all",
    paper="Figs 8 and 9 (section 5.3)",
    question="How many messages and bytes do the hierarchical and the coordinated all-to-all send, and does it pay?",
    paper_answer="O(G + p/G) messages instead of O(p), for twice the bytes; at 8-way tensor slicing 16 C1 + C2 instead of 128 C1 + C2.",
    notebook="09_all_to_all.ipynb",
    scales={
        "smoke": Scale("counts to 128 ranks; 4 gloo ranks", "seconds (tests)"),
        "cpu": Scale(
            "counts to 256 ranks; 4, 8 and 16 gloo ranks; simulated cluster", "about a minute on two cores (estimated)"
        ),
        "paper": Scale(
            "counts to 256 ranks; the cluster's GPUs as `srun moelab bench exchange` measured them; simulated cluster",
            "not yet run; 16 to 256 A100",
        ),
    },
    specs=no_runs,
    trains=False,
    measures=True,
)
