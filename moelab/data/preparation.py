"""Tokenize a corpus once: `prepare` returns its `TokenData`, made on the first call and opened ever after.

The folder of a corpus and tokenizer appears whole or not at all: any number of processes may ask for it at once. What a
build had encoded when it was killed, or failed for its disk or network, the next call takes over.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moelab.config import DataConfig
from moelab.data.corpus import open_corpus
from moelab.data.documents import Corpus, Document
from moelab.data.tokens import TokenData, fingerprint
from moelab.files import read_json, sha256_of, sweep, write_json
from moelab.machine import versions

if TYPE_CHECKING:
    from moelab.data.tokenizer import Tokenizer

FORMAT = 1  # part of a folder's name: a change of what is written makes new folders instead of misreading old ones
TOKENIZER_CHARACTERS = 200_000_000  # of training text, after which a tokenizer has learned enough
PIECE = 1 << 20  # characters encoded at a time; longer documents are cut at line ends
BATCH = 8 << 20  # characters handed to all cores at once
PROGRESS = "progress.json"  # of a build: how many documents are encoded, and what was counted about them
SAVE_S = 60.0  # seconds of encoding between two saves of a build's progress
WAIT_S = 20.0  # seconds of waiting for another process's build between two calls of `progress`


def prepare(config: DataConfig, cache: Path, progress: Callable[[str], None] | None = None) -> TokenData:
    """Return the tokens of `config`'s corpus, made on the first call and opened from `cache` afterwards.

    Concurrent calls build once: the others wait for a file lock. (Where a network file system does not honour locks
    between machines, both build, and one of two equal folders stays.)

    Args:
        config: everything except `context` and `part` decides which folder it is. `context` is only checked against the
            lengths; `part` chooses from what is there.
        cache: folder for prepared corpora and downloaded packages; created if missing.
        progress: called with a line of text at each stage, each time that what is encoded so far is saved, as often
            while what a dead build had encoded is read again, and every `WAIT_S` seconds while another process prepares
            the same. It may raise an exception to stop; the next call goes on from there.

    Raises:
        ValueError: an unknown corpus or tokenizer, no training or validation text, or a context that is too long.
        CorpusUnavailable: the text cannot be had here.
    """
    say = progress or (lambda line: None)
    corpus = open_corpus(config, cache)
    folder = cache / _folder_name(config, corpus)
    data = _open(folder, warn=False)
    if data is None:
        from moelab.data.tokenizer import bpe_vocabulary

        bpe_vocabulary(config.tokenizer)  # a wrong name should fail before any work
        cache.mkdir(parents=True, exist_ok=True)
        with _held(cache / f".{folder.name}.lock", lambda: say(f"{corpus.name}: another process prepares it")):
            data = _open(folder)  # another process may have built it while this one waited
            if data is None:
                _build(config, corpus, folder, say)
                data = TokenData(folder)
    data = data.of_part(config.part)
    data.check_context(config.context)
    return data


@contextlib.contextmanager
def _held(file: Path, waits: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of a file; call `waits` every `WAIT_S` seconds until another process has let go of it."""
    from filelock import FileLock

    lock = FileLock(file)
    while True:
        try:
            lock.acquire(timeout=WAIT_S)
            break
        except TimeoutError:
            waits()
    try:
        yield
    finally:
        lock.release()


def is_prepared(config: DataConfig, cache: Path) -> bool:
    """Return whether `prepare` would find the tokens of `config`'s corpus in `cache`; reads no text and no network."""
    return _open(cache / _folder_name(config, open_corpus(config, cache)), warn=False) is not None


