"""Time the kernels around the experts: fused gate and table-driven copies against masks and einsum (paper section 5.4).

Shows: latency of gate, dispatch and combine at inference, part by part, of ours and of the paper's PyTorch baseline,
over tokens and experts; the gate in training; whole MoE layers of both against the dense layer of equal FLOPs.

Here: both forms take turns in one process; a ratio is taken within a round. The parts are timed in sessions, each a new
process; the verdict is over sessions, because the rounds of one share its memory. A CPU has no kernels to launch. Its
results therefore show only which form is faster, and how the difference grows with tokens: masks cost S E C M
operations, copies S M.

Expect: little difference at the 8 tokens of a decoding step, tens of times at hundreds of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from moelab import paper
from moelab.design.experiment import Experiment, Scale, at_least_one
from moelab.design.judging import judge, judge_timing
from moelab.design.verdicts import Verdict
from moelab.lazy import pd


@dataclass(frozen=True)
class Shapes:
    """Hold the shapes that are measured at a scale.

    Attributes:
        device: "cpu" or "cuda".
        tokens: S at inference; the first is a decoding step.
        experts: E everywhere; the last is the paper's where possible.
        hidden: M around the parts.
        train_tokens: S of the gate in training.
        layer: M, F and S in training of a whole layer.
        calls: calls of a part in a row.
        rounds: default number of turns.
        sessions: processes that time the parts, one after the other.
    """

    device: str
    tokens: tuple[int, ...]
    experts: tuple[int, ...]
    hidden: int
    train_tokens: int
    layer: tuple[int, int, int]
    calls: int
    rounds: int
    sessions: int


CLAIM = paper.claim("kernels-6x")
SHAPES = {
    "smoke": Shapes("cpu", (8, 64), (4, 16), 32, 256, (32, 64, 64), 5, 3, 2),
    "cpu": Shapes("cpu", (8, 64, 512), (8, 32, 128), 512, 2048, (256, 1024, 1024), 10, 9, 5),
    "gpu": Shapes("cuda", (8, 64, 512), (8, 32, 128), 2048, 8192, (1024, 4096, 4096), 20, 15, 5),
}
SHAPES["paper"] = SHAPES["gpu"]
_SESSION_S = 3600.0  # time limit of a session


def parts(scale: str, rounds: int | None = None, threads: int = 1) -> list[dict[str, Any]]:
    """Measure gate, dispatch and combine at inference: a row for each session, shape, part, candidate and round.

    See `moelab.bench.gate.measure_parts`.

    Args:
        rounds: of a session; by default the scale's own number.
        threads: of the processor.
    """
    from moelab.bench import inputs
    from moelab.engine.testing import run_on_ranks

    inputs.text()  # once, before the sessions ask for it
    measured = []
    for session in range(SHAPES[scale].sessions):
        (rows,) = run_on_ranks(1, _session, scale, rounds, threads, timeout_s=_SESSION_S)
        measured += [{"session": session, **row} for row in rows]
    return measured


def _session(scale: str, rounds: int | None, threads: int) -> list[dict[str, Any]]:
    """Return the rows of one session, measured in this process."""
    from moelab.bench.gate import measure_parts
    from moelab.bench.harness import Timing, torch_threads

    s = SHAPES[scale]
    cases = [(tokens, experts) for tokens in s.tokens for experts in s.experts]
    timing = Timing(rounds or s.rounds, s.device, rough=scale == "smoke")
    with torch_threads(threads):
        return [row for S, E in cases for row in measure_parts(S, s.hidden, E, timing, calls=s.calls)]


def training_gate(scale: str, rounds: int | None = None, threads: int = 1) -> list[dict[str, Any]]:
    """Measure the gate, forward and backward; return rows of `moelab bench gate`. Arguments as of `parts`."""
    from moelab.bench.gate import measure
    from moelab.bench.harness import Timing, torch_threads

    s = SHAPES[scale]
    timing = Timing(rounds or s.rounds, s.device, rough=scale == "smoke")
    with torch_threads(threads):
        return [row.json() for E in s.experts for row in measure(s.train_tokens, E, timing)]


def layers(scale: str, rounds: int | None = None, threads: int = 1) -> list[dict[str, Any]]:
    """Measure whole layers; return rows of `moelab bench layer`, with a column `case`.

    The cases are inference at the first two numbers of tokens (forward) and training (forward and backward). Arguments
    as of `parts`.
    """
    from moelab.bench.harness import Timing, torch_threads
    from moelab.bench.layer import DROP_FREE, EINSUM, LayerSize, measure

    s = SHAPES[scale]
    M, F, S = s.layer
    timing = Timing(rounds or s.rounds, s.device, rough=scale == "smoke")
    cases = [(f"inference, {tokens} tokens", tokens, False) for tokens in s.tokens[:2]]
    with torch_threads(threads):
        return [
            row.json() | {"case": case}
            for case, tokens, backward in [*cases, (f"training, {S} tokens", S, True)]
            for E in s.experts
            for row in measure(LayerSize(tokens, M, F, E), timing, backward=backward, only=(DROP_FREE, EINSUM))
        ]


def speedups(measured: pd.DataFrame) -> pd.DataFrame:
    """Return, from `parts`, columns session, tokens, experts, part, round, and ratio: the baseline's time over ours."""
    from moelab.bench.gate import BASELINE, OURS

    keys = ["session", "tokens", "experts", "part", "round"]
    ms = measured.pivot(index=keys, columns="candidate", values="ms")
    return (ms[BASELINE] / ms[OURS]).rename("ratio").reset_index()


