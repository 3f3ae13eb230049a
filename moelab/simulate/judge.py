"""The simulator beside the public measurements: `predict` for one row, `rows` with errors and ranges for many.

Each group has one function from a row's settings to the published number. Constants were fitted on a third of the open
rows (`fit`); a prediction's range is the error below which nine of ten open rows of its group lie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from moelab.config.parallel import ParallelConfig
from moelab.simulate import constants as _constants
from moelab.simulate import public, traffic
from moelab.simulate.constants import MODERN_FREE, MODERN_START, Constants
from moelab.simulate.decoding import decode_sweep, distinct_experts
from moelab.simulate.exchange import transfer_us
from moelab.simulate.hardware import cluster
from moelab.simulate.layouts import Layouts
from moelab.simulate.public import Measurement
from moelab.simulate.published import named
from moelab.simulate.serving import full_load, prefill_s, request_s, two_halves_ms
from moelab.simulate.step import training
from moelab.simulate.systems import system

Known = dict[str, Any]
Bounds = dict[str, tuple[float, float, str]]


def exchange(m: Measurement, s: Known, known: Constants) -> float:
    """Return the microseconds of an exchange, or the rate at which DeepEP's tests count its rows."""
    where = cluster(m.cluster)
    ranks, in_node = s["ranks"], min(s["ranks"], where.gpus_per_node)
    if s["kind"] == "even":
        return float(traffic.even(ranks, in_node, 1.0).microseconds(s["size"], where, known)[0])
    scales = s["hidden"] / 128 * 4 if s["bytes"] == 1 else 0  # fp8: a scale of 4 bytes for 128 numbers
    row = s["hidden"] * s["bytes"] + scales
    if s["kind"] == "pairs":
        stage = traffic.pairs(ranks, in_node, s["tokens"], s["top_k"], by_card=s["via"] == "rdma")
        return float(stage.microseconds(row, where, known)[0])
    stage, to_nodes, to_gpus = traffic.grouped(ranks, in_node, s["tokens"], s["top_k"], s["groups"])
    counted = to_nodes if m.metric == "rdma" else to_gpus
    return counted * row / float(stage.microseconds(row, where, known)[0]) / 1e3


def layer(m: Measurement, s: Known, known: Constants) -> float:
    """Return TFLOP/s of grouped products, or the microseconds of an MoE layer's kernels on one GPU."""
    gpu = cluster(m.cluster).gpu
    weight = 1 if s["dtype"] == "fp8" else 2
    bandwidth, rate = gpu.memory_gb_s * known.memory_share, gpu.tflops * known.matmul_share * 1e6 * (2 / weight)
    if s["kind"] == "product":
        groups, rows, n, k = s["groups"], s["rows"], s["n"], s["k"]
        size = groups * (n * k * weight + rows * (k * weight + 2 * n))
        flops = 2.0 * groups * rows * n * k
        return flops / (max(transfer_us(size, bandwidth), flops / rate) + known.product_us) / 1e6
    pairs = s["rows"] * s["top_k"]
    read = float(distinct_experts(s["experts"], s["rows"], s["top_k"]))
    us = 3 * known.kernel_us + 2 * known.product_us  # alignment, activation, sum; two products
    for weights, numbers in (
        (2 * s["hidden"] * s["ffn"], s["hidden"] + 2 * s["ffn"]),
        (s["hidden"] * s["ffn"], s["hidden"] + s["ffn"]),
    ):
        size = read * weights * weight + pairs * numbers * 2
        us += max(transfer_us(size, bandwidth), 2 * pairs * weights / rate)
    return us


def _layout(s: Known) -> Layouts:
    tensor, expert = s.get("tensor", 1), s.get("expert", 0)
    return Layouts([ParallelConfig(tensor=tensor, data=expert or 1, expert=expert, gpus_per_node=max(8, tensor))])


