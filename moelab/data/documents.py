"""What a corpus is: documents in an order that never changes, each wholly training or wholly validation."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "validation"]


class UnknownCorpus(ValueError):
    """A name of a text that is none of the known ones, whatever a machine has."""


@dataclass(frozen=True)
class Document:
    """A piece of text with its place in the corpus.

    Attributes:
        domain: what kind of text it is; losses are reported per domain.
        split: "train" or "validation".
        text: the text, not empty.
        name: unique within the corpus.
    """

    domain: str
    split: Split
    text: str
    name: str


@dataclass(frozen=True)
class Corpus:
    """A source of documents.

    Attributes:
        name: as the user wrote it.
        licence: under which terms the text may be used.
        source: where it comes from, with versions.
        state: what else the documents depend on (package versions, or sizes and times of files); two corpora of the
            same name and state have the same documents.
        documents: starts a new reading.
        slow: a reading takes long, for a network or for parsing, so that reading twice is worth avoiding.
    """

    name: str
    licence: str
    source: str
    state: str
    documents: Callable[[], Iterator[Document]]
    slow: bool = False


def hash_fraction(text: str) -> float:
    """Return a number in [0, 1) that depends on the text alone: the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest()) / 2**48
