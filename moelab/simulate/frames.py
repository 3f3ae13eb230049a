"""The simulator's predictions as tables for notebooks: memory, latency on few GPUs, training, fitted constants."""

from __future__ import annotations

import pandas as pd

from moelab import paper
from moelab.simulate import paper_figures
from moelab.simulate.constants import FREE, calibration
from moelab.simulate.decoding import decode, decode_sweep
from moelab.simulate.hardware import cluster
from moelab.simulate.scoreboard import table3
from moelab.simulate.search import layouts


def memory() -> pd.DataFrame:
    """Return the memory of the layout that needs least, for each variant of the 349B model and GPU count.

    Columns: variant, gpus, gib_per_gpu, fits (on the paper's machines), and the parts of the memory as <part>_gib.
    """
    where = cluster(paper_figures.CLUSTER)
    rows = []
    for variant, model in paper_figures.family("8B").items():
        for gpus in (4, 8, 16, 32, 64, 128):
            sweep = decode_sweep(model, layouts(model, (gpus,), where.gpus_per_node), where, context=2048)
            i = int(sweep.total.argmin())
            parts = {f"{name}_gib": float(size[i]) / 2**30 for name, size in sweep.memory.items()}
            rows.append(
                {
                    "variant": variant,
                    "gpus": gpus,
                    "gib_per_gpu": float(sweep.total[i]) / 2**30,
                    "fits": bool(sweep.fits[i]),
                    **parts,
                }
            )
    return pd.DataFrame(rows)


def few_gpus() -> pd.DataFrame:
    """Return simulated latencies on few GPUs: columns base, variant, gpus, simulated_ms, fits."""
    rows = []
    for base, gpus in (("1.3B", 8), ("2.4B", 8), ("8B", 32)):
        for bar in paper_figures.variants((base,)):
            layout = paper_figures.layout(bar.model, gpus, paper_figures.TENSOR[base], "deepspeed")
            got = decode(bar.model, layout, paper_figures.CLUSTER, context=paper_figures.CONTEXT)
            row = {"base": base, "variant": bar.label.split()[1], "gpus": gpus}
            rows.append({**row, "simulated_ms": got.latency_ms, "fits": got.fits})
    return pd.DataFrame(rows)


def training() -> pd.DataFrame:
    """Return `moelab.simulate`'s prediction of each model of Table 3 on the paper's cluster, a row per model.

    Nothing is fitted to Table 3.
    """
    printed = {row.model: row for row in paper.training_throughput()}
    rows = [
        {
            "model": name,
            "samples/s": step.samples_per_s,
            "TFLOP/s a GPU": step.tflops_per_gpu,
            "GiB a GPU": step.total_gib,
            "fits": step.fits,
            "bound by": step.bound,
            "paper: samples/s": printed[name].samples_per_s,
            "paper: TFLOP/s a GPU": printed[name].tflops_per_gpu,
        }
        for name, step in table3().items()
    ]
    return pd.DataFrame(rows).set_index("model")


def constants() -> pd.DataFrame:
    """Return the value, standard error and bounds of each fitted constant, a row per constant."""
    fit = calibration()
    errors = fit["standard_errors"]
    rows = [
        {
            "constant": name,
            "value": fit["constants"][name],
            "standard error": "at its bound" if errors[name] is None else f"{errors[name]:.0%}",
            "lowest allowed": low,
            "highest allowed": high,
            "why these bounds": why,
        }
        for name, (low, high, why) in FREE.items()
    ]
    return pd.DataFrame(rows)