def decode(m: Measurement, s: Known, known: Constants) -> float:
    """Return a step (ms), a request (s), tokens a second of one sequence, or of a node."""
    model, where = named(s["model"]), cluster(m.cluster)
    layouts = _layout(s)
    code = system("engine" if "expert" in s else "engine-tp")
    if m.system == "vLLM":  # its engine until 2025, V0
        code = replace(code, scheduler=True)
    options: Known = {"dtype": s["dtype"], "constants": known}
    if m.metric == "request":
        sizes = {name: s[name] for name in ("batch", "prompt", "output")}
        return request_s(model, layouts, where, code, **sizes, **options)
    halves = bool(s.get("overlap"))
    batch = s["batch"] // (2 if halves else 1)
    sweep = decode_sweep(model, layouts, where, program=code, batch=batch, context=s["cache"], **options)
    ms = float((two_halves_ms(sweep) if halves else sweep.latency_ms)[0])
    return {"step": ms, "tokens": s["batch"] / ms * 1e3, "node": s["batch"] * where.gpus_per_node / ms * 1e3}[m.metric]


def prefill(m: Measurement, s: Known, known: Constants) -> float:
    """Return the prompt tokens a second of a node."""
    where = cluster(m.cluster)
    seconds = prefill_s(
        named(s["model"]),
        _layout(s),
        where,
        system("engine"),
        tokens=s["tokens"],
        prompt=s["prompt"],
        dtype=s["dtype"],
        halves=bool(s["overlap"]),
        constants=known,
    )
    return s["tokens"] * where.gpus_per_node / seconds


def serving(m: Measurement, s: Known, known: Constants) -> float:
    """Return the output tokens a second of all GPUs at full load."""
    sizes = {"prompt": s["prompt"], "output": s["output"], "dtype": s["dtype"]}
    code = system("engine")
    return full_load(named(s["model"]), _layout(s), cluster(m.cluster), code, **sizes, constants=known)[1]


def train(m: Measurement, s: Known, known: Constants) -> float:
    """Return tokens a second of a GPU, or the seconds of a step."""
    ranks = s["gpus"] // s["pipeline"]
    parallel = ParallelConfig(
        tensor=s["tensor"],
        data=ranks // s["tensor"],
        expert=s["expert"],
        gpus_per_node=min(8, ranks),
        exchange="coordinated",
        recompute=bool(s.get("recompute")),
    )
    got = training(
        replace(named(s["model"]), context=s["sequence"]),
        parallel,
        m.cluster,
        batch=s["batch"],
        micro_batch=s["micro"],
        program="megatron",
        zero=2,
        pipeline=s["pipeline"],
        chunks=s["chunks"],
        dtype=s["dtype"],
        overlap=bool(s.get("overlap", 1)),
        constants=known,
    )
    return got.step_s if m.metric == "step" else got.tokens_per_s / s["gpus"]


PREDICT: dict[str, Callable[[Measurement, Known, Constants], float]] = {
    "exchange": exchange,
    "layer": layer,
    "decode": decode,
    "prefill": prefill,
    "serving": serving,
    "training": train,
}


def predict(m: Measurement, constants: Constants | None = None) -> float:
    """Return the simulator's value of a row, in the row's unit."""
    return PREDICT[m.group](m, m.known, constants or _constants.modern())


def fit() -> dict[str, Any]:
    """Fit the constants of `MODERN_FREE` on `public.fitted_on`, group by group.

    Returns:
        The content of `calibration_modern.json`: `constants`, `at_bound`, `fitted_on`, `method`, `rows` (id and the
        logarithm of simulated over published time).
    """
    known, at_bound = MODERN_START, []
    for groups, free in MODERN_FREE.items():
        used = [m for m in public.fitted_on() if m.group in groups.split()]
        values, x = _fit_group(used, free, known)
        known = known.with_free(values)
        at_bound += [n for n, at in zip(free, x, strict=True) if not 0.005 < at < 0.995]
    return {
        "constants": {n: getattr(known, n) for free in MODERN_FREE.values() for n in free},
        "at_bound": at_bound,
        "fitted_on": "open rows of public.csv whose id has a SHA-256 divisible by 3",
        "method": "scipy.optimize.least_squares on log(simulated / published), soft L1 from 10 %, group by group",
        "rows": {m.id: round(log_ratio(m, known), 3) for m in public.fitted_on()},
    }


