"""Batches: which windows of the tokens a training step sees, and validation in order.

Training data is a circle of N tokens cut into W = (N - 1) // context windows. Each epoch cuts it at another random
offset and takes the windows in another random order: every window is seen exactly once per epoch, and borders fall
elsewhere each time. Nothing is stored: row r of the run is window `permutation(r mod W)` of epoch `r // W`, so a
batch is a pure function of (seed, step), and ranks are slices of it. A run resumed at any step, on any number of
ranks, sees the same data.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from moelab.data.tokens import TokenData

ROUNDS = 6  # of the Feistel network; four would mix, six are as cheap at batch sizes


class TrainBatches:
    """Training batches as a pure function of the step.

    The batch is global: rank r takes rows r * B_local … (r + 1) * B_local - 1 of its B = world * B_local rows.

    Attributes:
        windows: W, windows (= sequences) per epoch.
        tokens_per_step: B * context, over all ranks.
    """

    def __init__(self, data: TokenData, batch_size: int, context: int, seed: int, rank: int = 0, world: int = 1):
        """Divide the corpus's training tokens into windows.

        Args:
            data: a prepared corpus.
            batch_size: B, sequences per step over all ranks.
            context: T, tokens per sequence.
            seed: another seed gives another order.
            rank: which part of the batch `batch` returns.
            world: number of parts.

        Raises:
            ValueError: B is not a positive multiple of `world`, `rank` is not in 0 … world - 1, or T is too long.
        """
        if world < 1 or not 0 <= rank < world:
            raise ValueError(f"data: rank {rank} of world {world}: the rank must be in 0 … world - 1")
        if batch_size < 1 or batch_size % world:
            raise ValueError(f"data: batch_size {batch_size} must be a positive multiple of world {world}")
        data.check_context(context)
        self.batch_size = batch_size
        self.context = context
        self.windows = (data.train.size - 1) // context
        self.tokens_per_step = batch_size * context
        self._train = data.train
        self._seed = seed
        self._first = rank * (batch_size // world)
        self._rows = batch_size // world

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Tokens and next tokens of step 0, 1, …: two [B_local, T] int64 tensors on the CPU.

        Raises:
            ValueError: a negative step.
        """
        places = self.starts(step)[:, None] + np.arange(self.context + 1)
        window = torch.from_numpy(self._train.take(places, mode="wrap").astype(np.int64))
        return window[:, :-1].contiguous(), window[:, 1:].contiguous()

    def starts(self, step: int) -> np.ndarray:
        """Where in `train` this rank's windows of the step start: [B_local] int64. Windows wrap around the end."""
        if step < 0:
            raise ValueError(f"data: step {step} is negative")
        rows = step * self.batch_size + self._first + np.arange(self._rows, dtype=np.int64)
        epochs = rows // self.windows
        starts = np.empty_like(rows)
        for epoch in np.unique(epochs):  # one, or more at the border of epochs
            here = epochs == epoch
            keys = epoch_keys(self._seed, int(epoch))
            offset = int(keys[-1]) % self._train.size
            order = permuted(rows[here] % self.windows, self.windows, keys)
            starts[here] = (offset + order * self.context) % self._train.size
        return starts


def epoch_keys(seed: int, epoch: int) -> np.ndarray:
    """Random [8] uint64 of a seed and an epoch, the same on every machine and with every library version."""
    digest = hashlib.blake2b(f"moelab {seed} {epoch}".encode(), digest_size=64).digest()
    return np.frombuffer(digest, dtype="<u8")


