"""How good the paper's models are: zero-shot accuracy and validation loss."""

from __future__ import annotations

from dataclasses import dataclass, fields

from moelab.lazy import pd
from moelab.paper._table import Provenance, Table, load

TASKS = ("lambada", "piqa", "boolq", "race_h", "triviaqa", "webqs")
"""The six zero-shot tasks of Tables 2, 4 and 5, as columns of `zero_shot()`."""


@dataclass(frozen=True, kw_only=True)
class ZeroShot(Provenance):
    """Zero-shot scores of one trained model, in percent; `None` where not printed.

    Scores are accuracy, for triviaqa and webqs exact match.

    run: the run label, unique together with corpus. model: the architecture's name, empty for models of other papers.
    group: `paper` or the related work the row quotes. corpus: `internal`, `pile` or the other authors' own.
    quoted_average: the average the text prints, if any.
    """

    run: str
    model: str
    group: str
    corpus: str
    stated_B: float
    lambada: float | None
    piqa: float | None
    boolq: float | None
    race_h: float | None
    triviaqa: float | None
    webqs: float | None
    quoted_average: float | None

    @property
    def scores(self) -> dict[str, float]:
        """Score in percent by task, the printed ones only."""
        return {task: getattr(self, task) for task in TASKS if getattr(self, task) is not None}

    @property
    def average(self) -> float | None:
        """Mean of the six printed scores in percent, our arithmetic; `None` unless all six are there."""
        scores = self.scores
        return sum(scores.values()) / len(TASKS) if len(scores) == len(TASKS) else None


def zero_shot(run: str | None = None, corpus: str | None = None) -> Table[ZeroShot]:
    """Tables 2, 4 and 5 and the public-Pile numbers of the tutorial; ValueError for a run or corpus that has none."""
    return load("zero_shot.csv", ZeroShot).where(run=run, corpus=corpus)


@dataclass(frozen=True, kw_only=True)
class LossPoint(Provenance):
    """Validation loss (nats per token, lower is better) read off Fig 1.

    tokens_B: billions of training tokens. kind: `point` (median over a window of 2.5 to 4 billion tokens on either
    side) or `final` (median of the last 10 billion tokens, 290 to 300). loss_low, loss_high: the reading's range.
    """

    model: str
    kind: str
    tokens_B: float
    loss: float
    loss_low: float
    loss_high: float


def loss_points() -> Table[LossPoint]:
    """Every validation-loss reading, one row each."""
    return load("val_loss.csv", LossPoint)


@dataclass(frozen=True, kw_only=True)
class LossCurve(Provenance):
    """One model's validation-loss curve: loss in nats per token against billions of training tokens.

    uncertainty: half-width of each reading, in nats per token. final: median of the last 10 billion tokens; its band,
    from final_low to final_high, is the range of the curve's noise there, not a spread over seeds.
    """

    model: str
    tokens_B: tuple[float, ...]
    loss: tuple[float, ...]
    uncertainty: tuple[float, ...]
    final: float
    final_low: float
    final_high: float

    def minus(self, other: LossCurve) -> list[tuple[float, float, float, float]]:
        """Return tokens_B, difference of losses, and the range of the difference where both curves were read."""
        theirs = dict(zip(other.tokens_B, zip(other.loss, other.uncertainty, strict=True), strict=True))
        return [
            (tokens, gap := loss - theirs[tokens][0], gap - wide - theirs[tokens][1], gap + wide + theirs[tokens][1])
            for tokens, loss, wide in zip(self.tokens_B, self.loss, self.uncertainty, strict=True)
            if tokens in theirs
        ]

    def final_minus(self, other: LossCurve) -> tuple[float, float, float]:
        """Return the difference of the final losses and its range."""
        low, high = self.final_low - other.final_high, self.final_high - other.final_low
        return self.final - other.final, low, high

    def frame(self) -> pd.DataFrame:
        """Return the points as a pandas data frame with columns model, tokens_B, loss, uncertainty."""
        columns = {"tokens_B": self.tokens_B, "loss": self.loss, "uncertainty": self.uncertainty}
        return pd.DataFrame({"model": self.model, **columns})


def loss_curve(model: str) -> LossCurve:
    """Return the validation-loss curve of one of the five models of Fig 1; ValueError names them for any other."""
    rows = loss_points().where(model=model)
    points = rows.where(kind="point")
    (final,) = rows.where(kind="final")
    return LossCurve(
        model=model,
        tokens_B=tuple(point.tokens_B for point in points),
        loss=tuple(point.loss for point in points),
        uncertainty=tuple(round((point.loss_high - point.loss_low) / 2, 6) for point in points),
        final=final.loss,
        final_low=final.loss_low,
        final_high=final.loss_high,
        **{field.name: getattr(points[0], field.name) for field in fields(Provenance)},
    )
