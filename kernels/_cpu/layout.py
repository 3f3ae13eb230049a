"""Lay out the experts' rows so that few products of few shapes compute them (CPU).

With narrow experts, the call of a product of few rows costs more than its arithmetic. Further, oneDNN, which computes
bfloat16 products, generates code for every new number of rows, and every step's routing brings new numbers; generating
code costs as much as dozens of products (Intel with AMX, [m, 128] x [128, 512]: 40 us for a known m, 683 us for a new
one). So the rows may lie in *slots*, in blocks of experts; one task computes one block:

- the first ``base`` slots of each of the block's experts, for batched products; unused ones hold zeros;
- then the remaining rows of these experts, each *group* rounded up to a multiple of 4 to 64 slots for oneDNN.

The blocks are consecutive experts, all with the same base, or *sorted*: 1, 4, 16, ... experts with similar numbers of
rows, with a base of a power of two or 3/4 of it that holds all rows of each, so that new routings bring few new shapes.
Sorted blocks need the weights in their order, that is a copy, which a conversion to bfloat16 makes anyway. With
``base = 0`` and no rounding, slots are rows. :func:`plan` minimises an estimate of the time, which includes the
arithmetic of unused slots, the copies and the calls.
A layout depends on shapes and counts alone, never on the number of threads.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

_ELEMENTS = 1 << 18  # pre-activation elements per task: they stay in a core's cache between the task's steps
_ROWS = 1024  # rows of one product where experts are cut into tasks
_CUT = 16  # an expert with more than this fraction (1 / 16) of the rows is cut
_FEW_ROWS = 16  # up to this size of the largest group, row counts repeat without rounding


class Task(NamedTuple):
    """Hold one task's slots ``start`` to ``end``: the base of experts ``first`` to ``last`` - 1, then the groups."""

    start: int
    end: int
    base: int
    """Slots of each of these experts; in sorted blocks they are numbered as in ``Layout.order_N``."""
    first: int
    last: int
    experts: tuple[int, ...]
    """The experts of the groups."""
    sizes: tuple[int, ...]
    """The slots of the groups."""


class Layout(NamedTuple):
    """Record where the rows lie."""

    slots: int
    tasks: tuple[Task, ...]
    """Every expert with rows lies in one task; if ``cut``, an expert of more than 1024 slots lies in several."""
    cut: bool
    groups: tuple[tuple[int, int, int], ...]
    """If ``cut``: (expert, first slot, slot past the last) of every expert with rows."""
    row_P: np.ndarray | None
    """int64 [slots]: the row in the slot, -1 where it is unused; None where slots are rows."""
    slot_R: np.ndarray | None
    """int64 [R]: the row's slot, -1 past the last offset; None where slots are rows."""
    idle: tuple[int, ...]
    """The experts without rows."""
    order_N: np.ndarray | None = None
    """int64: the experts with rows in the order of sorted blocks; None for other blocks."""


