"""Count and time the flat, the hierarchical and the coordinated all-to-all (paper section 5.3, Figs 8 and 9).

Shows: messages and bytes of one all-to-all on 4 to 256 ranks, counted while the engine runs, beside the formulas; time
of a layer's exchange on ranks of this machine over message sizes; the same on the simulated cluster.

Here: the ranks of large worlds are threads that run the real exchange (`moelab.engine.threads`), so counts are exact
but times have no meaning. Times come from gloo processes on one machine, which has no slow links, or, at scale paper,
from `srun moelab bench exchange` on the cluster. One GPU alone has no other rank to send to, so there is no scale gpu.

Expect: counts equal to the formulas; hierarchical slower than flat on few ranks and large messages; coordinated faster
where tensor ranks share tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from moelab import paper
from moelab.design.experiment import Experiment, Measure, Scale, at_least_one
from moelab.design.judging import judge
from moelab.design.verdicts import Verdict
from moelab.experiments.decoding import check_file
from moelab.lazy import pd

WORLDS = {"smoke": (4, 8, 32, 128), "cpu": (4, 8, 16, 32, 64, 128, 256), "paper": (4, 8, 16, 32, 64, 128, 256)}
MEASURED: dict[str, tuple[tuple[int, ...], tuple[int, ...], int]] = {
    "smoke": ((4,), (1 << 10, 1 << 14), 2),
    "cpu": ((4, 8, 16), (1 << 10, 1 << 14, 1 << 18, 1 << 22), 7),
}
"""Scale -> ranks, bytes of tokens a rank, rounds."""

CASE = ("ranks", "bytes_per_rank")
"""What tells the measured times of a way apart."""

COUNTED = ("messages", "rows", "gathered_rows")
"""What is counted in the engine, and given by the formulas and the simulator too."""


def counts(worlds: Iterable[int]) -> list[dict[str, Any]]:
    """Count what the busiest rank sends in one all-to-all, for each number of ranks.

    Returns:
        Rows of ranks; way (flat, hierarchical or coordinated); messages, rows and gathered_rows (those of the
        all-gather after the way back), counted in the engine; moved_rows: rows, with those that a rank keeps for itself
        at each hop, as the paper counts bytes; formula_messages, …: the same by `moelab.simulate.all_to_alls.formula`;
        simulated_messages, …: the same by the simulator.
    """
    from moelab.engine.collectives import Sent
    from moelab.engine.threads import traffic
    from moelab.simulate import all_to_alls

    measured = []
    for ranks in worlds:
        for way, config in all_to_alls.layouts(ranks).items():
            sent = traffic(config, ranks)
            out = max((t.sent.get(("dispatch", "forward"), Sent()) for t in sent), key=lambda s: s.bytes)
            back = max(t.total("tensor").bytes for t in sent)
            rows = out.bytes // 4
            count = {"ranks": ranks, "way": way, "messages": out.messages, "rows": rows, "gathered_rows": back // 4}
            count["moved_rows"] = rows + all_to_alls.kept(way, ranks)
            for source, numbers in (
                ("formula", all_to_alls.formula(way, ranks)),
                ("simulated", all_to_alls.counts(config, ranks)),
            ):
                count |= {f"{source}_{what}": number for what, number in zip(COUNTED, numbers, strict=True)}
            measured.append(count)
    return measured


def measured_times(
    measure: Measure, scale: str, rounds: int | None = None, file: str | None = None
) -> list[dict[str, Any]]:
    """Return times on gloo ranks of this machine, or at scale paper those in `file`: rows of `moelab bench exchange`.

    Args:
        measure: `Lab.measure`, which stores what is measured here.
        rounds: by default the scale's own number.

    Raises:
        ValueError: there is no such file at scale paper; the message is one line.
    """
    if scale == "paper":
        from moelab.bench.harness import rows_of_ranks

        return rows_of_ranks(EXPERIMENT.name, file, "exchange", CASE)
    return measure(times, scale, rounds)


def times(scale: str, rounds: int | None) -> list[dict[str, Any]]:
    """Measure the times that `measured_times` returns, in this process."""
    from moelab.bench import exchange as bench
    from moelab.engine.testing import Ranks

    worlds, sizes, own = MEASURED[scale]
    measured = []
    for ranks in worlds:
        with Ranks(ranks) as pool:
            for size in sizes:
                measured += [row.json() for row in bench.measure(pool, size, rounds or own, "cpu")]
    return measured


def headline(counted: pd.DataFrame) -> str:
    """Return the messages of a rank in the largest world, and whether all counts agree, in one line; from `counts`."""
    same = all(
        (counted[what] == counted[f"{source}_{what}"]).all() for source in ("formula", "simulated") for what in COUNTED
    )
    ranks = counted["ranks"].max()
    at = counted[counted["ranks"] == ranks].set_index("way")["messages"]
    return (
        f"A rank of {ranks} sends {at['hierarchical']} messages hierarchically, {at['coordinated']} coordinated, "
        f"{at['flat']} flat; all counts {'equal' if same else 'DIFFER FROM'} the formulas and the simulator's"
    )


def simulated_headline(predicted: pd.DataFrame) -> str:
    """Return, from `ways.times`, the smallest exchange's times over flat's on the most GPUs, in one line."""
    size, ranks = predicted["bytes"].min(), predicted["ranks"].max()
    at = predicted[(predicted["bytes"] == size) & (predicted["ranks"] == ranks)].set_index("way")["ratio"]
    return (
        f"On {ranks} GPUs hierarchical takes {at['hierarchical']:.2f}, "
        f"coordinated {at['coordinated']:.2f} times flat's time (simulated)"
    )


def verdicts(counted: pd.DataFrame) -> list[Verdict]:
    """Judge the claims on messages and bytes exactly, from `counts`, at the worlds that they name (32, 128 ranks)."""
    at = counted.set_index(["ranks", "way"])
    hops = at["messages"][32, "hierarchical"] / at["messages"][32, "flat"]
    volume = at["moved_rows"][32, "hierarchical"] / at["moved_rows"][32, "flat"]
    leaving = at["rows"][32, "hierarchical"] / at["rows"][32, "flat"]
    # An all-to-all among n ranks has n - 1 messages of each rank.
    group = (at["messages"][128, "coordinated"] + 1) / (at["messages"][128, "flat"] + 1)
    measured = {
        "hierarchical-hops": (hops, "Counted in the engine on 4 nodes of 8."),
        "hierarchical-volume": (
            volume,
            f"Counted on 4 nodes of 8, a rank's own rows included; {leaving:.2f} times the bytes leave the rank.",
        ),
        "pcc-hops": (group, "Counted in the engine on 128 ranks, tensor slicing 8."),
    }
    return [
        judge(c, [float(measured[c.id][0])], exact=True, note=measured[c.id][1]) for c in paper.claims("all-to-all")
    ]


def check(parameters: Mapping[str, Any]) -> None:
    """Refuse a number of rounds below 1, and the scale paper without a file of times; ValueError, one line."""
    at_least_one("all-to-all", ["rounds"], parameters)
    check_file("all-to-all", "exchange", CASE, parameters)


EXPERIMENT = Experiment(
    name="all-to-all",
    number=9,
    title="Hierarchical and coordinated all-to-all",
    paper="Figs 8 and 9 (section 5.3)",
    question="How many messages and bytes do the hierarchical and the coordinated all-to-all send, and does it pay?",
    paper_answer="O(G + p/G) messages instead of O(p), for twice the bytes; at 8-way tensor slicing 16 C1 + C2 instead "
    "of 128 C1 + C2.",
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
    check=check,
    measures=True,
)
