"""Minimal pairs and recall: made by rule from held-out text, and scored as the plain model would."""

import math
import random
import statistics
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from moelab.config import ModelConfig
from moelab.data.tokenizer import Tokenizer
from moelab.evaluation import recall
from moelab.evaluation.likelihood import KINDS, RECALL, all_pairs, digest, score
from moelab.evaluation.pairs import Pair, minimal_pairs, token_bytes
from moelab.inference.modes import set_mode
from moelab.models import build

CONTEXT = 64
PARTS = ("find", "store", "clear", "count", "check"), ("user", "host", "price", "colour", "weight")
KNOWN = ("nine green birds fly over our", " village")
PLAIN = ("seven grey ships sail past the", " harbour")
THERE = ("ten black dogs run round my", " castle")
"""Facts that the training text repeats: one to remember, one that its last words tell, one that the context has."""


def prose(draw, lines):
    one, many = ("machine", "river", "answer", "garden"), ("machines", "rivers", "answers", "gardens")
    for _ in range(lines):
        plural = draw.random() < 0.5
        noun, other = draw.choice(many if plural else one), draw.choice(one + many)
        verb = draw.choice((("is", "was", "has"), ("are", "were", "have"))[plural])
        some = draw.choice((("this", "each"), ("these", "all"))[plural])
        yield f"In the {other} of old {draw.randrange(99)} the {noun} {verb} seen by {some} {noun} here.\n"


def code(draw, lines):
    for i in range(lines):
        (one, other), (left, right) = (draw.sample(parts, 2) for parts in PARTS)
        yield f"def {one}_{left}(x{i}):\n    y = {other}_{right}(x[some_long_index + {i}] + z{i})\n"
        yield f"    w = [{other}_{right}, {one}_{left}, x{i}] + {{{other}_{right}, {one}_{left}, x{i}}}\n"


def facts(times):
    """Lines that repeat the facts; the last two words of two of them have other ends as often."""
    for i in range(times):
        yield "".join(f"{i} {i * 7} in May we saw {start}{end}.\n" for start, end in (KNOWN, PLAIN, THERE))
        yield "and over our meadow.\nand round my meadow.\n"


def at_sea(draw):
    for start, end in (KNOWN, PLAIN, THERE) * 2:
        before = " ".join(map(str, draw.sample(range(99), 60)))
        yield f"{before}{' castle' if end == THERE[1] else ''} {start}{end} at\n"


@pytest.fixture(scope="module")
def data():
    """Tokens as `TokenData` has them: prose and code to validate on, facts to train on."""
    draw = random.Random(0)
    texts = {"science": "".join(code(draw, 250)), "speeches": "".join(prose(draw, 700))}
    texts["sea"] = "".join(at_sea(draw))
    train = "".join([*prose(draw, 300), *facts(12)])
    tokenizer = Tokenizer.train([*texts.values(), train], 700)
    tokens = {name: np.array([*tokenizer.encode(text), tokenizer.eot], np.uint16) for name, text in texts.items()}
    stream = np.array([*tokenizer.encode(train), tokenizer.eot], np.uint16)
    return SimpleNamespace(train=stream, validation=tokens, eot=tokenizer.eot, tokenizer=lambda: tokenizer)


@pytest.fixture(scope="module")
def pairs(data):
    return minimal_pairs(data, CONTEXT, 120)


