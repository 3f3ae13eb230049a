"""Turn text into tokens, and tokens into batches.

    data = prepare(DataConfig(corpus="sotu", tokenizer="bpe-4096"), cache)   # TokenData: memory-mapped tokens
    tokens, targets = TrainBatches(data, batch_size=32, context=256, seed=0).batch(step)
    for domain, tokens, targets in validation_batches(data, batch_size=32, context=256): ...

Read `corpus.py` (documents), `tokenizer.py`, `tokens.py` (files on disk), `batches.py` in this order. Batches are a
pure function of (seed, step, rank, world). Importing this package loads neither torch nor a tokenizer library.
"""

from moelab.data.corpus import open_corpus
from moelab.data.documents import Corpus, Document, UnknownCorpus
from moelab.data.packages import CorpusUnavailable
from moelab.data.preparation import encode_validation, is_prepared, prepare
from moelab.data.tokens import TokenData

__all__ = [
    "Corpus",
    "CorpusUnavailable",
    "Document",
    "TokenData",
    "UnknownCorpus",
    "encode_validation",
    "is_prepared",
    "open_corpus",
    "prepare",
]
