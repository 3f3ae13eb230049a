"""Inference: a KV cache, generation, the paper's baseline beside the fast path, latency measured.

Read `generate.py` first; `cache.py` and `sampling.py` are its parts. `modes.py` makes a model fast (`frozen.py`, on a
CPU) or the paper's baseline.
"""

from moelab.inference.generate import Completion, Generator, Piece
from moelab.inference.modes import set_mode
from moelab.inference.sampling import Sampling

__all__ = ["Completion", "Generator", "Piece", "Sampling", "set_mode"]