def permuted(indices: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Return a random permutation of 0 … size - 1, computed only at `indices`.

    A Feistel network permutes 0 … 4^h - 1, the next such range above `size`; indices that land outside `size` are
    sent through again until they land inside ("cycle walking", at most 4 passes on average). No table is ever needed.

    Args:
        indices: [n] integers in 0 … size - 1.
        size: length of the permutation, at least 1.
        keys: at least ROUNDS uint64; another choice gives another permutation.

    Returns:
        [n] int64.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))  # in bits
    mask = np.uint64((1 << int(half)) - 1)

    def network(x: np.ndarray) -> np.ndarray:
        left, right = x >> half, x & mask
        for key in keys[:ROUNDS]:
            left, right = right, left ^ (_mix(right + key) & mask)
        return (left << half) | right

    out = network(np.asarray(indices).astype(np.uint64))
    while (outside := out >= size).any():
        out[outside] = network(out[outside])
    return out.astype(np.int64)


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64's finalizer: every input bit changes about half of the output bits. Wraps modulo 2^64 by design."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def validation_batches(
    data: TokenData, batch_size: int, context: int, max_tokens: int = 0
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Every domain's validation text from its start, in windows that follow each other: always the same batches.

    Windows do not overlap, and each target is counted once. Left out are a domain's very first token, which nothing
    predicts, and its last tokens that do not fill a window (fewer than `context`).

    Args:
        data: a prepared corpus.
        batch_size: B; a domain's last batch may be smaller.
        context: T, tokens per window.
        max_tokens: at most this many tokens of each domain, rounded down to whole windows; 0 = all.

    Yields:
        (domain, tokens [B, T] int64, targets [B, T] int64), domains in sorted order.

    Raises:
        ValueError: `context` is longer than a domain's text, or `max_tokens` is positive and holds no window.
    """
    if batch_size < 1:
        raise ValueError(f"data: batch_size {batch_size} must be at least 1")
    if max_tokens and max_tokens < context:
        raise ValueError(f"data: max_tokens {max_tokens} must be 0 (all) or at least the context, {context}")
    data.check_context(context)
    return _validation_batches(data, batch_size, context, max_tokens)


def _validation_batches(
    data: TokenData, batch_size: int, context: int, max_tokens: int
) -> Iterator[tuple[str, Tensor, Tensor]]:
    for domain, stored in sorted(data.validation.items()):
        windows = (stored.size - 1) // context
        if max_tokens:
            windows = min(windows, max_tokens // context)
        for first in range(0, windows, batch_size):
            count = min(batch_size, windows - first)
            start = first * context
            tokens = torch.from_numpy(stored[start : start + count * context + 1].astype(np.int64))
            yield domain, tokens[:-1].view(count, context), tokens[1:].view(count, context)


def bits_per_byte(data: TokenData, nats_per_token: float, domain: str | None = None) -> float:
    """Return a validation loss that compares across tokenizers: nats per token / ln 2 / UTF-8 bytes per token.

    Args:
        data: the corpus the loss was measured on.
        nats_per_token: mean cross-entropy.
        domain: the domain it was measured on; None: all of them together.
    """
    return nats_per_token / math.log(2) / data.bytes_per_token(domain)


def overall_loss(data: TokenData, nats_per_token: Mapping[str, float]) -> float:
    """Return the mean over all validation text of per-domain losses, each weighted by its domain's tokens.

    Weights are those of the full text, so they do not depend on how much of it was evaluated.

    Raises:
        ValueError: the losses are not exactly those of the validation domains.
    """
    if nats_per_token.keys() != data.validation.keys():
        raise ValueError(f"data: losses of {sorted(nats_per_token)} given, of {sorted(data.validation)} needed")
    tokens = {domain: stored.size for domain, stored in data.validation.items()}
    return sum(tokens[domain] * loss for domain, loss in nats_per_token.items()) / sum(tokens.values())


PAIRS = ("repeated", "changed", "new")
"""What a sequence has shown before of a token and the next one, see `pairs`."""


def pairs(tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
    """Return for each target, as an index of `PAIRS`, what its sequence has shown before, int64 [B, T].

    - repeated: the token occurred before with the same next token, so that copying gives the target;
    - changed: the token occurred before, but always with another next token;
    - new: the token did not occur before.
    """
    # A pair of ids is one number: ids are below 2^31.
    repeated_BT = _occurred_before(tokens_BT << 32 | targets_BT)
    return torch.where(repeated_BT, 0, torch.where(_occurred_before(tokens_BT), 1, 2))


def _occurred_before(ids_BT: Tensor) -> Tensor:
    """Return where a value occurs at an earlier place of its row, bool [B, T]."""
    sorted_BT, order_BT = ids_BT.sort(dim=1, stable=True)
    again_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    return again_BT.scatter(1, order_BT[:, 1:], sorted_BT[:, 1:] == sorted_BT[:, :-1])
