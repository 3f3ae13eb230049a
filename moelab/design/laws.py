"""Fit the losses of a family of models over their size and their training tokens, and invert the fit.

The law is Kaplan's (arXiv 2001.08361, eq. 1.5) above a floor, with the training FLOPs of a token F in place of the
parameters, so that an MoE and a dense model of the same F cost the same:

    loss(F, D) = floor + (s ** (1 / beta) + d ** (1 / beta)) ** beta        D training tokens
             s = a (F / F0) ** -alpha,  d = b (D / D0) ** -beta

The larger of the two terms decides: where tokens are few, a larger model hardly helps, and the reverse. In Chinchilla's
law, the sum of both terms (arXiv 2203.15556), it helps as much at any number of tokens. F0 and D0 are constants of a
fit that keep its numbers near 1. Along the best sizes for each compute C = F D the loss above the floor falls as C **
-(alpha beta / (alpha + beta)), the law's *exponent*.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from moelab.lazy import pd
from moelab.statistics import ALPHA

PARAMETERS = 5
DRAWS = 400
"""Refits from which the intervals come."""


@dataclass(frozen=True)
class Law:
    """Hold a fitted law; losses in nats per token, `flops` are training FLOPs of a token."""

    floor: float
    a: float
    alpha: float
    b: float
    beta: float
    flops0: float
    tokens0: float

    def loss(self, flops: float | np.ndarray, tokens: float | np.ndarray) -> np.ndarray:
        """Return the loss of models of a size after a number of tokens."""
        size, data = self.terms(flops, tokens)
        return self.floor + np.exp(np.logaddexp(size / self.beta, data / self.beta) * self.beta)

    def terms(self, flops: float | np.ndarray, tokens: float | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the logarithms of s and d: what is left above the floor with endless tokens, and at endless size."""
        size = math.log(self.a) - self.alpha * np.log(np.asarray(flops) / self.flops0)
        return size, math.log(self.b) - self.beta * np.log(np.asarray(tokens) / self.tokens0)

    @property
    def exponent(self) -> float:
        """Return the exponent of the loss above the floor over compute, along the best sizes."""
        return self.alpha * self.beta / (self.alpha + self.beta)

    def best(self, loss: float) -> tuple[float, float]:
        """Return the size (training FLOPs of a token) and the training tokens that reach a loss with the least FLOPs.

        Both are infinite at the floor and below it.
        """
        above = loss - self.floor
        if above <= 0:
            return math.inf, math.inf
        # The least is where a percent more of either size or tokens lowers the loss alike: where s ** (1 / beta) is to
        # d ** (1 / beta) as beta is to alpha.
        both = self.alpha + self.beta
        size, data = (above * (share / both) ** self.beta for share in (self.beta, self.alpha))
        return self.flops0 * (self.a / size) ** (1 / self.alpha), self.tokens0 * (self.b / data) ** (1 / self.beta)

    def compute(self, loss: float) -> float:
        """Return the least training FLOPs to a loss, over all sizes; infinite at the floor and below it."""
        return math.prod(self.best(loss))


@dataclass(frozen=True)
class Fit:
    """Hold the law of a family and what is known of its error.

    Attributes:
        law: fitted to all points.
        misfit: nats by which the points lie above the law at each number of tokens (ascending), mean over trunks.
        draws: refits to points whose residuals were drawn anew, whole trunks at a time.
        residuals: nats, of each trunk (a row) from law and misfit at each number of tokens (a column).
    """

    law: Law
    misfit: np.ndarray
    draws: tuple[Law, ...]
    residuals: np.ndarray

    def interval(self, value: Callable[[Law], float]) -> tuple[float, float, float]:
        """Return a value of the law with the bounds of its interval, from the refits."""
        return value(self.law), *bounds([value(law) for law in self.draws])

    def spread(self, seeds: int, stream: int = 0) -> np.ndarray:
        """Return by how much means over so many seeds miss law and misfit, drawn from the residuals of the fitted runs.

        Args:
            stream: of random numbers; means of different runs take different ones.

        Returns:
            Nats: a row for each refit, a column for each number of tokens.
        """
        draw = np.random.default_rng([1, stream])
        return np.array([self.residuals[draw.integers(len(self.residuals), size=seeds)].mean(0) for _ in self.draws])

    def predict(self, flops: float, tokens: Sequence[float], seeds: int) -> list[tuple[float, float, float]]:
        """Return the losses that runs of a size will have, means over seeds, each with the bounds of its interval.

        They are the law's, and its misfit at as many tokens, which is taken to be the same for all sizes. The interval
        holds the error of the law and that of so many seeds (`spread`).

        Args:
            tokens: as many as the fitted trunks had budgets, ascending.
        """
        value, *draws = (law.loss(flops, np.asarray(tokens)) + self.misfit for law in (self.law, *self.draws))
        low, high = np.quantile(draws + self.spread(seeds), [ALPHA / 2, 1 - ALPHA / 2], axis=0)
        return list(zip(value.tolist(), low.tolist(), high.tolist(), strict=True))


