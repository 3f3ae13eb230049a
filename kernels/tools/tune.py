"""Measure tile sizes, warps and stages of every op on this machine's card, and write the table of `tuning.py`.

For each op and shape, one setting after the other is varied, starting from the op's own; what takes least time is kept.
Grouped products are tried with persistent programs, too. A candidate counts only if its results equal those of the op's
own tile, and enters the table only if it also wins when the two are timed again in turns. A tile that does not compile,
or needs more shared memory than there is, is refused and does no harm. Shapes come most valuable first; `search` ends
when time is up, with what it has.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import gating, permute, residual, tuning
from .._experts_triton import _mm, _plan, _weight_gradient
from .._gating_triton import TILE
from .._triton import INTERPRETING
from ..experts import expert_ffn
from ..tuning import Tile

GAIN = 0.97
"""Times the op's own time: a tile that takes longer than this is no gain, but within the spread."""

BF16 = torch.bfloat16
# The persistent kernel holds one more stage in shared memory, so the number of stages is varied after it.
LAUNCH = {"num_warps": (4, 8), "programs_per_sm": (0, 1, 2, 4), "num_stages": (2, 3, 4, 5)}
PRODUCT = {"BN": (32, 64, 128, 256), "BK": (32, 64, 128), **LAUNCH}
WEIGHT = {"BK": (32, 64, 128), "BN": (64, 128, 256), "BR": (16, 32, 64), **LAUNCH}
ROWS = {"BM": (16, 32, 64, 128)}
COPY = {"tile": (1024, 2048, 4096, 8192), "num_warps": (2, 4, 8)}
GATE = {"tile": (TILE // 4, TILE // 2, TILE, TILE * 2), "num_warps": (4, 8)}


@dataclass(frozen=True)
class Target:
    """One op at one shape.

    Attributes:
        op: name for `tuning.tile`.
        choices: setting -> allowed values.
        call: runs it and returns its results.
    """

    op: str
    choices: Mapping[str, tuple[int, ...]]
    call: Callable[[], Sequence[torch.Tensor | None]]


def targets(device: str = "cuda", *, tiny: bool = False) -> Iterator[Target]:
    """Yield what is tuned: ops of the layers of public figures and of the paper, most valuable first.

    The tensors of a target are made when it is reached.

    Args:
        tiny: small numbers, to see the code run.
    """
    layers = [  # rows, experts, M, F
        (65536, 128, 2048, 768),
        (8192, 128, 1024, 4096),
        (64, 64, 2048, 8192),
    ]
    for R, E, M, F in [(24, 3, 16, 32)] if tiny else layers:
        yield from _experts(R, E, M, F, device)
    for S, E, K, M in [(600, 4, 2, 16)] if tiny else [(8192, 128, 8, 2048), (8192, 128, 1, 1024)]:
        yield from _around(S, E, K, M, device)


def _experts(R: int, E: int, M: int, F: int, device: str) -> Iterator[Target]:
    torch.manual_seed(0)
    with torch.device(device):
        x, dy = (torch.randn(R, M).to(BF16) for _ in range(2))
        w1, b1 = (torch.randn(E, M, F) * M**-0.5).to(BF16), torch.zeros(E, F, dtype=BF16)
        w2, b2 = (torch.randn(E, F, M) * F**-0.5).to(BF16), torch.zeros(E, M, dtype=BF16)
        chosen = torch.randint(E, (R,))
        offsets = torch.nn.functional.pad(torch.bincount(chosen, minlength=E).cumsum(0), (1, 0)).int()

    def ffn() -> Sequence[torch.Tensor]:
        return [expert_ffn(x, offsets, w1, b1, w2, b2, backend="triton")]

    def plan() -> Any:
        return _plan(x, offsets)

    h, pre = _mm(plan(), x, w1, b1, act=1, save=True)
    d_pre, _ = _mm(plan(), dy, w2, None, transpose=True, act=2, pre=pre, save=True)
    with torch.no_grad():
        yield Target("rows", ROWS, ffn)
        yield Target("product1", PRODUCT, lambda: _mm(plan(), x, w1, b1, act=1, save=True))
        yield Target("product0", PRODUCT, lambda: [_mm(plan(), h, w2, b2)])
        yield Target("weight", WEIGHT, lambda: _weight_gradient(plan(), x, d_pre, w1, b1))
        yield Target("weight", WEIGHT, lambda: _weight_gradient(plan(), h, dy, w2, b2))
        yield Target("product2t", PRODUCT, lambda: _mm(plan(), dy, w2, None, transpose=True, act=2, pre=pre, save=True))
        yield Target("product0t", PRODUCT, lambda: [_mm(plan(), d_pre, w1, None, transpose=True)])


def _around(S: int, E: int, K: int, M: int, device: str) -> Iterator[Target]:
    torch.manual_seed(0)
    with torch.device(device):
        logits = torch.randn(S, E)
        x, moe, mlp = (torch.randn(S, M).to(BF16) for _ in range(3))
        w, b = torch.randn(2, M).to(BF16), torch.zeros(2, dtype=BF16)

    def gate(logits: torch.Tensor = logits) -> gating.Gate:
        return gating.gate(logits, K, normalize=K > 1, backend="triton")

    def gate_backward() -> Sequence[torch.Tensor | None]:
        leaf = logits.detach().requires_grad_()
        routing = gate(leaf)
        (routing.weight_SK.sum() + routing.aux_loss).backward()
        return [leaf.grad]

    table = permute.row_table(gate(), backend="triton")
    rows, weights = permute.dispatch(x, table, backend="triton"), gate().weight_SK

    def mix(moe: torch.Tensor, mlp: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return residual.residual_mix(moe, mlp, x, w, b, backend="triton")

    def mix_backward() -> Sequence[torch.Tensor | None]:
        leaves = [t.detach().requires_grad_() for t in (moe, mlp, x)]
        mix(*leaves).backward(x)
        return [t.grad for t in leaves]

    yield Target("sum", COPY, lambda: [permute.combine(rows, table, weights, backend="triton")])
    yield Target("spread", COPY, lambda: [permute.dispatch(x, table, backend="triton")])
    yield Target("gate", GATE, lambda: gate()[:5])
    yield Target("gate_backward", GATE, gate_backward)
    if K == 1:
        yield Target("mix", COPY, lambda: [mix(moe, mlp, x)])
        yield Target("mix_backward", COPY, mix_backward)


@dataclass(frozen=True)
class Tuned:
    """What was found for a target.

    Attributes:
        key: the shape class.
        best: what differs from the op's own settings in the best tile (empty: nothing).
        own_ms, best_ms: times of both, medians of the turns in which they were compared.
        tried, refused, wrong: candidates timed; those that did not compile or run; those with other results.
    """

    key: str
    best: Tile
    own_ms: float
    best_ms: float
    tried: int
    refused: int
    wrong: int


def seconds(call: Callable[[], Any]) -> float:
    """Return the time of a call on the device, the median of some, the cache cold; of one call on a CPU."""
    if torch.cuda.is_available() and not INTERPRETING:
        import triton

        return triton.testing.do_bench(call, warmup=5, rep=25, return_mode="median") / 1e3
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def tune(target: Target, deadline: float, timer: Callable[[Callable[[], Any]], float] = seconds) -> Tuned | None:
    """Return the best tile of a target; None if time is up before its own tile is measured.

    Args:
        deadline: of `time.monotonic`; no further candidate begins after it.
    """
    if time.monotonic() > deadline:
        return None
    key, own = _asked(target)
    with tuning.trial(target.op, {}):
        want = [t.clone() for t in target.call() if t is not None]
        times: dict[tuple[tuple[str, int], ...], float] = {(): timer(target.call)}
    counts = {"refused": 0, "wrong": 0}
    best: Tile = {}
    for name, values in target.choices.items():
        for value in values:
            changes = {k: v for k, v in (best | {name: value}).items() if v != own[k]}
            mark = tuple(sorted(changes.items()))
            if mark in times or time.monotonic() > deadline:
                continue
            times[mark] = _candidate(target, changes, want, timer, counts)
        fastest = min(times, key=times.__getitem__)
        best = dict(fastest)
    own_ms, best_ms = _in_turns(target, best, timer) if best else (times[()], times[()])
    if best_ms > GAIN * own_ms:
        best, best_ms = {}, own_ms
    tried = len(times) - sum(counts.values())
    return Tuned(key, best, own_ms * 1e3, best_ms * 1e3, tried, **counts)


def _asked(target: Target) -> tuple[str, Tile]:
    """Return the shape class that the target's launches ask for, and the op's own settings."""
    asked: list[tuple[str, Tile]] = []
    tile = tuning.tile

    def listening(op: str, default: Tile, like: torch.Tensor, **sizes: int) -> Tile:
        if op == target.op:
            own = {name: default[name] for name in target.choices}
            asked.append((tuning.shape_class(op, like.dtype, sizes), own))
            return default  # not what an older table says
        return tile(op, default, like, **sizes)

    tuning.tile = listening
    try:
        target.call()
    finally:
        tuning.tile = tile
    return asked[0]


def _candidate(
    target: Target, changes: Tile, want: list[torch.Tensor], timer: Callable[..., float], counts: dict[str, int]
) -> float:
    """Return the time with these changes; infinite where it does not run or has other results."""
    with tuning.trial(target.op, changes):
        try:
            got = [t for t in target.call() if t is not None]
            taken = timer(target.call)
        except Exception:  # the compiler's, for tiles that it cannot do
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # raises where the device is unusable from here on
            counts["refused"] += 1
            return float("inf")
    for a, b in zip(got, want, strict=True):
        scale = max(1.0, float(b.float().abs().max())) if b.numel() else 1.0
        near = {"rtol": 2e-2, "atol": 2e-2 * scale} if b.is_floating_point() else {"rtol": 0, "atol": 0}
        if not torch.allclose(a.float(), b.float(), **near):
            counts["wrong"] += 1
            return float("inf")
    return taken


def _in_turns(target: Target, best: Tile, timer: Callable[..., float]) -> tuple[float, float]:
    """Return the medians of the op's own tile and the best one, timed in turns."""
    own, other = [], []
    for _ in range(3):
        with tuning.trial(target.op, {}):
            own.append(timer(target.call))
        with tuning.trial(target.op, best):
            other.append(timer(target.call))
    return statistics.median(own), statistics.median(other)


def search(
    device: str, deadline: float, *, tiny: bool = False, report: Callable[[Tuned], None] = lambda _: None
) -> list[Tuned]:
    """Tune all targets until the deadline, calling `report` after each; products use the row tile that was found."""
    tuned = []
    with contextlib.ExitStack() as rows:
        for target in targets(device, tiny=tiny):
            if target.op == "rows":
                rows.close()
            if (one := tune(target, deadline)) is None:
                break
            if target.op == "rows":
                rows.enter_context(tuning.trial("rows", one.best))
            tuned.append(one)
            report(one)
    return tuned


def write(tuned: Sequence[Tuned], path: Path, card: str) -> None:
    """Write the table of a card.

    Entries of an older file at `path` that were not measured again are kept, if its card and versions are the same.
    """
    import triton

    where = {"card": card, "torch": torch.__version__, "triton": triton.__version__}
    older = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    before = older["tiles"] if where.items() <= older.items() else {}
    measured = {one.key: one.best for one in tuned}
    tiles = {key: entry for key, entry in {**before, **measured}.items() if entry}
    value = {**where, "tiles": dict(sorted(tiles.items()))}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    part.replace(path)