def breakdown(measured: pd.DataFrame) -> pd.DataFrame:
    """Return median milliseconds, from `parts`: a row for each shape and candidate, a column for each part."""
    from moelab.bench.gate import PARTS

    table = measured.groupby(["tokens", "experts", "candidate", "part"])["ms"].median().unstack()
    return table[list(PARTS)]


def work(scale: str) -> float:
    """Return the multiply-adds of the baseline's dispatch einsum over the numbers that a copy by table moves."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from moelab.models.baseline import einsum_dispatch

    s = SHAPES[scale]
    S, E, M = s.tokens[-1], s.experts[-1], s.hidden
    slots = -(-S // E)
    with FlopCounterMode(display=False) as counter:
        einsum_dispatch(torch.zeros(S, M), torch.zeros(S, E, slots))
    return counter.get_total_flops() / 2 / (S * M)


def whole(ratios: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `speedups` for gate, dispatch and combine together."""
    return ratios[ratios["part"] == "all three"]


def of_sessions(ratios: pd.DataFrame) -> pd.DataFrame:
    """Return, from `speedups`, the median of each session's rounds for all three parts together.

    Columns: tokens, experts, session, ratio.
    """
    return whole(ratios).groupby(["tokens", "experts", "session"])["ratio"].median().reset_index()


def headline(ratios: pd.DataFrame) -> str:
    """Return the result in one line, from `speedups`."""
    medians = whole(ratios).groupby(["tokens", "experts"])["ratio"].median()
    return (
        f"Masks and einsum take {medians.min():.2g} to {medians.max():.2g} times as long as ours "
        f"at inference (least at {medians.idxmin()[0]}, most at {medians.idxmax()[0]} tokens)"
    )


def breakdown_headline(table: pd.DataFrame) -> str:
    """Return which part takes most of the baseline's time at the largest shape, in one line, from `breakdown`."""
    tokens, experts = (table.index.unique(level).max() for level in ("tokens", "experts"))
    parts = table.loc[(tokens, experts, "einsum (baseline)"), ["gate", "dispatch", "combine"]]
    share = parts.max() / parts.sum()
    return f"At {tokens} tokens and {experts} experts {parts.idxmax()} takes {share:.0%} of the baseline"


def verdicts(ratios: pd.DataFrame, scale: str, device: str, counted_work: float) -> list[Verdict]:
    """Judge the claims of section 5.4: the counted work of dispatch, exactly, and "more than six times".

    The second is taken at a decoding step's tokens and the most experts, over sessions. The paper speaks of GPUs; on a
    CPU it is about the CPU's kernels. Smoke's shapes are too small.

    Args:
        ratios: from `speedups`.
        device: the processor's or card's name.
        counted_work: from `work`.
    """
    tokens, experts = ratios["tokens"].min(), ratios["experts"].max()
    all_three = whole(ratios)
    at = all_three[(all_three["tokens"] == tokens) & (all_three["experts"] == experts)]
    sessions = [part for _, part in at.groupby("session")["ratio"]]
    medians = all_three.groupby(["tokens", "experts"])["ratio"].median()
    note = (
        f"On {device}: {tokens} tokens, {experts} experts; "
        f"over all shapes {medians.min():.1f} to {medians.max():.1f} times."
    )
    measured = judge_timing(
        CLAIM,
        [list(part) for part in sessions],
        note=note,
        scale=scale,
    )
    counted = judge(
        paper.claim("dispatch-cost-factor-e"),
        [counted_work],
        exact=True,
        note=f"Counted for {all_three['tokens'].max()} tokens: the factor is the slots of all experts together, the "
        "paper's is the number of experts. Tested is that there is one, not its value.",
    )
    return [measured, counted]


EXPERIMENT = Experiment(
    name="gating-kernels",
    number=8,
    title="Gating and dispatch kernels",
    paper="section 5.4",
    question="How much faster are a fused gate and table-driven copies than masks and einsum?",
    paper_answer="Over six times lower latency of the MoE kernels, on GPUs; no shapes are given.",
    scales={
        "smoke": Scale("32 wide, 4 and 16 experts", "seconds (tests)"),
        "cpu": Scale("512 wide, 8 to 128 experts, 8 to 512 tokens", "two minutes on one core"),
        "gpu": Scale("2048 wide, 8 to 128 experts, 8 to 512 tokens", "not yet run; one GPU"),
        "paper": Scale("as gpu; the paper's GPU", "not yet run; one A100"),
    },
    check=partial(at_least_one, "gating-kernels", ["rounds", "threads"]),
    measures=True,
    measures_on_gpu=("gpu", "paper"),
)
