"""Batches: a pure function of (seed, step, rank, world); every window once per epoch."""

import math

import numpy as np
import pytest
import torch

from moelab.data.batches import (
    PAIRS,
    TrainBatches,
    bits_per_byte,
    epoch_keys,
    overall_loss,
    pairs,
    permuted,
    validation_batches,
)

T = 16


def test_a_batch_is_windows_of_the_text_and_their_next_tokens(data):
    batches = TrainBatches(data, 6, T, seed=1)
    circle = np.concatenate([data.train, data.train]).astype(np.int64)
    over_the_end = next(step for step in range(10**4) if max(batches.starts(step)) + T >= data.train.size)
    for step in (0, 7, 10**6, over_the_end):
        tokens, targets = batches.batch(step)
        for found in (tokens, targets):
            assert found.shape == (6, T) and found.dtype == torch.int64 and found.is_contiguous()
        for row, start in enumerate(batches.starts(step)):
            assert tokens[row].tolist() == circle[start : start + T].tolist()
            assert targets[row].tolist() == circle[start + 1 : start + T + 1].tolist()


@pytest.mark.parametrize("world", [2, 4])
def test_the_global_batch_does_not_depend_on_the_number_of_ranks(data, world):
    whole, other = (TrainBatches(data, 8, T, seed=seed) for seed in (3, 4))
    parts = [TrainBatches(data, 8, T, seed=3, rank=rank, world=world) for rank in range(world)]
    for step in (11, 0, 10_000):  # in any order: nothing is remembered
        for i in (0, 1):
            assert torch.equal(whole.batch(step)[i], torch.cat([part.batch(step)[i] for part in parts]))
            assert not torch.equal(whole.batch(step)[i], other.batch(step)[i])


