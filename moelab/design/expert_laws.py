"""Fit losses over a model's size and its number of experts, and carry the fit to models of others.

The forms of a law, with N the parameters that a token passes (without embeddings) and E the experts of a routed layer:

- `separable`: ln loss = a ln N + b ln E + d (Clark et al., arXiv 2202.01169, eq. 1).
- `bilinear`: ln loss = a ln N + b ln Ê + c ln N ln Ê + d (their eq. 2), with Ê saturating in E (`saturated`).
- `effective`: loss = dense(r N), with the dense curve floor + e^d N^a, and r = (Ê / Ê(1))^b the factor of parameters
  that experts are worth: the *effective parameter count* over N. It is the same at every size.
- `regression`: loss = dense(N) + (b + c ln N) ln E.

All are of one number of training tokens. What experts do is a law's `effect`, zero for a dense model. `Law.gain`
carries it to other models: as a ratio of losses (`separable`, `bilinear`), as a factor of parameters along their own
dense curve (`effective`), or in nats (`regression`). N is in millions inside a law.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from moelab.lazy import np, pd
from moelab.statistics import ALPHA

Form = Literal["separable", "bilinear", "effective", "regression"]
FORMS: tuple[Form, ...] = get_args(Form)

DRAWS = 300
"""Refits behind an interval."""

_MOST = 32768.0
"""Largest value that Ê may saturate at: 64 times the most experts that are asked for."""

STARTS = (1.0, 4.0)
"""Range of Ê at E = 1 where no data between 1 and 16 experts tells it: refits draw it evenly on a logarithmic scale."""


class Curve(Protocol):
    """A dense curve: losses over parameters."""

    def loss(self, parameters: np.ndarray | float) -> np.ndarray:
        """Return losses in nats of dense models."""
        ...

    def parameters(self, loss: np.ndarray | float) -> np.ndarray:
        """Return the parameters of the dense model of a loss; infinite at the floor and below."""
        ...


@dataclass(frozen=True)
class DenseCurve:
    """Hold losses of dense models, ``floor + e^d (N / 10^6)^a``."""

    floor: float
    a: float
    d: float

    def loss(self, parameters: np.ndarray | float) -> np.ndarray:
        """Return losses in nats of dense models."""
        return self.floor + np.exp(self.d + self.a * np.log(np.asarray(parameters, dtype=float) / 1e6))

    def parameters(self, loss: np.ndarray | float) -> np.ndarray:
        """Return the parameters of the dense model of a loss; infinite at the floor and below."""
        above = np.asarray(loss, dtype=float) - self.floor
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return np.where(above > 0, 1e6 * np.exp((np.log(above) - self.d) / self.a), np.inf)


def saturated(experts: np.ndarray | float, start: float, most: float) -> np.ndarray:
    """Return Ê of a number of experts E, from `start` at E = 1 towards `most` (Clark et al., section 5.2)."""
    return 1 / (1 / (np.asarray(experts, dtype=float) - 1 + 1 / (1 / start - 1 / most)) + 1 / most)


@dataclass(frozen=True)
class Law:
    """Hold a fitted law, see the module for its forms."""

    form: Form
    a: float
    b: float
    c: float
    d: float
    floor: float
    start: float
    most: float

    @property
    def dense(self) -> DenseCurve:
        """Return the law's own dense curve."""
        if self.form == "bilinear":  # Ê(1) is not 1, so that ln Ê is not 0 for a dense model
            return DenseCurve(0.0, self.a + self.c * math.log(self.start), self.d + self.b * math.log(self.start))
        return DenseCurve(self.floor, self.a, self.d)

    def effect(self, parameters: np.ndarray | float, experts: np.ndarray | float) -> np.ndarray:
        """Return what experts do: ln of the ratio of losses, ln of the factor of parameters, or nats, by the form."""
        size, experts = np.log(np.asarray(parameters, dtype=float) / 1e6), np.asarray(experts, dtype=float)
        if self.form in ("bilinear", "effective"):
            count = np.log(saturated(experts, self.start, self.most) / self.start)
        else:
            count = np.log(experts)
        return (self.b + self.c * size) * count

    def gain(
        self, parameters: np.ndarray | float, experts: np.ndarray | float, curve: Curve, times: np.ndarray | float = 1.0
    ) -> np.ndarray:
        """Return by how many nats models with experts end below dense ones of `curve`.

        Args:
            times: what the effect is multiplied by.
        """
        effect, dense = times * self.effect(parameters, experts), curve.loss(parameters)
        if self.form == "effective":
            return dense - curve.loss(np.asarray(parameters, dtype=float) * np.exp(effect))
        return -effect if self.form == "regression" else dense * (1 - np.exp(effect))

    def loss(self, parameters: np.ndarray | float, experts: np.ndarray | float) -> np.ndarray:
        """Return losses in nats, of dense models at E = 1."""
        return self.dense.loss(parameters) - self.gain(parameters, experts, self.dense)


