"""Fit the free constants on the paper's 52B scaling figure (arXiv Fig 10), and on nothing else.

The figure has eight latencies: two systems on 8, 16, 32 and 64 GPUs. Its throughputs carry the same information (8
tokens per step and GPU). The fit is one of least squares of log(predicted / reported), so that every bar weighs by its
relative error; `FREE` gives the bounds.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moelab.simulate import paper_figures
from moelab.simulate.constants import FREE, Constants


def fit(
    bars: list[paper_figures.Bar] | None = None, start: Constants | None = None, held: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Fit the constants of `FREE` on bars, except those in `held`, which keep their value in `start`.

    Args:
        bars: by default those of Fig 10.

    Returns:
        The content of `calibration.json`: `constants` (free ones only), `standard_errors` (of their logarithms,
        linearised; so they are relative), `at_bound` (names that ended at a bound), `bars` (each with the paper's and
        our latency), `fitted_on`, `method`.
    """
    from scipy.optimize import least_squares

    bars = paper_figures.fig10() if bars is None else bars
    names = [n for n in FREE if n not in held]
    low = np.log([FREE[n][0] for n in names])
    high = np.log([FREE[n][1] for n in names])
    first = start or Constants()
    target = np.log([bar.paper_ms for bar in bars if bar.paper_ms])

    def residuals(x: np.ndarray) -> np.ndarray:
        known = first.with_free(dict(zip(names, np.exp(x), strict=True)))
        return np.log([bar.simulate(constants=known).latency_ms for bar in bars]) - target

    # The model's maxima are not differentiable everywhere; a second start keeps the fit from stopping at such a point.
    starts = [np.log([getattr(first, n) for n in names]), (low + high) / 2]
    found = min(
        (least_squares(residuals, x, bounds=(low, high), diff_step=1e-3, xtol=1e-7, ftol=1e-9) for x in starts),
        key=lambda r: r.cost,
    )
    values = dict(zip(names, (round(float(v), 4) for v in np.exp(found.x)), strict=True))
    known = first.with_free(values)
    freedom = max(1, len(bars) - len(names))
    spread = np.linalg.pinv(found.jac.T @ found.jac) * (2 * found.cost / freedom)
    at_bound = [n for n, x, a, b in zip(names, found.x, low, high, strict=True) if min(x - a, b - x) < 1e-3]
    return {
        "constants": values,
        "standard_errors": {
            n: None if n in at_bound else round(float(np.sqrt(s)), 4)
            for n, s in zip(names, np.diag(spread), strict=True)
        },
        "at_bound": at_bound,
        "fitted_on": "arXiv 2201.05596 Fig 10: latency of 1.3B+MoE-128 on 8 to 64 GPUs, PyTorch and DeepSpeed-MoE",
        "method": "scipy.optimize.least_squares on log(simulated / paper), bounded",
        "bars": [
            {
                "system": bar.system,
                "gpus": bar.gpus,
                "paper_ms": bar.paper_ms,
                "simulated_ms": round(bar.simulate(constants=known).latency_ms, 3),
            }
            for bar in bars
        ],
    }
