"""Make text by a fixed rule: for machines that have neither a corpus nor a network, so that everything can still run.

Words are drawn by Zipf's law and depend on the word before: each has 12 usual successors, of which one follows in
three of four places. So a model learns word frequencies first and successors later, and each domain has successors of
its own. It is no language, and losses on it compare only with losses on it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

RULE = 1
"""Number of the rule: another rule would be other text."""
DOMAINS = ("left", "right")
_WORDS, _SUCCESSORS, _DOCUMENTS, _LENGTH = 4000, 12, 400, 1000


def documents(domain: str) -> Iterator[tuple[str, str]]:
    """Return (name, text) of each document of a domain, the same on every machine."""
    common = np.random.Generator(np.random.PCG64(RULE))
    vowels, consonants = list("aeiou"), list("bcdfghklmnprstvw")
    syllables = [c + v for c in consonants for v in vowels]
    lengths = 1 + common.integers(0, 3, _WORDS) + (np.arange(_WORDS) > 60)
    words = ["".join(common.choice(syllables, n)) for n in lengths]
    frequency = 1.0 / (10 + np.arange(_WORDS))
    cumulative = np.cumsum(frequency / frequency.sum())
    draw = np.random.Generator(np.random.PCG64([RULE, DOMAINS.index(domain)]))
    successors = np.searchsorted(cumulative, draw.random((_WORDS, _SUCCESSORS))).clip(max=_WORDS - 1)
    for number in range(_DOCUMENTS):
        fresh = np.searchsorted(cumulative, draw.random(_LENGTH)).clip(max=_WORDS - 1)
        follows, which = draw.random(_LENGTH) < 0.75, draw.integers(0, _SUCCESSORS, _LENGTH)
        stops = draw.random(_LENGTH) < 0.08
        word, text = int(fresh[0]), []
        for i in range(_LENGTH):
            word = int(successors[word, which[i]] if follows[i] else fresh[i])
            text.append(words[word] + (".\n" if stops[i] else " "))
        yield f"{domain}-{number:04d}", "".join(text)