@dataclass(frozen=True)
class Fit:
    """Hold a law and what is known of its error.

    Attributes:
        law: fitted to all runs.
        draws: refits to losses that were drawn anew (`fit`), Ê(1) drawn too where the data cannot tell it.
        scatter: standard deviation over settings of the measured effect over the law's, as a share of the latter.
        freedom: degrees of freedom of the scatter.
    """

    law: Law
    draws: tuple[Law, ...]
    scatter: float
    freedom: int

    def predict(
        self,
        parameters: Sequence[float],
        experts: Sequence[float],
        curve: Curve,
        stream: int = 0,
        times: np.ndarray | None = None,
    ) -> np.ndarray:
        """Return the gains of models over the dense ones of `curve`, nats, with 95 % intervals of a single setting.

        The interval holds the error of the law and the scatter of settings about it (Student's t).

        Args:
            stream: of random numbers.
            times: what the effect is multiplied by, a row for the law and one for each of `draws`, a column a model.

        Returns:
            A row a model: value, low, high.
        """
        draw = np.random.default_rng([2, stream])
        size, count = np.asarray(parameters, dtype=float), np.asarray(experts, dtype=float)
        share = np.ones((1 + len(self.draws), len(size))) if times is None else times
        spread = 1 + self.scatter * draw.standard_t(self.freedom, size=(len(self.draws), len(size)))
        gains = [law.gain(size, count, curve, t) for law, t in zip(self.draws, spread * share[1:], strict=True)]
        low, high = np.quantile(gains, [ALPHA / 2, 1 - ALPHA / 2], axis=0)
        return np.column_stack([self.law.gain(size, count, curve, share[0]), low, high])


def fit_dense(parameters: Sequence[float], losses: Sequence[float]) -> DenseCurve:
    """Fit ``floor + e^d N^a`` to dense models by least squares of ln loss, from several starts.

    Raises:
        ValueError: one line: fewer than three sizes.
    """
    from scipy.optimize import least_squares

    size, loss = np.log(np.asarray(parameters, dtype=float) / 1e6), np.asarray(losses, dtype=float)
    if len(set(size)) < 3:
        raise ValueError(f"a dense curve needs three sizes, got {len(set(size))}")

    def residuals(x: np.ndarray) -> np.ndarray:
        return np.log(x[0] + np.exp(x[2] + x[1] * size)) - np.log(loss)

    bounds = ([0.0, -2.0, -12.0], [0.99 * loss.min(), -0.005, 8.0])
    starts = [[s * loss.min(), a, math.log((1 - s) * loss.mean())] for s in (0.1, 0.6) for a in (-0.1, -0.4)]
    found = min((least_squares(residuals, x, bounds=bounds, xtol=1e-12, ftol=1e-12) for x in starts), key=_cost)
    return DenseCurve(*map(float, found.x))


def fit(runs: pd.DataFrame, form: Form, draws: int = 0, *, pooled: bool = False) -> Fit:
    """Fit a law by least squares of ln loss, with refits for intervals.

    Args:
        runs: columns parameters, experts (1 is dense), loss (nats).
        draws: refits; 0 takes `DRAWS`.
        pooled: refit to means drawn with the spread of all settings together (`redrawn`), else to a bootstrap of the
            runs within each setting, which understates the spread of few seeds; the first prediction was made so.

    Raises:
        ValueError: one line: too few settings for the form's numbers.
    """
    cells = [part["loss"].to_numpy(float) for _, part in runs.groupby(["parameters", "experts"], sort=True)]
    keys = np.array(sorted(set(zip(runs["parameters"], runs["experts"], strict=True))), dtype=float)
    routed, free = keys[keys[:, 1] > 1], _told(keys)
    numbers = {"separable": 1, "bilinear": 3, "effective": 2, "regression": 2}[form] + (free and form in _SATURATING)
    if len(routed) <= numbers or len(set(keys[keys[:, 1] == 1, 0])) < 3:
        raise ValueError(f"a {form} law needs more than {numbers} settings with experts and three dense sizes")
    middle = math.sqrt(math.prod(STARTS))
    law = _fit(keys, [c.mean() for c in cells], [len(c) for c in cells], form, None if free else middle)
    draw = np.random.default_rng(0)
    again = []
    for _ in range(draws or DRAWS):
        means = redrawn(cells, draw) if pooled else [draw.choice(c, len(c)).mean() for c in cells]
        start = None if free else math.exp(draw.uniform(*np.log(STARTS)))
        again.append(_fit(keys, means, [len(c) for c in cells], form, start, law))
    scatter, freedom = _scatter(law, keys, np.array([c.mean() for c in cells]), numbers)
    return Fit(law, tuple(again), scatter, freedom)


