"""Make minimal pairs from held-out text: a context, the continuation that stands there, and a wrong one.

    items = minimal_pairs(data, context=128, count=2000)

| kind            | the text has                               | wrong is                              |
|-----------------|--------------------------------------------|---------------------------------------|
| subject-verb    | is, was or has after a noun, or the plural | the other number                      |
| determiner-noun | this, these, each or all before a noun     | the determiner of the other number    |
| brackets        | a closing bracket after a letter or digit  | one of another shape                  |
| names           | the rest of a name that the context has    | that of another name of the context   |

Subjects and verbs are from prose, brackets and names from code. All items are from validation text, and their tokens
are those of the text. Items come in couples: the form that is right in the first is wrong in the second. A model that
prefers a form without regard to what stands around it therefore scores exactly 50 %.

What is chosen follows from the text alone, by hashes: the same text and tokenizer give the same items.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moelab.data.tokenizer import Tokenizer
from moelab.data.tokens import TokenData

CODE = ("science", "home", "web", "automation")
"""Domains of mix15 that are code."""

ROOM = 8
"""Tokens of a model's context that are left for the continuation."""

SHORTEST = 16
"""Tokens that a context has at least."""

VERBS = (("is", "are"), ("was", "were"), ("has", "have"))
DETERMINERS = (("this", "these"), ("each", "all"))
BRACKETS = (")]", ")}", "]}")
FAR = 12
"""Characters between a bracket and the one that closes it, at least. Of all brackets a dense twin of the 350M base got
93 % right, of those within 16 characters 96 %."""

_OPENS = {")": "(", "]": "[", "}": "{"}

_NO_SUBJECT = re.compile(
    "that|which|what|there|where|here|when|this|these|those|they|than|such|could|would|should|might|must|will|shall|cannot"
)
"""Words before a verb that do not tell its number, or after which it is an infinitive."""

_NO_NOUN = re.compile("will|must|might|should|would|could|shall|were|have|when|where|with|from|into|such|then")
_PLURAL = re.compile(r"\w+(?<![sui])s")


@dataclass(frozen=True)
class Pair:
    """Hold a context and two continuations, in tokens.

    Attributes:
        kind: what it tests.
        domain: of the text; empty for made-up items.
        context: tokens that stand before.
        right, wrong: the continuations.
    """

    kind: str
    domain: str
    context: tuple[int, ...]
    right: tuple[int, ...]
    wrong: tuple[int, ...]


class Place(NamedTuple):
    """A stretch of a held-out text that may be asked for: what it is, where, and its tokens."""

    form: str
    domain: str
    context: tuple[int, ...]
    right: tuple[int, ...]
    text: str
    """The context as text, a character a byte."""


class HeldOut:
    """Hold a validation document as tokens and as text in which each character is one byte.

    Attributes:
        domain, tokens: of the document, with the end of the text before it.
        text: the bytes as Latin-1.
        starts: offset in `text` of each token, and the length of the text.
    """

    def __init__(self, domain: str, tokens: Sequence[int], pieces: Sequence[bytes]) -> None:
        self.domain, self.tokens = domain, tuple(int(token) for token in tokens)
        parts = [pieces[token] for token in self.tokens]
        self.text = b"".join(parts).decode("latin-1")
        self.starts = [0, *itertools.accumulate(map(len, parts))]

    def place(self, form: str, start: int, end: int, context: int) -> Place | None:
        """Return the stretch of text from `start` to `end`.

        It is None where these are no borders of tokens, where the stretch is longer than `ROOM`, or where fewer than
        `SHORTEST` tokens stand before it.

        Args:
            context: tokens that a model sees.
        """
        first = bisect.bisect_left(self.starts, start)
        last = bisect.bisect_left(self.starts, end)
        whole = self.starts[first] == start and self.starts[last] == end
        if not whole or not 0 < last - first <= ROOM or first < SHORTEST:
            return None
        begin = max(0, first - (context - ROOM))
        before = self.text[self.starts[begin] : start]
        return Place(form, self.domain, self.tokens[begin:first], self.tokens[first:last], before)


def held_out(data: TokenData) -> Iterator[HeldOut]:
    """Yield the validation documents, domains in sorted order."""
    pieces = token_bytes(data.tokenizer())
    for domain, stored in sorted(data.validation.items()):
        tokens = np.asarray(stored)
        edges = [0, *(np.flatnonzero(tokens == data.eot) + 1), tokens.size]
        for start, end in itertools.pairwise(edges):
            if end > start:
                yield HeldOut(domain, [data.eot, *tokens[start : end - (tokens[end - 1] == data.eot)]], pieces)


