"""Score pairs of continuations by the probability that a model gives them: `score(model, pairs)`."""

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

import torch

from moelab.config import DataConfig
from moelab.data.preparation import prepare
from moelab.data.tokens import TokenData
from moelab.evaluation.pairs import Pair, minimal_pairs
from moelab.evaluation.recall import copying, memory
from moelab.models import GPT

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


def score(
    model: GPT,
    pairs: Sequence[Pair],
    *,
    vocab_size: int,
    batch: int = 64,
    on_progress: Callable[[str, int, int], None] = lambda kind, done, total: None,
) -> list[PairScore]:
    """Return a score of each kind that has at least two couples, in the order of the pairs.

    Args:
        model: in evaluation mode and drop-free, see `moelab.inference.modes.set_mode`.
        pairs: couple by couple.
        vocab_size: of the tokenizer; the model's own may be padded beyond it.
        batch: number of sequences at a time.
        on_progress: called with (kind, sequences done, all sequences).
    """
    scores = []
    for kind in dict.fromkeys(pair.kind for pair in pairs):
        asked, started = [pair for pair in pairs if pair.kind == kind], time.monotonic()
        if len(asked) < 4:
            continue
        requests = [(pair.context, continuation) for pair in asked for continuation in (pair.right, pair.wrong)]
        found = continuations(
            model,
            requests,
            vocab_size=vocab_size,
            batch=batch,
            on_progress=lambda *state, kind=kind: on_progress(kind, *state),
        )
        right, wrong = found[::2], found[1::2]
        margins = [w - r for (r, _), (w, _) in zip(right, wrong, strict=True)]
        accuracy, error = _over_couples([(math.copysign(1, m) + 1) / 2 if m else 0.5 for m in margins])
        margin, margin_error = _over_couples(margins)
        scores.append(
            PairScore(
                kind=kind,
                accuracy=accuracy,
                standard_error=error,
                margin=margin,
                margin_error=margin_error,
                bits=statistics.fmean(bits for bits, _ in right),
                exact=statistics.fmean(exact for _, exact in right),
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


def continuations(
    model: GPT,
    requests: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    vocab_size: int,
    batch: int = 64,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[tuple[float, bool]]:
    """Return, of each (context, continuation), the continuation's bits and whether each of its tokens is the likeliest.

    Requests with the same input, such as two continuations of one token, take one pass. Arguments as of `score`.
    """
    by_input: dict[tuple[int, ...], list[int]] = {}
    for i, (context, continuation) in enumerate(requests):
        by_input.setdefault((*context, *continuation)[:-1], []).append(i)
    inputs = sorted(by_input, key=len)  # little padding
    device = model.token_embedding.weight.device
    found: list[tuple[float, bool]] = [(math.nan, False)] * len(requests)
    for first in range(0, len(inputs), batch):
        part = inputs[first : first + batch]
        longest = len(part[-1])
        tokens_BT = torch.tensor([[*row, *[0] * (longest - len(row))] for row in part], device=device)
        asked = [(b, i) for b, row in enumerate(part) for i in by_input[row]]
        # Position t predicts token t + 1; what stands after a row's end changes nothing before it.
        rows = [b for b, i in asked for _ in requests[i][1]]
        places = [len(requests[i][0]) - 1 + k for _, i in asked for k in range(len(requests[i][1]))]
        wanted = torch.tensor([token for _, i in asked for token in requests[i][1]], device=device)
        with torch.no_grad():
            x_BTM, _ = model.hidden_states(tokens_BT)
            logits = model.head(x_BTM[rows, places])[:, :vocab_size].float()
        nats = -logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0].double()
        likeliest = logits.argmax(-1) == wanted
        at = 0
        for _, i in asked:
            end = at + len(requests[i][1])
            found[i] = (float(nats[at:end].sum()) / math.log(2), bool(likeliest[at:end].all()))
            at = end
        on_progress(min(first + batch, len(inputs)), len(inputs))
    return found