def test_items_are_those_of_the_text_and_differ_only_in_the_form(data, pairs):
    tokenizer = data.tokenizer()
    assert {kind: n >= 40 for kind, n in Counter(pair.kind for pair in pairs).items()} == dict.fromkeys(KINDS, True)
    stored = {name: " ".join(map(str, tokens)) for name, tokens in data.validation.items()}
    for pair in pairs:
        there = " ".join(map(str, [t for t in pair.context if t != data.eot] + list(pair.right)))
        assert f" {there} " in f" {stored[pair.domain]} ", "what is right is what stands there"
        assert len(pair.right) == len(pair.wrong) and pair.right != pair.wrong
        assert 16 <= len(pair.context) and len(pair.context) + len(pair.right) <= CONTEXT
        assert pair.domain == ("speeches" if pair.kind == "subject-verb" else pair.domain)
        right, wrong = tokenizer.decode(pair.right), tokenizer.decode(pair.wrong)
        if pair.kind == "determiner-noun":
            assert right.split()[1] == wrong.split()[1] and right.split()[0] != wrong.split()[0]
        if pair.kind == "names":
            text = tokenizer.decode(pair.context)
            begin = text[text.rindex(" " if text.rfind(" ") > text.rfind("(") else "(") + 1 :].lstrip("[{\n ")
            assert begin + right in text and wrong in text and begin + wrong not in text
        if pair.kind == "brackets":
            assert {right, wrong} <= set(")]}")


def test_what_is_right_in_the_first_of_a_couple_is_wrong_in_the_second(data):
    for kind in (*KINDS, *RECALL):
        couples = [pair for pair in all_pairs(data, CONTEXT, 60) if pair.kind == kind]
        assert len(couples) % 2 == 0
        for one, other in zip(couples[::2], couples[1::2], strict=True):
            forms = [pair.right[0] if kind == "determiner-noun" else pair.right for pair in (one, other)]
            wrong = [pair.wrong[0] if kind == "determiner-noun" else pair.wrong for pair in (one, other)]
            assert forms == wrong[::-1], kind


def test_the_same_text_gives_the_same_items(data, pairs):
    assert minimal_pairs(data, CONTEXT, 120) == pairs
    again = all_pairs(data, CONTEXT, 60)
    assert digest(again) == digest(all_pairs(data, CONTEXT, 60)) != digest(again[:-2])


def test_the_bytes_of_tokens_are_those_of_the_text(data):
    pieces, text = token_bytes(data.tokenizer()), "é – ∑ a_b(c[0])\n\tü"
    assert b"".join(pieces[token] for token in data.tokenizer().encode(text)) == text.encode()
    assert pieces[data.eot] == b""


class Blind:
    """A model that always expects the same, whatever stands before."""

    device = "cpu"
    config = SimpleNamespace()
    logits = torch.randn(700, generator=torch.Generator().manual_seed(0))

    def __call__(self, tokens_BT):
        return SimpleNamespace(logits=self.logits.expand(*tokens_BT.shape, -1))


@pytest.fixture
def model():
    config = ModelConfig(
        layers=4, experts=(0, 2, 0, 4), residual=True, hidden=32, heads=2, vocab=704, context=64, init_std=0.3
    )
    return set_mode(build(config, 0))


@pytest.fixture
def scores(data, model):
    """`scores(pairs, batch, blind)`: of the model, or of the blind one."""
    pytest.importorskip("lm_eval", reason="needs lm-eval (extra eval)")
    from moelab.evaluation.lm import RunLM
    from moelab.evaluation.models import ours

    def of(pairs, batch=64, blind=False):
        evaluated = ours(model, data.tokenizer())
        lm = RunLM(replace(evaluated, model=Blind()) if blind else evaluated, batch=batch)
        return score(lm, pairs, lambda kind, done, total: None)

    return of


def test_a_model_that_does_not_look_at_the_context_gets_half(data, scores):
    found = scores(all_pairs(data, CONTEXT, 60), blind=True)
    assert [one.kind for one in found] == [*KINDS, "copying"], "there is one remembered fact, and no couple of two"
    for one in found:
        assert one.accuracy == 0.5 and one.margin == pytest.approx(0, abs=1e-6), one.kind
        assert one.standard_error == pytest.approx(0, abs=1e-9)


def plain(model, context, continuation, vocab):
    """Bits, and whether each token is the likeliest, by one pass a token."""
    bits, exact = 0.0, True
    for i, token in enumerate(continuation):
        with torch.no_grad():
            logits = model(torch.tensor([[*context, *continuation[:i]]])).logits_BTV[0, -1, :vocab]
        bits -= float(logits.log_softmax(0)[token]) / math.log(2)
        exact &= int(logits.argmax()) == token
    return bits, exact