def token_bytes(tokenizer: Tokenizer) -> list[bytes]:
    """Return the bytes of each token of a byte-level tokenizer; none for the end of a text."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    value = {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    texts = [tokenizer.backend.id_to_token(token) or "" for token in range(tokenizer.vocab_size)]
    return [b"" if i == tokenizer.eot else bytes(value[c] for c in text) for i, text in enumerate(texts)]


def minimal_pairs(data: TokenData, context: int, count: int) -> list[Pair]:
    """Return `count` pairs of each kind, or as many as the text has, couple by couple.

    Args:
        context: tokens that a model sees; context and continuation together are not longer.
        count: an even number.
    """
    documents = list(held_out(data))
    code = [one for one in documents if one.domain in CODE] or documents
    prose = [one for one in documents if one.domain not in CODE] or documents
    encode = data.tokenizer().encode
    return [
        *_two_forms("subject-verb", _verbs(prose, context), VERBS, encode, count),
        *_two_forms("determiner-noun", _determiners(documents, context), DETERMINERS, encode, count),
        *_two_forms("brackets", _brackets(code, context), BRACKETS, encode, count),
        *_names(code, context, count),
    ]


def rank(*parts: object) -> bytes:
    """Return what sorts items in an order that looks random and never changes."""
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()


def _places(
    documents: Iterable[HeldOut], pattern: str, context: int, *, form: int = 0, part: int = 0
) -> Iterator[tuple[re.Match[str], Place]]:
    """Yield the places of a pattern in documents, each with its match.

    Args:
        form, part: groups of the pattern: what is asked for, and where it stands.
    """
    for one in documents:
        for found in re.finditer(pattern, one.text):
            if place := one.place(found[form], *found.span(part), context):
                yield found, place


def _verbs(documents: Sequence[HeldOut], context: int) -> Iterator[Place]:
    pattern = rf"(?<= )([a-z]{{4,}})( ({'|'.join(itertools.chain(*VERBS))}))(?= [a-z])"
    for found, place in _places(documents, pattern, context, form=3, part=2):
        if not _NO_SUBJECT.fullmatch(found[1]):
            yield place


def _determiners(documents: Sequence[HeldOut], context: int) -> Iterator[Place]:
    plural = {form for _, form in DETERMINERS}
    pattern = rf" ({'|'.join(itertools.chain(*DETERMINERS))}) ([a-z]{{4,}})(?![\w'-])"
    for found, place in _places(documents, pattern, context, form=1):
        noun, many = found[2], bool(_PLURAL.fullmatch(found[2]))
        if many == (found[1] in plural) and not _NO_NOUN.fullmatch(noun) and (many or not noun.endswith("s")):
            yield place


def _brackets(documents: Sequence[HeldOut], context: int) -> Iterator[Place]:
    for found, place in _places(documents, r"(?<=\w)[)\]}](?=\s)", context):
        if _opened(place.text, found[0]):
            yield place


def _opened(text: str, closing: str) -> bool:
    """Return whether `closing` closes the innermost open bracket of a text, `FAR` away and with no quotes between."""
    waiting = [closing]
    for distance, character in enumerate(reversed(text)):
        if character in _OPENS:
            waiting.append(character)
        elif character in "([{":
            if character != _OPENS[waiting.pop()]:
                return False
            if not waiting:
                return distance >= FAR
        elif character in "\"'#":
            return False
    return False


def _two_forms(
    kind: str,
    places: Iterator[Place],
    forms: Sequence[Sequence[str]],
    encode: Callable[[str], list[int]],
    count: int,
) -> list[Pair]:
    """Return couples of places that differ in which of two forms stands there.

    The form is the beginning of the continuation, after a space but for brackets.
    """
    by_form: dict[str, list[Place]] = defaultdict(list)
    for place in _distinct(places):
        by_form[place.form].append(place)
    space = "" if kind == "brackets" else " "
    couples: list[tuple[bytes, Pair, Pair]] = []
    for one, other in forms:
        tokens = {form: tuple(encode(space + form)) for form in (one, other)}
        if len(tokens[one]) != len(tokens[other]):
            continue
        for i, couple in enumerate(zip(by_form[one], by_form[other], strict=False)):
            pairs = [
                Pair(kind, p.domain, p.context, p.right, tokens[wrong] + p.right[len(tokens[wrong]) :])
                for p, wrong in zip(couple, (other, one), strict=True)
            ]
            couples.append((rank(kind, one, other, i), pairs[0], pairs[1]))
    return _first(couples, count)


_NAME = r"(?<!\w)([A-Za-z][A-Za-z0-9]*_)(\w*[A-Za-z0-9])(?!\w)"


def _names(documents: Sequence[HeldOut], context: int, count: int) -> list[Pair]:
    """Return couples of names such as `find_user` and `get_host`: after `find_`, `user` is right and `host` wrong.

    Both contexts have both names, and neither has a name that is put together wrongly.
    """
    couples = []
    for number, one in enumerate(documents):
        waiting: dict[int, list[Place]] = defaultdict(list)
        # Second parts of names that their context has already.
        for place in _distinct(p for name, p in _places([one], _NAME, context, part=2) if name[0] in p.text):
            others = waiting[len(place.right)]
            other = next((other for other in others if _mixed(other, place)), None)
            if other is None:
                others.append(place)
                continue
            others.remove(other)
            pairs = [Pair("names", a.domain, a.context, a.right, b.right) for a, b in ((other, place), (place, other))]
            couples.append((rank(number, other.form, place.form, place.context), pairs[0], pairs[1]))
    return _first(couples, count)


def _mixed(one: Place, other: Place) -> bool:
    """Return whether two names share no part, and both contexts have both names but none that mixes their parts."""
    ((begin, rest),), ((start, end),) = (re.findall(_NAME, place.form) for place in (one, other))
    texts, wrong = (one.text, other.text), (begin + end, start + rest)
    apart = begin != start and rest != end
    both = all(place.form in text for place in (one, other) for text in texts)
    return apart and both and not any(name in text for name in wrong for text in texts)


def _first(couples: Iterable[tuple[bytes, Pair, Pair]], count: int) -> list[Pair]:
    """Return `count` pairs of the couples of the lowest ranks."""
    return [pair for _, *couple in sorted(couples, key=lambda c: c[0])[: count // 2] for pair in couple]


def _distinct(places: Iterable[Place]) -> list[Place]:
    """Return the places in the order of their rank, those with equal last words once."""
    by_end = {(place.context[-ROOM:], place.right): place for place in places}
    return sorted(by_end.values(), key=lambda place: rank(place.form, place.domain, place.context))