def _fit_group(
    used: Sequence[Measurement], free: Bounds, before: Constants
) -> tuple[dict[str, float], Sequence[float]]:
    """Return the values of the free constants that fit the rows best, and where they lie between their bounds."""
    from scipy.optimize import least_squares

    low, high = (np.array([bounds[i] for bounds in free.values()]) for i in (0, 1))

    def values(x: np.ndarray) -> dict[str, float]:
        found = (low + x * (high - low)).tolist()
        return {name: float(f"{round(value, 6):.4g}") for name, value in zip(free, found, strict=True)}

    def residuals(x: np.ndarray) -> np.ndarray:
        now = before.with_free(dict(zip(free, (low + x * (high - low)).tolist(), strict=True)))
        return np.array([log_ratio(m, now) for m in used])

    settings: dict[str, Any] = {"bounds": (0, 1), "loss": "soft_l1", "f_scale": 0.1, "diff_step": 1e-3}
    starts = (np.full(len(free), x) for x in (0.2, 0.5))
    found = min((least_squares(residuals, x, **settings) for x in starts), key=lambda r: r.cost)
    return values(found.x), found.x.tolist()


CONFIDENCE = 0.9
FEW = 20


def half_widths(constants: Constants | None = None) -> dict[str, float]:
    """Return for each group how far, as |log|, a prediction may be off: what nine of ten open rows keep.

    The quantile is that of a new row (conformal, (n + 1) / n of the level). Groups of fewer than `FEW` open rows take
    that of all open rows if it is larger.
    """
    errors = {m.id: abs(log_ratio(m, constants)) for m in public.half("open")}

    def quantile(values: list[float]) -> float:
        level = min(1.0, CONFIDENCE * (len(values) + 1) / len(values))
        return float(np.quantile(values, level, method="higher"))

    every = quantile(list(errors.values()))
    found = {}
    for group in public.GROUPS:
        own = [errors[m.id] for m in public.half("open") if m.group == group]
        found[group] = max(quantile(own), every) if len(own) < FEW else quantile(own)
    return found


def rows(which: Sequence[Measurement], constants: Constants | None = None) -> list[dict[str, Any]]:
    """Return a row for each measurement: what was published, what is simulated, its range, the error, and the half.

    `error_percent` is that of the time: above 0, the simulator is too slow.
    """
    widths, fitted, halves = half_widths(constants), public.fitted_on(), public.halves()
    found = []
    for m in which:
        simulated, ratio = predict(m, constants), log_ratio(m, constants)
        factor = float(np.exp(widths[m.group]))
        found.append(
            {
                "id": m.id,
                "group": m.group,
                "system": m.system,
                "cluster": m.cluster,
                "settings": m.settings,
                "published": m.value,
                "simulated": simulated,
                "low": simulated / factor,
                "high": simulated * factor,
                "unit": m.unit,
                "error_percent": 100 * float(np.expm1(ratio)),
                "within": abs(ratio) <= widths[m.group],
                "kind": "fitted" if m in fitted else halves[m.series],
                "source": m.source,
                "place": m.place,
                "assumed": m.assumed,
            }
        )
    return found


def summary(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each group and half: how many, median and worst error of the time, and how many within range."""
    table = []
    for group in public.GROUPS:
        for half, kinds in (("open", ("fitted", "open")), ("sealed", ("sealed",))):
            part = [r for r in found if r["group"] == group and r["kind"] in kinds]
            if part:
                worst = max(part, key=lambda r: abs(np.log1p(r["error_percent"] / 100)))
                table.append(
                    {
                        "group": group,
                        "half": half,
                        "rows": len(part),
                        "median_error_percent": float(np.median([abs(r["error_percent"]) for r in part])),
                        "worst_error_percent": worst["error_percent"],
                        "worst": worst["id"],
                        "within": sum(r["within"] for r in part),
                        "range_factor": part[0]["high"] / part[0]["simulated"],
                    }
                )
    return table


def log_ratio(m: Measurement, constants: Constants | None = None) -> float:
    """Return log(simulated time / published time): above 0, the simulator is too slow."""
    ratio = float(np.log(predict(m, constants) / m.value))
    return -ratio if m.more_is_better else ratio