def test_scores_are_those_of_the_plain_model_whatever_the_batch(scores, model, pairs):
    chosen = [pair for kind in KINDS for pair in [p for p in pairs if p.kind == kind][:4]]
    by_kind = {one.kind: one for one in scores(chosen, batch=3)}
    for kind in KINDS:
        part = [pair for pair in chosen if pair.kind == kind]
        right, wrong = (
            [plain(model, pair.context, getattr(pair, which), 700) for pair in part] for which in ("right", "wrong")
        )
        margins = [w[0] - r[0] for r, w in zip(right, wrong, strict=True)]
        one = by_kind[kind]
        assert one.margin == pytest.approx(statistics.fmean(margins), abs=1e-3)
        assert one.bits == pytest.approx(statistics.fmean(bits for bits, _ in right), abs=1e-3)
        assert one.accuracy == statistics.fmean(m > 0 for m in margins) and one.n == 4
        couples = [statistics.fmean(margins[i : i + 2]) for i in (0, 2)]
        assert one.margin_error == pytest.approx(statistics.stdev(couples) / math.sqrt(2), abs=1e-3)


def test_a_favourite_is_exact_and_right(scores):
    best, other = int(Blind.logits.argmax()), int(Blind.logits.argmin())
    (one,) = scores([Pair("copying", "", (1, 2), (best,), (other,))] * 4, blind=True)
    assert one.accuracy == one.exact == 1 and one.margin == pytest.approx(
        float(Blind.logits[best] - Blind.logits[other]) / math.log(2), rel=1e-5
    )


def test_copied_facts_stand_in_the_context_and_nowhere_else(data):
    items = recall.copying(data, CONTEXT, 40)
    assert len(items) == 40 and len(data.tokenizer().encode(",")) == 1
    for pair in items:
        key, context = pair.context[-1], list(pair.context[:-1])
        after = [context[i + 1] for i, token in enumerate(context) if token == key]
        assert after == [pair.right[0]] * recall.TIMES and pair.wrong[0] in context
    assert recall.copying(data, 16, 40) == [], "they do not fit"


def test_remembered_facts_are_those_that_the_training_text_repeats(data):
    """By plain counting; what the last two words tell, or the context has, is no memory."""
    tokenizer, seen = data.tokenizer(), Counter()
    stream = data.train.tolist()
    for i in range(len(stream) - recall.WORDS):
        seen[tuple(stream[i : i + recall.WORDS + 1])] += 1
    (found,) = recall._facts(data, CONTEXT)
    domain, tokens = found
    assert domain == "sea" and tokenizer.decode(tokens[-1:]) == KNOWN[1]
    assert seen[tokens[-recall.WORDS - 1 :]] >= recall.OFTEN and tokens[-1] not in tokens[:-1]
    forgotten = SimpleNamespace(**{**vars(data), "train": data.train[:100]})
    assert recall.memory(forgotten, CONTEXT, 10) == [], "held-out text alone is no reason"


def test_counts_are_those_of_plain_counting(monkeypatch):
    draw = np.random.default_rng(0)
    train = draw.integers(0, 4, 3000).astype(np.uint16)
    monkeypatch.setattr(recall, "_CHUNK", 256)  # borders of pieces matter
    keys = np.unique(recall._hashes(train[:500], 3))
    often, share, word = recall._commonest(train, keys, 3)
    after = Counter(tuple(train[i : i + 4].tolist()) for i in range(len(train) - 3))
    for start in range(400):
        key = int(np.searchsorted(keys, recall._hashes(train[start : start + 4], 3)[0]))
        gram = tuple(train[start : start + 3].tolist())
        counts = {token: after[(*gram, token)] for token in range(4)}
        assert often[key] == sum(counts.values()) and share[key] == max(counts.values()) / often[key]
        assert counts[int(word[key])] == max(counts.values())
