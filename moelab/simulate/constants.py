"""The simulator's constants: how much of their data-sheet figures programs reach; with bounds and sources.

The free constants are fitted on the 52B scaling figure (arXiv Fig 10) alone, by `moelab simulate fit`; their values
are in `calibration.json`, together with the fit's results. The fixed ones come from public measurements of other
programs.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any


@dataclass(frozen=True)
class Constants:
    """The constants: times in microseconds, efficiencies as shares of the data sheet's figures.

    Attributes:
        eager_us: free. Host time to issue one kernel from Python, module calls and view operations included (section
            5.4 calls it kernel-invocation overhead). The device waits for it unless it is behind
            (`moelab.simulate.clocks`).
        far_us: free. Time that each message to another node adds to an all-to-all: the alpha of the alpha-beta model,
            for NCCL as it was in 2021.
        memory_share: share of memory bandwidth that memory-bound kernels reach: products of few rows, elementwise ones.
        near_us: the alpha inside a node.
        collective_us: start of any collective: the kernel, and its first hand-shake.
        near_share, far_share: share of link bandwidth that NCCL reaches on large messages.
        matmul_share: share of the tensor-core rate that compute-bound products reach.
        hop_us: time of one step of an all-reduce between nodes.
        kernel_us: least time of a kernel on the device, the gap to the next one included.
        reserved_gib: memory of CUDA context, NCCL, workspaces and allocator gaps on each GPU.
        exchange_us: what an exchange takes besides a collective's start and its messages: packing, quantising, signals.
        product_us: what a product takes besides reading or multiplying: its first and last tiles, the gap after it.
        step_us: host time between two decoding steps that no kernel hides: scheduler, sampling, detokenising.
        counted_share, train_share: share of a prefill, and of a training step's passes, in which the counted kernels
            run at the shares above; the rest is kernels not counted, gaps, uneven experts, processors that communicate.
        links_overlap: whether an exchange uses the links in the node and between nodes at the same time.
    """

    eager_us: float = 20.0
    far_us: float = 3.0
    memory_share: float = 0.556
    near_us: float = 1.0
    collective_us: float = 10.0
    near_share: float = 0.77
    far_share: float = 0.9
    matmul_share: float = 0.6
    hop_us: float = 5.0
    kernel_us: float = 2.0
    reserved_gib: float = 2.5
    exchange_us: float = 0.0
    product_us: float = 0.0
    step_us: float = 0.0
    counted_share: float = 1.0
    train_share: float = 1.0
    links_overlap: bool = False

    def with_free(self, values: dict[str, float]) -> Constants:
        """Return the constants with other values of free ones."""
        return replace(self, **values)  # type: ignore[arg-type]  # only numbers are free


FREE: dict[str, tuple[float, float, str]] = {
    "eager_us": (5.0, 50.0, "a bare launch from C++ takes about 5 us; 50 us is far above one operation from Python"),
    "far_us": (
        1.0,
        18.0,
        "InfiniBand takes 1 to 2 us a message. NCCL sends with its Simple protocol over one channel a remote peer "
        "until 2.12 (v2.10.3, paths.cc, sendrecv.h): 8.4 us to start and 9.6 a network hop in its own table "
        "(tuning.cc), as an upper bound if each message waited for the one before",
    ),
}
"""Free constant -> lower bound, upper bound, the reason for these bounds."""

SOURCES = {
    "memory_share": "the authors' own arithmetic: 500 of a V100's 900 GB/s (DeepSpeed SC22 slides, p. 13); Fig 10 does "
    "not determine it",
    "near_us": "an estimate: a small all-to-all among 8 GPUs of a node takes hardly longer than among 2",
    "collective_us": "nccl-tests, small all-to-all in a node: 10 to 12 us (tinygrad/open-gpu-kernel-modules issue 17; "
    "deepseek-ai/DeepEP issue 303)",
    "near_share": "nccl-tests all-reduce on 8 A100: about 230 of 300 GB/s (unverified)",
    "far_share": "nccl-tests over HDR InfiniBand, A100: 85 on average, 96 at best of 100 GB/s (NVIDIA/nccl-tests issue "
    "119)",
    "matmul_share": "large fp16 products on A100 reach 0.6 to 0.8 of 312 TFLOP/s (unverified)",
    "hop_us": "NCCL's own table (v2.10.3, tuning.cc): tree, LL protocol, a network hop",
    "kernel_us": "about 2 us between small kernels of a CUDA graph (unverified)",
    "reserved_gib": "an estimate: CUDA context 0.5, NCCL 1, workspaces and gaps 1 GiB",
}
"""Fixed constant -> where its value comes from."""

PAPER_HAS_NONE = {"exchange_us", "product_us", "step_us", "counted_share", "train_share", "links_overlap"}
"""Constants that only today's programs have; in the paper's they change nothing."""

MODERN_FREE: dict[str, dict[str, tuple[float, float, str]]] = {
    "layer": {
        "memory_share": (0.4, 0.95, "half of the data sheet up to a copy's rate"),
        "matmul_share": (0.3, 0.9, "of the tensor cores' data-sheet rate"),
        "product_us": (0.0, 20.0, "nothing up to a few waves of tiles"),
    },
    "exchange": {
        "exchange_us": (0.0, 60.0, "nothing up to several hand-shakes"),
        "near_share": (0.3, 0.95, "of NVLink's data-sheet rate"),
        "far_share": (0.4, 1.0, "of a network card's rate"),
        "far_us": (0.0, 5.0, "writes that the GPU itself posts, up to one message after another"),
    },
    "decode": {
        "kernel_us": (1.0, 8.0, "kernels of a CUDA graph"),
        "step_us": (0.0, 10000.0, "nothing up to the scheduler of the first engines"),
    },
    "prefill serving": {"counted_share": (0.2, 1.0, "a fifth up to all of the time")},
    "training": {"train_share": (0.2, 1.0, "a fifth up to all of the time")},
}
"""Groups of public measurements -> the free constants of today's programs that they determine, as in `FREE`.

Each is fitted on the group's rows of `moelab.simulate.public.fitted_on`, in this order, the earlier ones held. The
host's time a kernel is not among them: on the rows of the fit the device is behind."""

# 10 us a kernel is an estimate between a bare launch and the paper's stack; the other values are where the fit starts.
MODERN_START = Constants(eager_us=10.0, far_us=0.1, memory_share=0.7, near_share=0.7, kernel_us=2.0, links_overlap=True)


def calibration(name: str = "calibration.json") -> dict[str, Any]:
    """Return a stored fit: values, residuals, and how they were obtained."""
    return json.loads(resources.files(__package__).joinpath(name).read_text(encoding="utf-8"))


@cache
def fitted() -> Constants:
    """Return the constants with the free ones of `calibration.json`: the paper's programs of 2021."""
    return _stored("calibration.json", FREE, Constants())


@cache
def modern() -> Constants:
    """Return the constants of today's programs, with the free ones of `calibration_modern.json`."""
    free = {name for names in MODERN_FREE.values() for name in names}
    return _stored("calibration_modern.json", free, MODERN_START)


def _stored(name: str, free: Collection[str], start: Constants) -> Constants:
    values = calibration(name)["constants"]
    assert set(values) == set(free)
    return start.with_free(values)
