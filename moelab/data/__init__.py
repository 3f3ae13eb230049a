"""Text -> tokens -> batches: the embedded corpus, tokenizers, memory-mapped tokens, batches as a pure function of (seed, step, rank)."""
