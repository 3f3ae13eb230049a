"""Measure how much validation text has a near copy in the training text, domain by domain.

    from moelab.data.corpus import open_corpus
    from moelab.data.near_copies import near_copies

    near_copies(open_corpus(DataConfig("mix15"), cache).documents())  # minutes; needs datasketch (extra `test`)

Two paragraphs are near copies if the sets of their three-word sequences have a Jaccard similarity of at least 0.7, as
estimated by MinHash. Paragraphs of fewer than 15 words are left out: short lines of code and labels are alike anywhere.
Words are what white space separates, so that text in Chinese, Japanese or Thai has hardly any and is not compared.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moelab.data.documents import Document

if TYPE_CHECKING:
    from datasketch import MinHash

SIMILARITY = 0.7
PERMUTATIONS = 64
FEWEST_WORDS = 15
SEQUENCE = 3  # words


@dataclass(frozen=True)
class Copies:
    """How much of a domain's validation text has a near copy in the training text of any domain.

    Attributes:
        paragraphs: how many were compared.
        words: in them.
        copied_paragraphs, copied_words: of those that have a near copy.
        nearest: domain of the training text -> words that have their nearest copy there.
    """

    paragraphs: int
    words: int
    copied_paragraphs: int
    copied_words: int
    nearest: dict[str, int]

    @property
    def share(self) -> float:
        """Share of the words in paragraphs that have a near copy; NaN where no paragraph was compared."""
        return self.copied_words / self.words if self.words else math.nan


def near_copies(documents: Iterable[Document]) -> dict[str, Copies]:
    """Return domain -> near copies of its validation text in the training text, for all that have such text.

    Args:
        documents: of a corpus, in any order; the training text is kept in memory meanwhile.
    """
    from datasketch import MinHashLSH

    training: list[Document] = []
    index = MinHashLSH(threshold=SIMILARITY, num_perm=PERMUTATIONS)
    held: list[tuple[str, int, MinHash]] = []  # domain, words, sketch
    domains: set[str] = set()
    for document in documents:
        if document.split == "train":
            training.append(document)
            continue
        domains.add(document.domain)
        for words in paragraphs(document.text):
            held.append((document.domain, len(words), sketch(words)))
            index.insert(len(held) - 1, held[-1][2])
    nearest: dict[int, tuple[float, str]] = {}
    for document in training:
        for words in paragraphs(document.text):
            signature = sketch(words)
            for i in index.query(signature):
                similarity = signature.jaccard(held[i][2])
                if similarity >= SIMILARITY and similarity > nearest.get(i, (0.0, ""))[0]:
                    nearest[i] = (similarity, document.domain)
    return {domain: _copies(domain, held, nearest) for domain in sorted(domains)}


def _copies(domain: str, held: list[tuple[str, int, MinHash]], nearest: dict[int, tuple[float, str]]) -> Copies:
    words = {i: count for i, (of, count, _) in enumerate(held) if of == domain}
    copied = [i for i in words if i in nearest]
    where: Counter[str] = Counter()
    for i in copied:
        where[nearest[i][1]] += words[i]
    return Copies(len(words), sum(words.values()), len(copied), where.total(), dict(where.most_common()))


def paragraphs(text: str) -> Iterator[list[str]]:
    """Return the words of each paragraph that has enough of them; without blank lines, a line is a paragraph."""
    text = text.replace("\r\n", "\n")  # a field of JSON may have them
    for paragraph in re.split(r"\n\s*\n" if "\n\n" in text else "\n", text):
        words = paragraph.split()
        if len(words) >= FEWEST_WORDS:
            yield words


def sketch(words: list[str]) -> MinHash:
    """Return the MinHash of a paragraph's sequences of words."""
    from datasketch import MinHash

    sequences = {zlib.crc32(" ".join(words[i : i + SEQUENCE]).encode()) for i in range(len(words) - SEQUENCE + 1)}
    return MinHash.bulk([list(sequences)], num_perm=PERMUTATIONS, hashfunc=int)[0]
