"""Measure the card's ceilings, then the gate and the MoE layer against floor, baseline and peers.

The sizes are those of public figures (E=128, M=2048, F=768, K=8, T=8192) and of the paper's 350M+MoE-128. A candidate
that fails on this card (memory, dtype) is a row with its error; the others go on.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from moelab import simulate
from moelab.acceptance import stages
from moelab.acceptance.cases import Case, Context, Numbers, one_line
from moelab.bench import gate as gate_bench
from moelab.bench import harness, inputs, layer, peers
from moelab.bench.harness import Timing
from moelab.bench.layer import LayerSize
from moelab.kernels import gate
from moelab.models import baseline

LAYERS = [
    LayerSize(8192, 2048, 768, 128, "bf16", top_k=8),
    LayerSize(8192, 1024, 4096, 128, "bf16"),
    LayerSize(64, 2048, 8192, 64, "bf16"),
]
GATES = [1, 64, 16384]
OTHERS = tuple(name for name in layer.CANDIDATES if name not in layer.GPU_ONLY)
GATE_PEERS = ("masks (baseline)", "deepspeed, masks", "deepspeed, sparse routes")


def cases(context: Context) -> Iterator[Case]:
    """Yield the ceilings, the layers and the gates."""
    timing = Timing(1, "cpu", warm_up=0) if context.tiny else Timing(9, context.device, warm_up=1, budget_s=20)
    sizes = [LayerSize(64, 32, 64, 4, "bf16", top_k=2)] if context.tiny else LAYERS
    tokens = [1, 67] if context.tiny else GATES
    yield Case("ceilings", lambda: ceilings(timing, context))
    for size in sizes[:2]:
        for backward in (True, False):
            yield _layer(size, backward, timing)
    for S in tokens:
        yield Case(f"gate S{S} E128 K1, forward + backward", lambda S=S: _gate(S, timing))
        yield Case(f"gate S{S} E128 K1, forward in a graph", lambda S=S: _replayed(S, timing))
    for size in sizes[2:]:
        yield _layer(size, False, timing)
    for size in sizes[:2]:
        yield from _kernel_layers(size, timing, context)
    yield Case("peers", lambda: {"installed": peers.installed()})


def cluster_of(device: str) -> simulate.Cluster | None:
    """Return the simulator's cluster with this card, None if it knows none."""
    known = stages.card(device)
    for name in ("h100", "a100-80gb", "a100-40gb"):
        kind, _, memory = name.partition("-")
        if kind in known and (not memory or memory in known):
            return simulate.cluster(name)
    return None


def ceilings(timing: Timing, context: Context) -> Numbers:
    """Return what the card reaches: matrix products by dtype (TFLOP/s), copying and reading memory (GB/s)."""
    n, size = (128, 1 << 20) if context.tiny else (8192, 1 << 30)
    found: Numbers = {
        f"product_{name}_tflops": harness.product_rate(dtype, timing, n) / 1e12
        for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32))
    }
    found |= {"copy_gb_s": harness.copy_rate(timing, size) / 1e9, "read_gb_s": harness.read_rate(timing, size) / 1e9}
    if (where := cluster_of(context.device)) is not None:
        shares = simulate.fitted()
        found |= {
            "data_sheet": where.gpu.name,
            "product_share": found["product_bf16_tflops"] / where.gpu.tflops,
            "memory_share": found["read_gb_s"] / where.gpu.memory_gb_s,
            "simulator_product_share": shares.matmul_share,
            "simulator_memory_share": shares.memory_share,
        }
    text = f"bf16 {found['product_bf16_tflops']:.3g} TFLOP/s, copy {found['copy_gb_s']:.4g} GB/s"
    return found | {"device": harness.device_name(context.device), "finding": text}


def _layer(size: LayerSize, backward: bool, timing: Timing, only: Sequence[str] = OTHERS, what: str = "") -> Case:
    name = f"layer S{size.tokens} M{size.hidden} F{size.ffn} E{size.experts} K{size.top_k} {size.dtype}"
    name += f", forward{' + backward' * backward}{what}"
    return Case(name, lambda: _measure_layer(size, backward, timing, only), (), 20)


