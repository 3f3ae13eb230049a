"""Open tokens on disk: `TokenData` maps the folder that `moelab.data.preparation.prepare` makes.

train.npy                   all training tokens, [N] uint16 (uint32 above 65536 ids), EOT after every document
validation-00-speeches.npy  the same for each domain's validation text
tokenizer.json              the tokenizer
meta.json                   sizes, hashes, losses to beat, versions, licence; `TokenData` reports from here
verified.json               size, times and inode of each file when its hash was last compared
"""

import contextlib
import copy
import functools
import hashlib
import itertools
import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from moelab.config.data import Part
from moelab.files import read_json, sha256_of, write_json

if TYPE_CHECKING:
    from moelab.data.tokenizer import Tokenizer

BLOCK = 8192
"""About how many tokens a block has where the training text is shared out, see `DataConfig.part`."""


class TokenData:
    """Tokens of a prepared corpus; opening costs no memory, and milliseconds once the files' hashes were compared.

    Attributes:
        folder: where the files are.
        meta: the content of `meta.json`.
        train: training tokens, [N] uint16 or uint32, read-only memory map.
        validation: the same for each domain that has validation text.
        vocab_size: number of ids of the tokenizer; a model's vocabulary may be padded beyond it.
        eot: id of the token that ends every document.
        domains: names of all domains, sorted.
        unigram_loss: validation loss, in nats per token, of guessing by training frequency: a model must beat it.
        fingerprint: SHA-256 over tokenizer and tokens: equal fingerprints are equal data.
        text: the fingerprint of the whole, also where these are tokens of a part.
    """

    def __init__(self, folder: Path):
        """Open a prepared folder.

        Raises:
            ValueError: a file is missing or is not what `meta.json` says: size and SHA-256. A file is read for its
                SHA-256 when it is new or its size, times or inode are others than those at the last comparison.
        """
        self.folder = folder
        try:
            self.meta: dict[str, Any] = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            _verify(folder, self.meta)
            self.train: np.ndarray = _map(folder / "train.npy")
            self.validation = {domain: _map(folder / part["file"]) for domain, part in self.meta["validation"].items()}
            self.vocab_size: int = self.meta["vocab_size"]
            self.eot: int = self.meta["eot"]
            self.domains: list[str] = sorted({*self.meta["train"]["domains"], *self.validation})
            self.unigram_loss: float = self.meta["unigram_loss"]
            self.fingerprint: str = self.meta["fingerprint"]
            self.text: str = self.fingerprint
        except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{folder} is not a prepared corpus: {type(error).__name__}: {error}") from error

    def __repr__(self) -> str:
        return f"TokenData({self.meta['corpus']!r}, {self.meta['tokenizer']!r}, {self.train.size:,} training tokens)"

    def bytes_per_token(self, domain: str | None = None) -> float:
        """UTF-8 bytes of validation text per token, of one domain or all; end-of-text tokens count, with no bytes."""
        if domain not in (None, *self.validation):
            raise ValueError(f"data: no validation text of domain {domain!r}; there is {sorted(self.validation)}")
        parts = [part for name, part in self.meta["validation"].items() if domain in (None, name)]
        return sum(part["bytes"] for part in parts) / sum(part["tokens"] for part in parts)

    def training_ranges(self) -> list[tuple[int, int, str]]:
        """(start, end, domain) of consecutive stretches of `train`; together they cover it."""
        return [(start, end, domain) for start, end, domain in self.meta["train"]["ranges"]]

    def of_part(self, part: Part) -> "TokenData":
        """Return the same data with a part of the training tokens, see `DataConfig.part`; a half is read into memory.

        Its fingerprint is another one than the whole's; its `text` is the same.
        """
        if part == "whole":
            return self
        half, ranges, size = copy.copy(self), [], 0
        pieces = []
        for start, end, domain in self.training_ranges():
            pairs = max(1, round((end - start) / (2 * BLOCK)))
            edges = [start + (end - start) * i // (2 * pairs) for i in range(2 * pairs + 1)]
            mine = list(itertools.pairwise(edges))[int(part == "odd blocks") :: 2]
            pieces += [self.train[a:b] for a, b in mine]
            tokens = sum(b - a for a, b in mine)
            ranges.append((size, size + tokens, domain))
            size += tokens
        half.train = np.concatenate(pieces)
        half.meta = {**self.meta, "train": {**self.meta["train"], "tokens": size, "ranges": ranges}}
        half.fingerprint = _of_part(self.text, part)
        return half

    def shares_text(self, fingerprint: str) -> bool:
        """Return whether a fingerprint is of this text, tokenized as here: of the whole or of a part of it."""
        return fingerprint in {_of_part(self.text, part) for part in get_args(Part)}

    def tokenizer(self) -> "Tokenizer":
        """Return the tokenizer, loaded on the first call."""
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> "Tokenizer":
        from moelab.data.tokenizer import Tokenizer  # reading tokens needs no tokenizer library

        return Tokenizer.load(self.folder / "tokenizer.json")

    def check_context(self, context: int) -> None:
        """Every part must hold a window of `context` tokens and the target of the last one.

        Raises:
            ValueError: a part is shorter.
        """
        if context < 1:
            raise ValueError(f"data: context {context} must be at least 1")
        parts = {"training": self.train} | {f"{name!r} validation": tokens for name, tokens in self.validation.items()}
        for name, tokens in parts.items():
            if tokens.size <= context:
                remedy = "" if name == "training" else "; else give that domain more text, or leave it out"
                raise ValueError(
                    f"data: context {context} is too long for {self.meta['corpus']!r}: its {name} text has "
                    f"{tokens.size} tokens, so at most {tokens.size - 1} is allowed{remedy}"
                )


def _verify(folder: Path, meta: dict[str, Any]) -> None:
    """Compare the files of a prepared folder with `meta.json`; ValueError, KeyError or OSError where they differ."""
    seen, stamps = None, {}
    with contextlib.suppress(OSError, ValueError):
        seen = read_json(folder / "verified.json")
    for name, file in meta["files"].items():
        stat = (folder / name).stat()
        stamps[name] = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
        if stat.st_size != file["bytes"]:
            raise ValueError(f"{name} has {stat.st_size} bytes, not {file['bytes']}")
        unseen = not isinstance(seen, dict) or seen.get(name) != stamps[name]
        if unseen and _sha256(folder / name, *stamps[name]) != file["sha256"]:
            raise ValueError(f"{name} was changed: its SHA-256 is not the one in meta.json")
    if meta["fingerprint"] != fingerprint(meta["files"]):
        raise ValueError("meta.json was changed: the fingerprint is not that of its files")
    if stamps != seen:
        with contextlib.suppress(OSError):  # a shared folder may be read-only
            write_json(folder / "verified.json", stamps)


@functools.cache
def _sha256(path: Path, *stamp: int) -> str:
    """Return the SHA-256 of a file as it is at a stamp; a process reads it once, also in a folder it cannot write."""
    return sha256_of(path)


def fingerprint(files: dict[str, dict[str, Any]]) -> str:
    """Return the SHA-256 over the files' SHA-256s."""
    return hashlib.sha256("".join(files[name]["sha256"] for name in sorted(files)).encode()).hexdigest()


def _of_part(text: str, part: Part) -> str:
    """Return the fingerprint of a part of the text with this fingerprint."""
    return text if part == "whole" else hashlib.sha256(f"{text} {part}".encode()).hexdigest()


def _map(path: Path) -> np.memmap:
    return np.load(path, mmap_mode="r", allow_pickle=False)