def encode_validation(
    config: DataConfig, cache: Path, tokenizer: "Tokenizer", max_tokens: int = 0
) -> dict[str, np.ndarray]:
    """Encode a corpus's validation text with the tokenizer of another model; nothing is stored.

    Args:
        config: `corpus`, its bounds and `context` are used.
        max_tokens: at most this many tokens of each domain, rounded down to whole windows; 0 = all.

    Returns:
        Domain -> windows that follow each other, [N, T] int64; domains in sorted order.

    Raises:
        ValueError: `context` is longer than `max_tokens` or than a domain's text, or there is no validation text.
        CorpusUnavailable: the text cannot be had here.
    """
    T = config.context
    if 0 < max_tokens < T:
        raise ValueError(f"data: max_tokens {max_tokens} must be 0 (all) or at least the context, {T}")
    wanted = max_tokens // T * T
    ids: dict[str, list[int]] = {}
    for document in open_corpus(config, cache).documents():
        if document.split != "validation":
            continue
        tokens = ids.setdefault(document.domain, [])
        for piece in _pieces(document.text, PIECE >> 4):
            if wanted and len(tokens) >= wanted:
                break
            tokens += tokenizer.encode(piece)
        tokens.append(tokenizer.eot)
    if not ids:
        raise ValueError(f"data: {config.corpus!r} has no validation text")
    short = min(ids, key=lambda domain: len(ids[domain]))
    if len(ids[short]) < T:
        raise ValueError(
            f"data: context {T} is too long for {config.corpus!r}: its {short!r} validation text has "
            f"{len(ids[short])} tokens"
        )
    ends = {domain: min(wanted or len(tokens), len(tokens)) // T * T for domain, tokens in sorted(ids.items())}
    return {domain: np.asarray(ids[domain][:end], np.int64).reshape(-1, T) for domain, end in ends.items()}


def _open(folder: Path, warn: bool = True) -> TokenData | None:
    if not folder.exists():
        return None
    try:
        return TokenData(folder)
    except ValueError as error:
        if isinstance(cause := error.__cause__, OSError) and not isinstance(cause, FileNotFoundError):
            raise ValueError(f"data: {folder} cannot be read: {cause}") from error  # the data may be whole
        if warn:
            warnings.warn(f"rebuilding: {error}", stacklevel=3)
        return None


def _folder_name(config: DataConfig, corpus: Corpus) -> str:
    shape = [FORMAT, config.corpus, config.tokenizer, config.text_field, config.max_documents, config.max_bytes]
    digest = hashlib.sha256(json.dumps([*shape, corpus.state]).encode()).hexdigest()[:12]
    return f"{_slug(config.corpus)}-{_slug(config.tokenizer)}-{digest}"


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[-40:]


def _build(config: DataConfig, corpus: Corpus, folder: Path, say: Callable[[str], None]) -> None:
    from moelab.data.tokenizer import Tokenizer, bpe_vocabulary

    started, size = time.monotonic(), bpe_vocabulary(config.tokenizer)
    sweep(folder.parent, older_s=7 * 86_400)  # what killed builds left; a build of a large corpus may take days
    scratch = Path(tempfile.mkdtemp(prefix=f".building-{folder.name}-", dir=folder.parent))
    progress, spool = scratch / PROGRESS, scratch / "spool.jsonl"

    def documents() -> Iterator[Document]:
        return _spooled(spool) if spool.exists() else corpus.documents()

    try:
        if _open(folder, warn=False) is not None:
            return  # on a network file system it is seen only after the folder around it has changed
        done = _take_over(folder, scratch)
        if done:
            tokenizer = Tokenizer.load(scratch / "tokenizer.json")
            say(f"{corpus.name}: continuing after {done['documents']:,} documents")
        else:
            if size is None:
                say("loading gpt2")
                tokenizer = Tokenizer.gpt2(folder.parent)
            else:
                if corpus.slow:  # learning and encoding are two readings
                    say(f"{corpus.name}: reading")
                    _write_spool(spool, corpus.documents())
                say(f"{corpus.name}: learning {config.tokenizer}")
                tokenizer = Tokenizer.train(_training_texts(documents()), size)
            tokenizer.save(scratch / "tokenizer.json")
            say(f"{corpus.name}: encoding")
        meta = _encode(config, documents(), tokenizer, scratch, done, say)
        if open_corpus(config, folder.parent).state != corpus.state:  # the folder's name is that of the text before
            raise ValueError(f"data: {corpus.name} was changed while it was read; prepare it again")
        files = {
            file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
            for file in sorted(scratch.iterdir())
            if file not in (progress, spool)
        }
        meta |= {
            "files": files,
            "fingerprint": fingerprint(files),
            "corpus": corpus.name,
            "licence": corpus.licence,
            "source": corpus.source,
            "tokenizer": config.tokenizer,
            "max_documents": config.max_documents,
            "max_bytes": config.max_bytes,
            "versions": versions("moelab", "tokenizers", "numpy", "datasets"),
            "seconds": round(time.monotonic() - started, 2),  # of this call; a dead build's are not counted
        }
        (scratch / "meta.json").write_text(json.dumps(meta, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        scratch.chmod(0o755)  # mkdtemp's folders are private; prepared data may be shared
        for file in (spool, progress):
            file.unlink(missing_ok=True)
        if _open(folder, warn=False) is not None:
            return  # another machine was faster; its data is the same, and jobs may have mapped it
        if folder.exists():  # a broken one: renamed away, since processes may still have it open
            folder.rename(broken := scratch.with_name(scratch.name + "-replaced"))  # a name that `sweep` knows
            shutil.rmtree(broken, ignore_errors=True)
        try:
            scratch.rename(folder)
        except OSError:
            if not folder.exists():  # else another machine was faster, and its data is the same
                raise
        say(f"{corpus.name}: {meta['train']['tokens']:,} training tokens in {meta['seconds']:.1f} s")
    except ValueError:  # of the text or its settings: another try would end in the same way
        progress.unlink(missing_ok=True)
        raise
    finally:
        if not progress.exists():
            shutil.rmtree(scratch, ignore_errors=True)


def _take_over(folder: Path, scratch: Path) -> dict[str, Any] | None:
    """Move what an unfinished build of `folder` had encoded to `scratch`, and return its progress; None without one.

    The caller holds the lock, so that build is dead. Where locks do not hold between machines, it fails at its next
    save, for its folder is gone; until then it writes the bytes that this one writes to the same places.
    """
    for left in folder.parent.glob(f".building-{folder.name}-*/{PROGRESS}"):
        with contextlib.suppress(ValueError, OSError):  # another process may take it over at the same time
            done = read_json(left)
            if done and done["versions"] == versions("tokenizers", "datasets"):
                left.parent.rename(scratch)  # in place of the empty folder
                sweep(scratch, older_s=-1)  # half a progress file
                return done
    return None


def _write_spool(path: Path, documents: Iterable[Document]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps([document.domain, document.split, document.text, document.name]) + "\n")


def _spooled(path: Path) -> Iterator[Document]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield Document(*json.loads(line))


def _training_texts(documents: Iterable[Document]) -> Iterator[str]:
    read = 0
    for document in documents:
        if read >= TOKENIZER_CHARACTERS:
            return
        if document.split == "train":
            read += len(document.text)
            yield document.text


class _Part:
    """One growing .npy file with what is counted about it; it goes on from `done`, what `save` returned for it."""

    def __init__(self, path: Path, vocab_size: int, done: Mapping[str, Any] | None = None):
        self.path = path
        self.dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        self.counts = np.zeros(vocab_size, np.int64)  # of each id
        done = done or {"size": 0, "bytes": {}, "tokens": {}, "documents": {}, "ranges": []}
        self.bytes = Counter[str](done["bytes"])  # of text, by domain
        self.tokens = Counter[str](done["tokens"])
        self.documents = Counter[str](done["documents"])
        self.ranges: list[list[Any]] = done["ranges"]  # [start, end, domain]
        self.size: int = done["size"]
        self._file = path.open("r+b" if self.size else "w+b")
        self._write_header()
        for start in range(0, self.size, BATCH):
            n = min(BATCH, self.size - start)
            ids = np.frombuffer(self._file.read(n * self.dtype.itemsize), self.dtype)
            self.counts += np.bincount(ids, minlength=vocab_size)
        self._file.truncate()  # what was written after the last save

    def append(self, document: Document, ids: np.ndarray) -> None:
        self._file.write(ids.astype(self.dtype).tobytes())
        self.counts += np.bincount(ids, minlength=self.counts.size)
        if self.ranges and self.ranges[-1][2] == document.domain:
            self.ranges[-1][1] += ids.size
        else:
            self.ranges.append([self.size, self.size + ids.size, document.domain])
        self.size += ids.size
        self.bytes[document.domain] += len(document.text.encode())
        self.tokens[document.domain] += ids.size
        self.documents[document.domain] += 1

    def save(self) -> dict[str, Any]:
        """Wait until all tokens are on the disk, and return what is counted about them."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return {name: getattr(self, name) for name in ("size", "bytes", "tokens", "documents", "ranges")}

    def close(self) -> None:
        self._file.seek(0)
        self._write_header()
        self._file.close()

    def _write_header(self) -> None:
        # numpy pads the header so that a growing first axis can be written over in place.
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.size,)}
        np.lib.format.write_array_header_1_0(self._file, header)


def _encode(
    config: DataConfig,
    documents: Iterable[Document],
    tokenizer: "Tokenizer",
    folder: Path,
    done: dict[str, Any] | None,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Write the token files, and return the part of `meta.json` about them; `done` is the progress of a dead build."""
    done = done or {"documents": 0, "train": None, "validation": {}}
    train = _Part(folder / "train.npy", tokenizer.vocab_size, done["train"])
    validation: dict[str, _Part] = {}

    def part_of(domain: str, done: Mapping[str, Any] | None = None) -> _Part:
        if domain not in validation:
            path = folder / f"validation-{len(validation):02d}-{_slug(domain)}.npy"
            validation[domain] = _Part(path, tokenizer.vocab_size, done)
        return validation[domain]

    for domain, counted in done["validation"].items():
        part_of(domain, counted)
    saved = time.monotonic()
    rest = iter(documents)
    for read, _ in enumerate(itertools.islice(rest, done["documents"]), 1):  # streamed again: hours of a large text
        if time.monotonic() - saved >= SAVE_S:
            saved = time.monotonic()
            say(f"{config.corpus}: {read:,} of {done['documents']:,} documents read again")
    for read, (document, ids) in enumerate(_encoded(rest, tokenizer), done["documents"] + 1):
        (train if document.split == "train" else part_of(document.domain)).append(document, ids)
        if time.monotonic() - saved >= SAVE_S:
            progress = {
                "documents": read,
                "train": train.save(),
                "validation": {domain: part.save() for domain, part in validation.items()},
                "versions": versions("tokenizers", "datasets"),
            }
            write_json(folder / PROGRESS, progress, durable=True)
            saved = time.monotonic()
            say(f"{config.corpus}: {read:,} documents encoded")
    for part in [train, *validation.values()]:
        part.close()
    if not train.size or not validation:
        missing = "validation" if train.size else "training"
        raise ValueError(
            f"data: {config.corpus!r} has no {missing} text; add documents, or raise max_documents or max_bytes"
        )

    log_p = np.log((train.counts + 1) / (train.size + tokenizer.vocab_size))  # add one: no id is impossible
    nats = {domain: -float(part.counts @ log_p) for domain, part in validation.items()}
    return {
        "format": FORMAT,
        "vocab_size": tokenizer.vocab_size,
        "eot": tokenizer.eot,
        "dtype": train.dtype.name,
        "unigram_loss": sum(nats.values()) / sum(part.size for part in validation.values()),
        "train": {
            "tokens": train.size,
            "bytes": train.bytes.total(),
            "documents": train.documents.total(),
            "domains": {
                domain: {"tokens": tokens, "bytes": train.bytes[domain], "documents": train.documents[domain]}
                for domain, tokens in sorted(train.tokens.items())
            },
            "ranges": train.ranges,
        },
        "validation": {
            domain: {
                "file": part.path.name,
                "tokens": part.size,
                "bytes": part.bytes.total(),
                "documents": part.documents.total(),
                "unigram_loss": nats[domain] / part.size,
            }
            for domain, part in sorted(validation.items())
        },
    }


def _encoded(documents: Iterable[Document], tokenizer: "Tokenizer") -> Iterator[tuple[Document, np.ndarray]]:
    """Each document with its ids and a final `eot`, [n] int64; encoded many at a time, to use all cores."""
    for group in _groups(documents):
        pieces = [list(_pieces(document.text, PIECE)) for document in group]
        encoded = tokenizer.encode_batch([piece for document in pieces for piece in document])
        for document, parts in zip(group, pieces, strict=True):
            ids = [np.asarray(next(encoded), np.int64) for _ in parts]
            yield document, np.concatenate([*ids, np.asarray([tokenizer.eot])])


def _groups(documents: Iterable[Document]) -> Iterator[list[Document]]:
    group: list[Document] = []
    size = 0
    for document in documents:
        group.append(document)
        size += len(document.text)
        if size >= BATCH:
            yield group
            group, size = [], 0
    if group:
        yield group


def _pieces(text: str, size: int) -> Iterator[str]:
    """Return the text in pieces of at most `size` characters, cut after a line end, or anywhere if there is none."""
    start = 0
    while len(text) - start > size:
        end = text.rfind("\n", start, start + size) + 1 or start + size
        yield text[start:end]
        start = end
    yield text[start:]
