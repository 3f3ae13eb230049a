"""Score pairs of continuations by the probability that a model gives them: `score(lm, pairs, on_progress)`."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from moelab.config import DataConfig
from moelab.data.preparation import prepare
from moelab.data.tokens import TokenData
from moelab.evaluation.pairs import Pair, minimal_pairs
from moelab.evaluation.recall import copying, memory

if TYPE_CHECKING:
    from moelab.evaluation.lm import RunLM

VERSION = 1
"""Of items and scores: raise it with each change that gives other numbers."""

KINDS = ("subject-verb", "determiner-noun", "brackets", "names")
"""Minimal pairs, see `moelab.evaluation.pairs`."""

RECALL = ("copying", "memory")
"""See `moelab.evaluation.recall`."""


@dataclass(frozen=True)
class PairScore:
    """Hold the score of one model on the pairs of one kind.

    The standard errors are over couples, because the two items of a couple depend on each other.

    Attributes:
        kind: one of `KINDS` or `RECALL`.
        accuracy: share of items whose right continuation is likelier than the wrong one; 0.5 without looking at the
            context. Equal probabilities count half.
        standard_error: of `accuracy`.
        margin: bits by which the right continuation is likelier, mean over items.
        margin_error: its standard error.
        bits: that the right continuation takes, mean over items.
        exact: share of items of whose right continuation every token is the likeliest of all.
        n: number of items.
        items: hash of the items.
        seconds: wall time.
    """

    kind: str
    accuracy: float
    standard_error: float
    margin: float
    margin_error: float
    bits: float
    exact: float
    n: int
    items: str
    seconds: float


def all_pairs(data: TokenData, context: int, count: int) -> list[Pair]:
    """Return `count` items of each kind of `KINDS` and `RECALL`, or as many as the text has."""
    return [*minimal_pairs(data, context, count), *copying(data, context, count), *memory(data, context, count)]


@functools.lru_cache(maxsize=2)
def pairs_of(config: DataConfig, cache: Path, count: int) -> tuple[Pair, ...]:
    """Return `all_pairs` of the text that runs are trained on, the same for runs that read a part of it.

    A process makes them once: counting what 100 M training tokens repeat takes half a minute.

    Args:
        cache: directory of prepared tokens.
    """
    return tuple(all_pairs(prepare(replace(config, part="whole"), cache), config.context, count))


def score(lm: RunLM, pairs: Sequence[Pair], on_progress: Callable[[str, int, int], None]) -> list[PairScore]:
    """Return a score of each kind that has at least two couples, in the order of the pairs.

    Args:
        pairs: couple by couple.
        on_progress: called with (kind, continuations done, all continuations).
    """
    scores = []
    for kind in dict.fromkeys(pair.kind for pair in pairs):
        asked, started = [pair for pair in pairs if pair.kind == kind], time.monotonic()
        if len(asked) < 4:
            continue
        lm.on_progress = functools.partial(on_progress, kind)
        found = lm._loglikelihood_tokens(
            [(("", ""), list(pair.context), list(end)) for pair in asked for end in (pair.right, pair.wrong)],
            disable_tqdm=True,
        )
        bits = [-nats / math.log(2) for nats, _ in found]
        right, exact = bits[::2], [greedy for _, greedy in found[::2]]
        margins = [w - r for r, w in zip(right, bits[1::2], strict=True)]
        accuracy, error = _over_couples([(math.copysign(1, m) + 1) / 2 if m else 0.5 for m in margins])
        margin, margin_error = _over_couples(margins)
        scores.append(
            PairScore(
                kind=kind,
                accuracy=accuracy,
                standard_error=error,
                margin=margin,
                margin_error=margin_error,
                bits=statistics.fmean(right),
                exact=statistics.fmean(exact),
                n=len(asked),
                items=digest(asked),
                seconds=round(time.monotonic() - started, 1),
            )
        )
    return scores


def digest(pairs: Sequence[Pair]) -> str:
    """Return a hash of the items."""
    return hashlib.sha256(json.dumps([asdict(pair) for pair in pairs]).encode()).hexdigest()[:12]


def _over_couples(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the standard error of the mean over couples that follow each other."""
    means = [(one + other) / 2 for one, other in zip(values[::2], values[1::2], strict=True)]
    return statistics.fmean(means), statistics.stdev(means) / math.sqrt(len(means))