@pytest.mark.parametrize("batch_size", [1, 7])  # 7: batches straddle the border of epochs
def test_every_window_once_per_epoch(data, batch_size):
    batches = TrainBatches(data, batch_size, T, seed=5)
    N, W = data.train.size, batches.windows
    assert W == (N - 1) // T
    steps = -(-3 * W // batch_size)
    starts = np.concatenate([batches.starts(step) for step in range(steps)])[: 3 * W].reshape(3, W)
    offsets = set()
    for epoch in starts:
        # Windows of an epoch are a whole number of contexts apart, on the circle.
        covered = np.zeros(N, int)
        for start in epoch:
            covered[(start + np.arange(T)) % N] += 1
        assert covered.max() == 1
        offsets.add(tuple(np.sort(epoch)))
    assert len(offsets) == 3  # another cut each time
    assert not np.array_equal(starts[0], np.sort(starts[0]))


@pytest.mark.parametrize("size", [1, 2, 3, 13, 64, 67, 4097])
def test_permutations_are_permutations(size):
    for epoch in range(3):
        assert sorted(permuted(np.arange(size), size, epoch_keys(9, epoch)).tolist()) == list(range(size))
    places = permuted(np.arange(1000), 10**9 + size, epoch_keys(0, 0))  # what is not asked for costs nothing
    assert len(np.unique(places)) == 1000 and 0 <= places.min() and places.max() < 10**9 + size


def test_permutations_are_frozen_and_even():
    """A golden: a change here changes the data of every run that is resumed."""
    assert permuted(np.arange(10), 10, epoch_keys(0, 0)).tolist() == [5, 3, 7, 0, 4, 2, 9, 1, 6, 8]
    # Where an index goes, over many seeds, is uniform: chi-square of 16 cells stays within 5 sigma.
    size, seeds = 1000, 4000
    for index in (0, 999):
        places = [permuted(np.array([index]), size, epoch_keys(seed, 0))[0] for seed in range(seeds)]
        counts, _ = np.histogram(places, bins=16, range=(0, size))
        expected = np.diff(np.ceil(np.linspace(0, size, 17))) * seeds / size
        assert ((counts - expected) ** 2 / expected).sum() < 15 + 5 * math.sqrt(30)


@pytest.mark.parametrize("batch_size", [1, 5, 10_000])
def test_validation_covers_each_domain_from_its_start_once(data, batch_size):
    seen: dict[str, list[int]] = {"field": [], "sea": []}
    for domain, tokens, targets in validation_batches(data, batch_size, T):
        assert tokens.shape == targets.shape
        assert tokens.shape[0] <= batch_size and tokens.shape[1] == T
        assert torch.equal(tokens[:, 1:], targets[:, :-1])
        seen[domain] += targets.flatten().tolist()
    for domain, targets in seen.items():
        stored = data.validation[domain]
        assert targets == stored[1 : len(targets) + 1].tolist()
        assert 0 <= stored.size - 1 - len(targets) < T
    bounded = [(domain, len(tokens)) for domain, tokens, _ in validation_batches(data, 2, T, max_tokens=3 * T + 5)]
    assert bounded == [("field", 2), ("field", 1), ("sea", 2), ("sea", 1)]


def test_pairs_are_those_that_the_sequence_has_shown():
    draw = torch.randint(9, (7, 41), generator=torch.Generator().manual_seed(0))  # no row sees another
    for row, found in zip(draw.tolist(), pairs(draw[:, :-1], draw[:, 1:]).tolist(), strict=True):
        for t, kind in enumerate(found):
            before = list(zip(row[:t], row[1 : t + 1], strict=True))
            expected = "repeated" if (row[t], row[t + 1]) in before else "changed" if row[t] in row[:t] else "new"
            assert PAIRS[kind] == expected
    assert pairs(draw[:0, :-1], draw[:0, 1:]).shape == (0, 40)


def test_overall_loss_weights_domains_by_their_tokens(data):
    losses = {domain: data.meta["validation"][domain]["unigram_loss"] for domain in data.validation}
    overall = overall_loss(data, losses)
    assert overall == pytest.approx(data.unigram_loss)
    total = sum(loss * data.validation[d].size for d, loss in losses.items())
    bytes_ = sum(part["bytes"] for part in data.meta["validation"].values())
    assert bits_per_byte(data, overall) == pytest.approx(total / math.log(2) / bytes_)
    for domain in losses:  # a uniform guess over bytes
        assert bits_per_byte(data, math.log(256) * data.bytes_per_token(domain), domain) == pytest.approx(8)
    assert bits_per_byte(data, math.log(2)) == pytest.approx(1 / data.bytes_per_token())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d: TrainBatches(d, 6, T, 0, rank=0, world=4), "batch_size 6 must be a positive multiple of world 4"),
        (lambda d: TrainBatches(d, 0, T, 0), "batch_size 0 must be"),
        (lambda d: TrainBatches(d, 4, T, 0, rank=2, world=2), "rank 2 of world 2"),
        (lambda d: TrainBatches(d, 4, 10**6, 0), "context 1000000 is too long"),
        (lambda d: TrainBatches(d, 4, T, 0).batch(-1), "step -1 is negative"),
        (lambda d: validation_batches(d, 0, T), "batch_size 0 must be at least 1"),
        (lambda d: d.check_context(d.train.size - 1), "is allowed; else give that domain more text, or leave it out$"),
        (lambda d: validation_batches(d, 1, 10**6), "is too long"),
        (lambda d: validation_batches(d, 1, T, max_tokens=T - 1), "must be 0 .all. or at least the context"),
        (lambda d: bits_per_byte(d, 1.0, "east"), "no validation text of domain 'east'; there is"),
        (lambda d: overall_loss(d, {"sea": 1.0}), r"of \['sea'\] given, of \['field', 'sea'\] needed"),
    ],
)
def test_bad_calls_say_what_is_allowed(call, message, data):
    with pytest.raises(ValueError, match=message) as error:
        call(data)
    assert "\n" not in str(error.value)
