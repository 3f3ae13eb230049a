"""Make items that part recall by copying from recall from memory, in the form of `pairs.Pair`.

- copying: made-up facts, a key followed by its value, stand in the context, and one key is asked for. Keys and values
  are words drawn at random, so that no training text has the facts. Wrong is the value of another key of the context.
- memory: after `WORDS` tokens that the training text has at least `OFTEN` times, one word follows nearly always, and
  the last two of these tokens alone do not tell it. The context is held-out text that ends so and does not have that
  word, so that copying cannot give it. Wrong is the word of another such fact.

Items come in couples: what is right in the first is wrong in the second, see `pairs`.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np

from moelab.data.tokens import TokenData
from moelab.evaluation.pairs import ROOM, Pair, rank, token_bytes

FACTS = 4
"""Facts of a context that copying is asked about."""

TIMES = 2
"""How often each stands there. Of facts that stand once, a dense twin of the 350M base recalled 78 %, of these 84 %."""

WORDS, OFTEN, NEARLY, AMBIGUOUS = 6, 8, 0.9, 0.5
"""Tokens before a remembered word; how often the training text has them; the share of it in which the word follows;
the largest share in which it follows the last two of them."""

_CHUNK = 4_000_000
_ODD = np.uint64(0x9E3779B97F4A7C15)


def copying(data: TokenData, context: int, count: int) -> list[Pair]:
    """Return `count` items about facts of the context; none where these do not fit it or the vocabulary."""
    tokenizer = data.tokenizer()
    words = [i for i, piece in enumerate(token_bytes(tokenizer)) if _is_word(piece)]
    comma = tokenizer.encode(",")
    if len(words) < 2 * FACTS or 1 + TIMES * FACTS * (2 + len(comma)) + 2 > context:
        return []
    draw, pairs = random.Random(0), []
    for _ in range(count // 2):
        chosen = draw.sample(words, 2 * FACTS)
        facts = list(zip(chosen[:FACTS], chosen[FACTS:], strict=True))
        tokens = [data.eot]
        for _ in range(TIMES):
            draw.shuffle(facts)
            tokens += [token for key, value in facts for token in (key, value, *comma)]
        (one, its), (other, others) = draw.sample(facts, 2)
        pairs.append(Pair("copying", "", (*tokens, one), (its,), (others,)))
        pairs.append(Pair("copying", "", (*tokens, other), (others,), (its,)))
    return pairs


def memory(data: TokenData, context: int, count: int) -> list[Pair]:
    """Return `count` items about what the training text repeats, or as many as there are, each fact once."""
    facts = _facts(data, context)
    couples = [
        (one, other)
        for one, other in zip(facts[::2], facts[1::2], strict=False)
        if one[1][-1] != other[1][-1] and other[1][-1] not in one[1][:-1] and one[1][-1] not in other[1][:-1]
    ]
    return [
        Pair("memory", domain, tokens[:-1], tokens[-1:], wrong[-1:])
        for (one, other) in couples[: count // 2]
        for (domain, tokens), (_, wrong) in ((one, other), (other, one))
    ]


def _is_word(piece: bytes) -> bool:
    return len(piece) >= 4 and piece[:1] == b" " and piece[1:].isalpha() and piece[1:].islower()


def _facts(data: TokenData, context: int) -> list[tuple[str, tuple[int, ...]]]:
    """Return (domain, held-out tokens, of which the last is the remembered word) of each fact, by rank."""
    starts_word = np.array([_is_word(piece) for piece in token_bytes(data.tokenizer())])
    length = context - ROOM
    places = []
    for domain, stored in sorted(data.validation.items()):
        tokens = np.asarray(stored)
        ends = np.flatnonzero(starts_word[tokens])
        ends = ends[ends >= length]
        documents = np.cumsum(tokens == data.eot)
        places.append((domain, tokens, ends[documents[ends] == documents[ends - length]]))
    if not any(len(ends) for _, _, ends in places):
        return []
    keys = np.unique(np.concatenate([_hashes(tokens, WORDS)[ends - WORDS] for _, tokens, ends in places]))
    last_two = np.unique(np.concatenate([_hashes(tokens, 2)[ends - 2] for _, tokens, ends in places]))
    often, share, word = _commonest(data.train, keys, WORDS)
    found: dict[int, tuple[str, tuple[int, ...], int, int]] = {}
    for domain, tokens, ends in places:
        which = np.searchsorted(keys, _hashes(tokens, WORDS)[ends - WORDS])
        two = np.searchsorted(last_two, _hashes(tokens, 2)[ends - 2])
        fits = (often[which] >= OFTEN) & (share[which] >= NEARLY) & (word[which] == tokens[ends])
        for end, fact, pair in zip(ends[fits], which[fits], two[fits], strict=True):
            before = tokens[end - length : end]
            if fact not in found and not (before == tokens[end]).any():
                found[int(fact)] = (domain, tuple(map(int, (*before, tokens[end]))), int(pair), int(tokens[end]))
    shares = _share_of(data.train, last_two, [(pair, target) for _, _, pair, target in found.values()])
    kept = [fact[:2] for fact, share in zip(found.values(), shares, strict=True) if share <= AMBIGUOUS]
    return sorted(kept, key=lambda fact: rank(*fact))


def _hashes(tokens: np.ndarray, words: int) -> np.ndarray:
    """Return a hash of the `words` tokens from each place on that has a token after them, uint64."""
    count = max(0, len(tokens) - words)
    hashed = np.zeros(count, np.uint64)
    with np.errstate(over="ignore"):
        for i in range(words):
            hashed = (hashed ^ (tokens[i : i + count].astype(np.uint64) + np.uint64(1))) * _ODD
            hashed ^= hashed >> np.uint64(29)
    return hashed


def _matches(train: np.ndarray, keys: np.ndarray, words: int) -> tuple[np.ndarray, np.ndarray]:
    """Return, of each place of the training text whose tokens are among the keys, which key and the token after it."""
    seen = np.zeros(1 << 24, bool)  # most places are ruled out by it, at a fraction of a search's time
    seen[(keys >> np.uint64(40)).astype(np.int64)] = True
    which, after = [], []
    for start in range(0, max(0, train.size - words), _CHUNK):
        tokens = np.asarray(train[start : start + _CHUNK + words])
        hashed = _hashes(tokens, words)
        there = np.flatnonzero(seen[(hashed >> np.uint64(40)).astype(np.int64)])
        key = np.minimum(np.searchsorted(keys, hashed[there]), len(keys) - 1)
        equal = keys[key] == hashed[there]
        which.append(key[equal])
        after.append(tokens[there[equal] + words].astype(np.int64))
    return np.concatenate([*which, np.zeros(0, np.int64)]), np.concatenate([*after, np.zeros(0, np.int64)])


def _followers(train: np.ndarray, keys: np.ndarray, words: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return how often the training text has each key; and key << 32 | token of what follows, with its number."""
    which, after = _matches(train, keys, words)
    return np.bincount(which, minlength=len(keys)), *np.unique(which << 32 | after, return_counts=True)


def _commonest(train: np.ndarray, keys: np.ndarray, words: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return, by key, how often the training text has it, the commonest next token's share, and that token."""
    often, pairs, counts = _followers(train, keys, words)
    rising = np.argsort(counts, kind="stable")
    most, word = np.zeros(len(keys), np.int64), np.full(len(keys), -1)
    most[pairs[rising] >> 32] = counts[rising]  # of equal indices numpy keeps the last, which is the greatest
    word[pairs[rising] >> 32] = pairs[rising] & 0xFFFFFFFF
    return often, most / np.maximum(often, 1), word


def _share_of(train: np.ndarray, keys: np.ndarray, asked: Sequence[tuple[int, int]]) -> list[float]:
    """Return, of each (key, token), the share of the key's places in the training text that the token follows."""
    if not asked:
        return []
    wanted = np.unique([key for key, _ in asked])
    often, pairs, counts = _followers(train, keys[wanted], 2)
    by_pair = dict(zip(pairs.tolist(), counts.tolist(), strict=True))
    places = np.searchsorted(wanted, [key for key, _ in asked])
    return [
        by_pair.get(int(place) << 32 | token, 0) / max(1, int(often[place]))
        for place, (_, token) in zip(places, asked, strict=True)
    ]
