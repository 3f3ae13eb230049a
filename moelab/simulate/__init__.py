"""Model GPU clusters analytically: memory, latency, throughput, cost of MoE inference and training (section 5).

    from moelab import simulate
    from moelab.config.parallel import ParallelConfig

    simulate.decode("1.3B+MoE-128", ParallelConfig(data=64), "a100", program="deepspeed", batch=8).latency_ms
    simulate.training("6.7B", ParallelConfig(tensor=8, data=16), "a100", batch=1024, micro_batch=4).samples_per_s
    simulate.plan("24B+MoE-128", 256, "a100", objective="latency").best
    simulate.least_gpus("8B+MoE-128", "a100")
    simulate.decode("qwen3-235b", ParallelConfig(data=8), "h200", program="engine", dtype="fp8", batch=64).latency_ms

It combines a roofline for kernels, an alpha-beta model (latency and bandwidth) for collectives, and two clocks for host
and device. Two free constants are fitted on the paper's Fig 10 alone (`constants`, `calibrate`), and for programs of
today eleven on public measurements (`public`, `judge`); everything else is prediction. It needs numpy but not torch,
and computes thousands of layouts at once (`decode_sweep`).
"""

from importlib import import_module
from typing import Any

_WHERE = {
    "Cluster": "hardware",
    "cluster": "hardware",
    "cluster_of_card": "hardware",
    "clusters": "hardware",
    "Constants": "constants",
    "fitted": "constants",
    "calibration": "constants",
    "System": "systems",
    "system": "systems",
    "Layouts": "layouts",
    "decode": "decoding",
    "decode_sweep": "decoding",
    "DecodeEstimate": "decoding",
    "DecodeSweep": "decoding",
    "training": "step",
    "TrainingEstimate": "step",
    "plan": "search",
    "Plan": "search",
    "least_gpus": "search",
    "fit": "calibrate",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    """Load a name of this package when it is first used, so that the command line's help need not wait for numpy."""
    if name not in _WHERE:
        raise AttributeError(name)
    value = getattr(import_module(f"moelab.simulate.{_WHERE[name]}"), name)
    globals()[name] = value
    return value
