"""Text -> tokens -> batches.

    data = prepare(DataConfig(corpus="sotu", tokenizer="bpe-4096"), cache)   # TokenData: memory-mapped tokens
    tokens, targets = TrainBatches(data, batch_size=32, context=256, seed=0).batch(step)
    for domain, tokens, targets in validation_batches(data, batch_size=32, context=256): ...

Read `corpus.py` (documents), `tokenizer.py`, `tokens.py` (files on disk), `batches.py` in this order. Batches are a
pure function of (seed, step, rank, world). Importing this package loads neither torch nor a tokenizer library.
"""

from typing import TYPE_CHECKING, Any

from moelab.data.corpus import open_corpus
from moelab.data.documents import Corpus, Document, UnknownCorpus
from moelab.data.packages import CorpusUnavailable
from moelab.data.preparation import encode_validation, is_prepared, prepare
from moelab.data.tokens import TokenData

if TYPE_CHECKING:
    from moelab.data.batches import TrainBatches, bits_per_byte, overall_loss, validation_batches
    from moelab.data.tokenizer import Tokenizer

__all__ = [
    "Corpus",
    "CorpusUnavailable",
    "Document",
    "TokenData",
    "Tokenizer",
    "TrainBatches",
    "UnknownCorpus",
    "bits_per_byte",
    "encode_validation",
    "is_prepared",
    "open_corpus",
    "overall_loss",
    "prepare",
    "validation_batches",
]


def __getattr__(name: str) -> Any:
    # Seconds of importing torch and tokenizers are paid by those who use them.
    if name == "Tokenizer":
        from moelab.data.tokenizer import Tokenizer

        return Tokenizer
    if name in __all__:
        from moelab.data import batches

        return getattr(batches, name)
    raise AttributeError(f"module 'moelab.data' has no attribute {name!r}")