def bounds(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """Return the bounds of the 95 % interval from values of refits, infinite ones among them."""
    low, high = np.quantile(values, [ALPHA / 2, 1 - ALPHA / 2], method="nearest")
    return float(low), float(high)


def fit(points: pd.DataFrame, draws: int = 0) -> Fit:
    """Fit a family's law by least squares, and again to points with residuals drawn anew.

    The budgets of a trunk share most of their training, so residuals are drawn a whole trunk at a time. They are
    widened for what a trunk's mean cannot show of the size's share of the law (floor, a, alpha), and because the spread
    of few trunks is itself uncertain (Student's t beside the normal distribution).

    Args:
        points: columns flops (training FLOPs of a token), seed, tokens, loss. Sizes and seeds with a missing or
            non-finite loss are left out.
        draws: refits; 0 takes `DRAWS`.

    Raises:
        ValueError: one line: there are not more points than parameters, or fewer than three sizes or budgets.
    """
    from scipy.special import ndtri, stdtrit

    table = points.pivot(index=["flops", "seed"], columns="tokens", values="loss")
    table = table[np.isfinite(table).all(axis=1)]
    flops, tokens = table.index.get_level_values("flops").to_numpy(float), table.columns.to_numpy(float)
    sizes = len(set(flops))
    if table.size <= PARAMETERS or sizes < 3 or len(tokens) < 3:
        raise ValueError(
            f"a law of {PARAMETERS} numbers needs three sizes and three budgets, got {sizes} and {len(tokens)}"
        )
    law = _fit(flops[:, None], tokens[None, :], table.to_numpy(), None)
    fitted = law.loss(flops[:, None], tokens[None, :])
    misfit, trunks = (table.to_numpy() - fitted).mean(0), len(table)
    left = max(trunks - 3, 1)
    wider = math.sqrt(trunks / left) * float(stdtrit(left, 0.025) / ndtri(0.025))
    residuals = (table.to_numpy() - fitted - misfit) * wider
    draw = np.random.default_rng(0)
    drawn = [residuals[draw.integers(trunks, size=trunks)] for _ in range(draws or DRAWS)]
    laws = tuple(_fit(flops[:, None], tokens[None, :], fitted + some, law) for some in drawn)
    return Fit(law, misfit, laws, residuals)


def _fit(flops: np.ndarray, tokens: np.ndarray, losses: np.ndarray, start: Law | None) -> Law:
    from scipy.optimize import least_squares

    flops0, tokens0 = (float(np.exp(np.log(values).mean())) for values in (flops, tokens))
    lowest = float(losses.min())

    def law(x: np.ndarray) -> Law:
        floor, a, alpha, b, beta = x
        return Law(float(floor), math.exp(a), math.exp(alpha), math.exp(b), math.exp(beta), flops0, tokens0)

    def residuals(x: np.ndarray) -> np.ndarray:
        return (law(x).loss(flops, tokens) - losses).ravel()

    def slopes(x: np.ndarray) -> np.ndarray:
        """Return the derivatives of the residuals (rows) by the five numbers."""
        one = law(x)
        size, data = one.terms(flops, tokens)
        above = one.loss(flops, tokens) - one.floor
        share = 1 / (1 + np.exp(np.clip((data - size) / one.beta, -700, 700)))  # of the size's term, to 1 / beta
        by_size, by_data = above * share, above * (1 - share)
        order = above * np.log(above) - by_size * size - by_data * data
        by_beta = order - by_data * one.beta * np.log(tokens / tokens0)
        by = (1.0, by_size, -by_size * one.alpha * np.log(flops / flops0), by_data, by_beta)
        return np.stack([np.broadcast_to(part, losses.shape).ravel() for part in by], axis=1)

    if start is not None:
        starts = [[start.floor, *map(math.log, (start.a, start.alpha, start.b, start.beta))]]
    else:
        starts = [
            [share * lowest, *map(math.log, (a * (1 - share) * lowest, alpha, b * (1 - share) * lowest, beta))]
            for share in (0.1, 0.6)
            for a, b in ((0.5, 1.0), (1.0, 0.5))
            for alpha, beta in ((0.15, 0.2), (0.2, 0.5), (0.5, 0.3))
        ]
    # The exponents stay between 0.01 and 3: outside, a term is a constant or a step, and the floor takes its place.
    low, high = [0.0, -12.0, math.log(0.01), -12.0, math.log(0.01)], [lowest, 4.0, math.log(3), 4.0, math.log(3)]
    # A fit to points that follow the law settles within 100 steps.
    solutions = [least_squares(residuals, np.clip(x, low, high), slopes, (low, high), max_nfev=100) for x in starts]
    return law(min(solutions, key=lambda one: one.cost).x)
