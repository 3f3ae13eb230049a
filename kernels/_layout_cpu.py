"""Lay out the experts' rows so that few products of few shapes compute them (CPU).

With narrow experts, the call of a product of few rows costs more than its arithmetic. Further, oneDNN, which computes
bfloat16 products, generates code for every new number of rows, and every step's routing brings new numbers; generating
code costs as much as dozens of products (Intel with AMX, [m, 128] x [128, 512]: 40 us for a known m, 683 us for a new
one). So the rows may lie in *slots*, in blocks of consecutive experts; one task computes one block:

- the first ``base`` slots of each of the block's experts, for batched products; unused ones hold zeros;
- then the remaining rows of these experts, each *group* rounded up to a multiple of 4 to 64 slots for oneDNN.

With ``base = 0`` and no rounding, slots are rows. :func:`plan` minimises an estimate of the time, which includes the
arithmetic of unused slots and the calls.
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
    first: int
    last: int
    experts: tuple[int, ...]
    """The experts of the groups."""
    sizes: tuple[int, ...]
    """The slots of the groups."""


class Layout(NamedTuple):
    """Record where the rows lie."""

    base: int
    slots: int
    tasks: tuple[Task, ...]
    """Every expert with rows lies in one task; if ``cut``, these are parts of experts, at most 1024 slots of one."""
    cut: bool
    groups: tuple[tuple[int, int, int], ...]
    """If ``cut``: (expert, first slot, slot past the last) of every expert with rows."""
    row_P: np.ndarray | None
    """int64 [slots]: the row in the slot, -1 where it is unused; None where slots are rows."""
    slot_R: np.ndarray | None
    """int64 [R]: the row's slot, -1 past the last offset; None where slots are rows."""
    idle: tuple[int, ...]
    """The experts without rows."""


def onednn(dtype: torch.dtype) -> bool:
    """Return whether PyTorch computes products of ``dtype`` by oneDNN on this machine."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 and (
        not torch.backends.mkl.is_available() or torch.backends.mkldnn.matmul.fp32_precision in ("bf16", "tf32")
    )


class _Costs(NamedTuple):
    """Hold times in ns on one Zen 4 core (AVX512), fitted to measured products; only their ratios matter."""

    product: float
    """Time of a multiply-add."""
    weight: float
    """Time for a weight that a product reads, or writes as a gradient."""
    group: float
    """Time of the calls for a group, forward and backward."""


_SLOW, _QUICK = _Costs(0.0265, 0.3, 26_000), _Costs(0.0098, 0.15, 103_000)  # float32 by MKL; bfloat16 by oneDNN
_ELEMENT, _COPY = 3, 4  # the activation of one element, and its gradient; copies of an element to its slot and back


def _base(counts_E: np.ndarray, width: int, ffn: int, step: int, costs: _Costs) -> int:
    """Return the base slots per expert, 0 or a multiple of ``step``, of the least estimated time per training step."""
    weights = 6 * width * ffn
    base_B = np.arange(0, min(int(counts_E.max()), 4096) + step, step)
    over_BE = np.maximum(counts_E - base_B[:, None], 0)
    rows_B = base_B * len(counts_E) + (-(-over_BE // step) * step).sum(1)
    groups_B = (over_BE > 0).sum(1)
    ns_B = rows_B * (weights * costs.product + _ELEMENT * ffn) + groups_B * (weights * costs.weight + costs.group)
    ns_B[1:] += len(counts_E) * weights * costs.weight + rows_B[1:] * width * _COPY
    return int(base_B[np.argmin(ns_B)])


def plan(bounds: list[int], rows: int, width: int, ffn: int, dtype: torch.dtype, pad: bool = True) -> Layout:
    """Return the layout of ``rows`` rows whose groups end at ``bounds`` [E + 1], for experts width -> ffn -> width."""
    bounds_E1 = np.asarray(bounds)
    counts_E, total = np.diff(bounds_E1), int(bounds_E1[-1])
    E, busy = len(counts_E), np.flatnonzero(counts_E)
    round_up, base = 1, 0
    if pad and total:
        quick = onednn(dtype)
        base = _base(counts_E, width, ffn, *((16, _QUICK) if quick else (8, _SLOW)))
        if quick and counts_E.max() > _FEW_ROWS:
            average = total // len(busy)
            round_up = min(max(1 << max(average.bit_length() - 4, 0), 4), 64)  # 1/16 to 1/8 of it
    more_E = np.maximum(counts_E - base, 0)
    more_E = -(-more_E // round_up) * round_up
    cut = base == 0 and total > 0 and int(counts_E.max()) * _CUT > total
    most = max(_ELEMENTS // ffn, 1)
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
            tasks.append(Task(start, end, first, last, tuple((first + there).tolist()), tuple(sizes[there].tolist())))
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
        expert_R = np.repeat(np.arange(E), counts_E)
        index_R = np.arange(total) - bounds_E1[expert_R]
        slot_R = np.full(rows, -1)
        slot_R[:total] = np.where(index_R < base, at_E[expert_R], start_E[expert_R] - base) + index_R
        row_P = np.full(end, -1)
        row_P[slot_R[:total]] = np.arange(total)
    idle = tuple(np.flatnonzero(counts_E == 0).tolist())
    return Layout(base, end, tuple(tasks), cut, groups if cut else (), row_P, slot_R, idle)


def _loose(groups: tuple[tuple[int, int, int], ...], most: int, cut: bool) -> list[Task]:
    """Return tasks without a base: neighbouring groups of at most ``most`` slots, or with ``cut`` parts of a group."""
    if cut:
        parts = [(e, i, min(i + _ROWS, end)) for e, start, end in groups for i in range(start, end, _ROWS)]
        return [Task(i, j, 0, 0, (e,), (j - i,)) for e, i, j in parts]
    tasks: list[Task] = []
    held: list[tuple[int, int, int]] = []

    def close() -> None:
        if held:
            experts, starts, ends = zip(*held, strict=True)
            tasks.append(Task(starts[0], ends[-1], 0, 0, experts, tuple(j - i for _, i, j in held)))
            held.clear()

    for group in groups:
        if held and group[2] - held[0][1] > most:
            close()
        held.append(group)
    close()
    return tasks
