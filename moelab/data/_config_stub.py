"""Stands in for `moelab.config.DataConfig` until that module is merged; then this file goes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class DataConfig:
    corpus: str = "sotu"  # "sotu", "mix5", "folder:/path", "hf:NAME[:CONFIG]"
    tokenizer: str = "bpe-4096"  # "bpe-<vocab>" trained on the corpus's training split, or "gpt2"
    context: int = 256  # tokens per sequence
    text_field: str = "text"  # for hf: data sets
    max_documents: int = 0  # for hf: data sets, 0 = no bound (streaming needs a bound or max_bytes)
    max_bytes: int = 0  # stop reading the corpus after this many bytes of text, 0 = all
