"""The simulator's constants: how much of their data-sheet figures programs reach; with bounds and sources.

The free constants are fitted on the 52B scaling figure (arXiv Fig 10) alone, by `moelab simulate fit`; their values
are in `calibration.json`, together with the fit's results. The fixed ones come from public measurements of other
programs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
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

    def with_free(self, values: dict[str, float]) -> Constants:
        """Return the constants with other values of free ones."""
        return replace(self, **values)


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


def calibration() -> dict[str, Any]:
    """Return the stored fit: values, residuals, and how they were obtained."""
    return json.loads(resources.files(__package__).joinpath("calibration.json").read_text(encoding="utf-8"))


@cache
def fitted() -> Constants:
    """Return the constants with the free ones of `calibration.json`."""
    values = calibration()["constants"]
    assert set(values) == set(FREE) and set(values) <= {f.name for f in fields(Constants)}
    return Constants().with_free(values)