def redrawn(cells: Sequence[np.ndarray], draw: np.random.Generator) -> list[float]:
    """Return mean losses of settings as other seeds could have given them, in nats.

    Runs of all settings share one variance, estimated within settings; it is drawn too (from its chi-square), so that
    a mean moves by Student's t. Settings of one run add nothing to the estimate and move by it.

    Args:
        cells: losses of the runs of each setting.
        draw: source of random numbers.

    Raises:
        ValueError: one line: no setting has two runs.
    """
    freedom = sum(len(c) - 1 for c in cells)
    if freedom < 1:
        raise ValueError("a spread over seeds needs a setting with two runs")
    variance = math.fsum(float(((c - c.mean()) ** 2).sum()) for c in cells) / draw.chisquare(freedom)
    return [float(c.mean() + draw.normal(0, math.sqrt(variance / len(c)))) for c in cells]


_SATURATING = ("bilinear", "effective")

# Of a, b, c, d, floor, ln Ê(1), ln(Ê's most - Ê(1)): bounds, and which are a form's own numbers.
_LOW, _HIGH = (-2.0, -3.0, -2.0, -12.0, 0.0, 0.0, 0.0), (-0.005, 3.0, 2.0, 8.0, math.inf, math.log(8), math.log(_MOST))
_OWN = {"separable": (0, 1, 3), "bilinear": (0, 1, 2, 3, 5, 6), "effective": (0, 1, 3, 4, 5, 6), "regression": range(5)}


def _cost(found: object) -> float:
    return float(found.cost)  # type: ignore[attr-defined]


def _told(keys: np.ndarray) -> bool:
    """Return whether settings between 1 and 16 experts tell Ê at E = 1."""
    return bool(((keys[:, 1] > 1) & (keys[:, 1] < 16)).any())


def _law(own: np.ndarray, form: Form, start: float | None) -> Law:
    x = np.zeros(len(_LOW))
    x[_free(form, start)] = own
    a, b, c, d, floor, log_start, log_most = map(float, x)
    if form not in _SATURATING:
        return Law(form, a, b, c, d, floor, 1.0, math.inf)
    start = math.exp(log_start) if start is None else start
    return Law(form, a, b, c, d, floor, start, start + math.exp(log_most))


def _free(form: Form, start: float | None) -> list[int]:
    return [i for i in _OWN[form] if i != 5 or start is None]


def _fit(
    keys: np.ndarray,
    means: Sequence[float],
    counts: Sequence[int],
    form: Form,
    start: float | None,
    near: Law | None = None,
) -> Law:
    """Fit one law to the mean losses of settings, weighed by their runs.

    Args:
        start: Ê at E = 1, None to fit it.
        near: begin here alone, in place of several starts.
    """
    from scipy.optimize import least_squares

    size, experts, loss = keys[:, 0], keys[:, 1], np.asarray(means, dtype=float)
    weight, free = np.sqrt(np.asarray(counts, dtype=float)), _free(form, start)

    def residuals(own: np.ndarray) -> np.ndarray:
        return weight * (np.log(np.maximum(_law(own, form, start).loss(size, experts), 1e-3)) - np.log(loss))

    low, high = np.array(_LOW), np.minimum(_HIGH, [math.inf] * 4 + [0.99 * loss.min()] + [math.inf] * 2)
    if near is not None:
        most = math.log(near.most - near.start) if math.isfinite(near.most) else 0.0
        starts = [[near.a, near.b, near.c, near.d, near.floor, math.log(near.start), most]]
    else:
        starts = [
            [a, 0.3 if form == "effective" else -0.05, 0.0, math.log((1 - s) * loss.max()), floor, 0.4, math.log(most)]
            for s in ((0.1, 0.6) if 4 in free else (0.0,))
            for floor in (s * loss.min(),)
            for a in (-0.1, -0.4)
            for most in ((50.0, 400.0) if 6 in free else (1.0,))
        ]
    inside = [np.clip(x, low + 1e-9, high - 1e-9)[free] for x in starts]
    bounds = (low[free], high[free])
    solutions = [least_squares(residuals, x, bounds=bounds, x_scale="jac", max_nfev=300) for x in inside]
    return _law(min(solutions, key=_cost).x, form, start)


def _scatter(law: Law, keys: np.ndarray, means: np.ndarray, numbers: int) -> tuple[float, int]:
    """Return the spread over settings of the measured effect over the law's, less one, and its degrees of freedom.

    A setting's effect is measured against dense runs of its size where there are any, else against the law's curve.
    """
    dense = {size: mean for (size, experts), mean in zip(keys, means, strict=True) if experts == 1}
    shares = []
    for (size, experts), mean in zip(keys, means, strict=True):
        if experts > 1:
            curve = law.dense
            base, expected = dense.get(size, float(curve.loss(size))), float(law.effect(size, experts))
            if law.form == "effective":
                measured = math.log(float(curve.parameters(float(curve.loss(size)) - base + mean)) / size)
            else:
                measured = mean - base if law.form == "regression" else math.log(mean / base)
            shares.append(measured / expected - 1 if expected else math.inf)
    freedom = max(len(shares) - numbers, 1)
    return math.sqrt(math.fsum(s * s for s in shares) / freedom), freedom
