"""What the released PyTorch path does beyond what the simulator counts, at the bars where it is slower than predicted.

Counted from the calls of DeepSpeed e46d808a1 (2022-01-18), deepspeed/moe/sharded_moe.py and experts.py; nothing is
fitted to these bars. Each count is applied alone, with the constants of Fig 10:

    eight slots        TopKGate's default min_capacity of 8. All released paths to it pass 4 (MoE's default and that of
                       --moe-min-capacity); also with the constants of Fig 10 fitted again
    two small kernels  an expert's bias and activation as two kernels instead of one
    copies             passes over the [E, C, M] tensor besides the exchange's own: the mask's cast, the einsum's
                       permuted operand and result, contiguous() before both all-to-alls, chunk and cat around the
                       experts, and the weights' cast: ten, each read and written
    masks              fp32 and int64 tensors [S, E, C] and [S, E], written and read by every kernel of the gate
    every wait         the host waits after each kernel, which bounds whatever synchronises: the all-to-alls, the copy
                       of the counts to the CPU, timers
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moelab.simulate import bars
from moelab.simulate.calibrate import fit
from moelab.simulate.constants import Constants, fitted
from moelab.simulate.exchange import transfer_us
from moelab.simulate.hardware import cluster
from moelab.simulate.step import kernels_issued
from moelab.simulate.systems import slots, system

COPIES = 10
MASK_BYTES = 8
"""Bytes of a number of the gate's masks: int64 from one_hot, the largest."""


def counted() -> list[dict[str, Any]]:
    """Return a row for each bar of the baseline: the paper's ms, ours, and ours with each count."""
    code, where, known = system("pytorch"), cluster(bars.CLUSTER), fitted()
    bandwidth = where.gpu.memory_gb_s * known.memory_share
    eight, two = replace(code, min_capacity=8), replace(code, expert=2)

    def with_eight(bar: bars.Bar) -> bars.Bar:
        return replace(bar, system=eight) if bar.system == "pytorch" else bar

    again = Constants().with_free(fit([with_eight(bar) for bar in bars.fig10()])["constants"])
    found = []
    for bar in (*bars.fig10(), *bars.fig11()):
        if bar.system != "pytorch" or bar.paper_ms is None:
            continue
        model, ours = bar.model, bar.simulate()
        numbers = slots(code, model, bars.BATCH, 128) * 128 * model.hidden
        masks = bars.BATCH * 128 * (1 + slots(code, model, bars.BATCH, 128)) * MASK_BYTES
        issued = kernels_issued(model, code, bar.parallel)
        device = sum(ms for part, ms in ours.parts_ms.items() if part != "launch")
        found.append(
            {
                "bar": f"{bar.label}, {bar.gpus} GPUs",
                "fitted": bar.fitted,
                "paper_ms": bar.paper_ms,
                "simulated_ms": ours.latency_ms,
                "eight slots": with_eight(bar).simulate().latency_ms,
                "eight slots, fitted again": with_eight(bar).simulate(constants=again).latency_ms,
                "two small kernels": replace(bar, system=two).simulate().latency_ms,
                "copies": ours.latency_ms + model.moe_layers * COPIES * transfer_us(2 * numbers * 2, bandwidth) / 1e3,
                "masks": ours.latency_ms + model.moe_layers * code.gate * transfer_us(2 * masks, bandwidth) / 1e3,
                "every wait": device + issued * known.eager_us / 1e3,
            }
        )
    return found