def onednn(dtype: torch.dtype) -> bool:
    """Return whether PyTorch computes products of ``dtype`` by oneDNN on this machine."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 and (
        not torch.backends.mkl.is_available() or torch.backends.mkldnn.matmul.fp32_precision in ("bf16", "tf32")
    )


def tiles(dtype: torch.dtype) -> bool:
    """Return whether oneDNN computes products of ``dtype`` in AMX tiles of 16 rows on this machine."""
    return dtype == torch.bfloat16 and onednn(dtype) and torch.cpu._is_amx_tile_supported()


class _Costs(NamedTuple):
    """Hold times in ns on one Zen 4 core (AVX512), fitted to measured products; only their ratios matter.

    On an Intel core with AMX, batched products of experts 32 and 128 wide agree with them within a third.
    """

    product: float
    """Time of a multiply-add."""
    weight: float
    """Time for a weight that a product reads, or writes as a gradient."""
    group: float
    """Time of the calls for a group, forward and backward."""
    copied: float
    """Time to copy a weight and its gradient for sorted blocks, a third of it for each of three passes."""


_SLOW, _QUICK = _Costs(0.0265, 0.3, 26_000, 0.7), _Costs(0.0098, 0.15, 103_000, 0.35)  # float32 by MKL; bfloat16
_BLOCK, _CONVERTED = 80_000, 0.1  # calls for a sorted block; as `copied` where weights are converted in any case
_LARGEST = 1 << 30  # in sorted blocks an expert is one task, of at most half of the rows or so many multiply-adds
_ELEMENT, _COPY = 3, 4  # the activation of one element, and its gradient; copies of an element to its slot and back


def _sizes(counts_N: np.ndarray, least: int) -> np.ndarray:
    """Return the counts rounded up to a power of two, or 3/4 of it, that is a multiple of ``least``."""
    power_N = np.maximum(2 ** np.ceil(np.log2(np.maximum(counts_N, 1))).astype(np.int64), least)
    less_N = power_N // 4 * 3
    return np.where((less_N >= counts_N) & (less_N % least == 0), less_N, power_N)


class _Blocks(NamedTuple):
    """Hold the sizes of blocks, and the estimated time per training step."""

    ns: float
    base: int
    """Base slots of every expert, or 0."""
    sorted: tuple[tuple[int, int, int], ...] = ()
    """Sorted blocks (first, last, base)."""


def _base(counts_E: np.ndarray, width: int, ffn: int, step: int, costs: _Costs) -> _Blocks:
    """Return blocks of consecutive experts of the least estimated time; the base is 0 or a multiple of ``step``."""
    weights = 6 * width * ffn
    base_B = np.arange(0, min(int(counts_E.max()), 4096) + step, step)
    over_BE = np.maximum(counts_E - base_B[:, None], 0)
    rows_B = base_B * len(counts_E) + (-(-over_BE // step) * step).sum(1)
    groups_B = (over_BE > 0).sum(1)
    ns_B = rows_B * (weights * costs.product + _ELEMENT * ffn) + groups_B * (weights * costs.weight + costs.group)
    ns_B[1:] += len(counts_E) * weights * costs.weight + rows_B[1:] * width * _COPY
    best = int(np.argmin(ns_B))
    return _Blocks(float(ns_B[best]), int(base_B[best]))


def _sorted_blocks(falling_N: np.ndarray, width: int, ffn: int, least: int, costs: _Costs, converts: bool) -> _Blocks:
    """Return sorted blocks of the least estimated time; ``falling_N`` are the counts of the experts with rows."""
    weights, N, most = 6 * width * ffn, len(falling_N), max(_ELEMENTS // ffn, 1)
    size_N = _sizes(falling_N, least)
    slot = weights * costs.product + _ELEMENT * ffn + width * _COPY
    ns, sizes = [0.0] * (N + 1), size_N.tolist()  # ns[i]: blocks of the experts from i on
    taken = [1] * N
    for i in range(N - 1, -1, -1):
        cost, size, n = slot * sizes[i], sizes[i], 1
        best = ns[i + 1] + cost
        while i + 4 * n <= N and 4 * n * size <= most:
            n *= 4
            if (here := ns[i + n] + n * cost) < best:
                best, taken[i] = here, n
        ns[i] = best + _BLOCK
    blocks, i = [], 0
    while i < N:
        blocks.append((i, i + taken[i], sizes[i]))
        i += taken[i]
    copies = _CONVERTED if converts else costs.copied
    return _Blocks(ns[0] + N * weights * (costs.weight + copies), 0, tuple(blocks))


def plan(
    bounds: list[int], rows: int, width: int, ffn: int, dtype: torch.dtype, pad: bool = True, converts: bool = False
) -> Layout:
    """Return the layout of ``rows`` rows whose groups end at ``bounds`` [E + 1], for experts width -> ffn -> width.

    Without ``pad``, slots are rows. ``converts``: the weights have another dtype than the rows, so that they are copied
    in any case.
    """
    bounds_E1 = np.asarray(bounds)
    counts_E, total = np.diff(bounds_E1), int(bounds_E1[-1])
    E, busy = len(counts_E), np.flatnonzero(counts_E)
    round_up, base, most = 1, 0, max(_ELEMENTS // ffn, 1)
    if pad and total:
        quick = onednn(dtype)
        step, costs = (16, _QUICK) if quick else (8, _SLOW)
        best = _base(counts_E, width, ffn, step, costs)
        largest = int(counts_E.max())
        if len(busy) > 1 and (largest * 2 <= total or largest * width * ffn < _LARGEST):
            order_N = busy[np.argsort(-counts_E[busy], kind="stable")]
            others_ns = best.ns + (E * 6 * width * ffn * _CONVERTED if converts else 0)
            blocks = _sorted_blocks(counts_E[order_N], width, ffn, step if quick else 4, costs, converts)
            if blocks.ns < others_ns:
                return _sorted(counts_E, bounds_E1, rows, order_N, blocks.sorted)
        base = best.base
        if quick and counts_E.max() > _FEW_ROWS:
            average = total // len(busy)
            least = 16 if tiles(dtype) else 4  # a tile takes the same time with fewer rows
            round_up = min(max(1 << max(average.bit_length() - 4, 0), least), 64)  # 1/16 to 1/8 of it
    more_E = np.maximum(counts_E - base, 0)
    more_E = -(-more_E // round_up) * round_up
    cut = base == 0 and total > 0 and int(counts_E.max()) * _CUT > total
    if base:
        step = 1 << max(most // base, 1).bit_length() - 1  # a power of two: all batches have one shape
        blocks = [(e, min(e + step, E)) for e in range(0, E, step)]
        start_E = np.empty(E, np.int64)  # of the group
        tasks, end = [], 0
        for first, last in blocks:
            start, end = end, end + (last - first) * base
            sizes = more_E[first:last]
            start_E[first:last] = end + np.cumsum(sizes) - sizes
            there = np.flatnonzero(sizes)
            end += int(sizes.sum())
            groups = tuple((first + there).tolist()), tuple(sizes[there].tolist())
            tasks.append(Task(start, end, base, first, last, *groups))
        at_E = np.repeat([t.start for t in tasks], [t.last - t.first for t in tasks])
        at_E = at_E + np.concatenate([np.arange(t.last - t.first) for t in tasks]) * base
        groups = ()
    else:
        start_E = at_E = np.cumsum(more_E) - more_E
        end = int(more_E.sum())
        sizes, starts = more_E[busy].tolist(), start_E[busy].tolist()
        groups = tuple((e, i, i + n) for e, i, n in zip(busy.tolist(), starts, sizes, strict=True))
        tasks = _loose(groups, most, cut)
    row_P = slot_R = None
    if end > total or (base and more_E.any()):
        row_P, slot_R = _tables(counts_E, bounds_E1, rows, end, base, at_E, start_E)
    idle = tuple(np.flatnonzero(counts_E == 0).tolist())
    return Layout(end, tuple(tasks), cut, groups if cut else (), row_P, slot_R, idle)


def _sorted(
    counts_E: np.ndarray,
    bounds_E1: np.ndarray,
    rows: int,
    order_N: np.ndarray,
    blocks: tuple[tuple[int, int, int], ...],
) -> Layout:
    """Return the layout of sorted blocks, each a task."""
    tasks, end, at_E = [], 0, np.zeros(len(counts_E), np.int64)
    for first, last, base in blocks:
        start, end = end, end + (last - first) * base
        at_E[order_N[first:last]] = np.arange(start, end, base)
        tasks.append(Task(start, end, base, first, last, (), ()))
    tables = _tables(counts_E, bounds_E1, rows, end, int(counts_E.max()), at_E, at_E)
    return Layout(end, tuple(tasks), False, (), *tables, tuple(np.flatnonzero(counts_E == 0).tolist()), order_N)


def _tables(
    counts_E: np.ndarray, bounds_E1: np.ndarray, rows: int, slots: int, base: int, at_E: np.ndarray, more_E: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return (row_P, slot_R); an expert's first ``base`` rows lie from slot ``at_E`` on, the others from ``more_E``."""
    total = int(bounds_E1[-1])
    expert_R = np.repeat(np.arange(len(counts_E)), counts_E)
    index_R = np.arange(total) - bounds_E1[expert_R]
    slot_R = np.full(rows, -1)
    slot_R[:total] = np.where(index_R < base, at_E[expert_R], more_E[expert_R] - base) + index_R
    row_P = np.full(slots, -1)
    row_P[slot_R[:total]] = np.arange(total)
    return row_P, slot_R


def _loose(groups: tuple[tuple[int, int, int], ...], most: int, cut: bool) -> list[Task]:
    """Return tasks without a base: neighbouring groups of at most ``most`` slots, or with ``cut`` also parts of one."""
    tasks: list[Task] = []
    held: list[tuple[int, int, int]] = []

    def close() -> None:
        if held:
            experts, starts, ends = zip(*held, strict=True)
            tasks.append(Task(starts[0], ends[-1], 0, 0, 0, experts, tuple(j - i for _, i, j in held)))
            held.clear()

    for e, start, end in groups:
        for i in range(start, end, _ROWS) if cut else (start,):
            j = min(i + _ROWS, end) if cut else end
            if held and j - held[0][1] > most:
                close()
            held.append((e, i, j))
    close()
    return tasks