def _kernel_layers(size: LayerSize, timing: Timing, context: Context) -> Iterator[Case]:
    """Yield the layers of Liger and triton_kernels beside ours, in cases of their own: they compile for long.

    Liger's tuning of tile sizes would take minutes; unless the environment says otherwise, it is set to do without.
    """
    device = torch.device(context.device)
    if peers.on_gpu("liger_kernel", device):
        os.environ.setdefault("LIGER_FUSED_MOE_AUTOTUNE", "0")  # read when Liger is imported
        for backward in (True, False):
            yield _layer(size, backward, timing, (layer.DROP_FREE, layer.LIGER), ", liger")
    if peers.on_gpu("triton_kernels", device):
        yield _layer(size, False, timing, (layer.DROP_FREE, layer.TRITON_KERNELS), ", triton_kernels")


def _measure_layer(size: LayerSize, backward: bool, timing: Timing, only: Sequence[str]) -> list[Numbers]:
    failed = Failed(timing)
    found = _rows(layer.measure(size, timing, backward=backward, only=only, on_failure=failed), layer.DROP_FREE)
    shown = (layer.EINSUM, layer.GROUPED, layer.MIXTRAL, layer.DEEPSPEED, *layer.GPU_ONLY)
    return failed.behind(_with_finding(found, layer.DROP_FREE, shown))


class Failed:
    """Collect the candidates that fail, as rows behind those of the others."""

    def __init__(self, timing: Timing) -> None:
        self.rows: list[Numbers] = []
        self._device = timing.device

    def __call__(self, candidate: str, error: Exception) -> None:
        """Add a candidate, and give back the memory that it took."""
        self.rows.append({"status": "failed", "candidate": candidate, "error": one_line(error)})
        if self._device == "cuda":
            torch.cuda.empty_cache()

    def behind(self, found: list[Numbers]) -> list[Numbers]:
        """Return all rows; RuntimeError if nothing was found."""
        if not found:
            raise RuntimeError(f"no candidate ran: {self.rows[0]['error']}")
        return found + self.rows


def _rows(found: list[harness.Row], ours: str) -> list[Numbers]:
    """Return rows as JSON values, each with its time over that of `ours`, if that ran."""
    values = [row.json() for row in found]
    own = next((row.median_ms for row in found if row.candidate == ours), None)
    for value in values:
        value.pop("rounds_ms")
        value |= {"over_ours": value["median_ms"] / own} if own else {}
    return values


def _with_finding(found: list[Numbers], ours: str, others: Sequence[str]) -> list[Numbers]:
    """Give the first row the text of what the rows say."""
    own = next((row for row in found if row["candidate"] == ours), None)
    if own is not None:
        text = [f"ours {own['median_ms']:.3g} ms = {own['floor_ratio']:.2f} x floor"]
        text += [f"{row['candidate']} {row['over_ours']:.2f} x ours" for row in found if row["candidate"] in others]
        found[0]["finding"] = "; ".join(text)
    return found


def _gate(S: int, timing: Timing) -> list[Numbers]:
    failed = Failed(timing)
    found = _rows(gate_bench.measure(S, 128, timing, on_failure=failed), "ours")
    return failed.behind(_with_finding(found, "ours", GATE_PEERS))


def _replayed(S: int, timing: Timing, calls: int = 50) -> list[Numbers]:
    """Time the gates' forward pass as decoding replays it: from a CUDA graph, without the host's time to issue it."""
    states = inputs.HiddenStates(S, gate_bench.HIDDEN, 128, timing.device)
    logits_SE = states(0).logits_SE
    capacity = max(4, math.ceil(S / 128))

    def masks() -> Any:
        routing = baseline.mask_gate(logits_SE, 1, capacity)
        return baseline.one_hot_masks(routing, capacity, torch.float32)

    def ours() -> Any:
        return gate(logits_SE, 1, capacity)

    with torch.no_grad():
        candidates = {"ours": replay(ours, timing.device), "masks (baseline)": replay(masks, timing.device)}
        times = harness.in_turns(
            {name: lambda _, call=call: call() for name, call in candidates.items()},
            lambda i: None,
            timing,
            lambda call, given: timing.seconds(call, given, calls=calls if timing.device == "cuda" else 1),
        )
    floor_s = S * 128 * 4 / harness.read_rate(timing, 1 << 20 if timing.device == "cpu" else 1 << 28)
    case = {"tokens": S, "experts": 128, "capacity": capacity}
    described = "one round of hidden states, the same each time"
    found = harness.rows(case, times, against="ours", floor_s=floor_s, timing=timing, inputs=described)
    return _with_finding(_rows(found, "ours"), "ours", GATE_PEERS)


def replay(call: Callable[[], Any], device: str) -> Callable[[], Any]:
    """Return a function that replays `call` from a CUDA graph; on a CPU the call itself."""
    if device != "cuda":
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def run() -> Any:
        graph.replay()
        return kept

    return run
