"""Generate text with a KV cache, in an optimised mode or as the paper's PyTorch baseline.

`generate.py` has the generator, which uses `cache.py` and `sampling.py`. `modes.py` switches a model to one of the two
modes. On a CPU, `packing.py` packs the weights and computes a step in one C++ call. `text.py` opens a model with its
tokenizer.
"""

from moelab.inference.generate import Completion, Generator, Piece
from moelab.inference.modes import set_mode
from moelab.inference.sampling import Sampling

__all__ = ["Completion", "Generator", "Piece", "Sampling", "set_mode"]
