"""Describe a model, a training, a data set, a distillation and a parallel layout, each by a frozen dataclass.

This package imports neither torch nor anything else of moelab. Letters in names and comments: S tokens, E experts, K
experts per token, C capacity, M model (hidden) size, F feed-forward size, H heads, D head size, V vocabulary, L layers,
T context length, G GPUs per node, P ranks.
"""

from moelab.config._check import unknown
from moelab.config.boundary import from_json, from_text
from moelab.config.data import DataConfig
from moelab.config.decoder import DecoderConfig, expert_pattern
from moelab.config.distill import DistillConfig
from moelab.config.feed_forward import DTYPE_BYTES, ExpertConfig, FeedForward
from moelab.config.model import ModelConfig
from moelab.config.names import BASES
from moelab.config.parallel import ExpertLayout, ParallelConfig, Position
from moelab.config.routing import RoutingConfig
from moelab.config.serialization import digest, identity, to_json
from moelab.config.train import TrainConfig
from moelab.config.upcycle import UpcycleConfig

__all__ = [
    "BASES",
    "DTYPE_BYTES",
    "DataConfig",
    "DecoderConfig",
    "DistillConfig",
    "ExpertConfig",
    "ExpertLayout",
    "FeedForward",
    "ModelConfig",
    "ParallelConfig",
    "Position",
    "RoutingConfig",
    "TrainConfig",
    "UpcycleConfig",
    "digest",
    "expert_pattern",
    "from_json",
    "from_text",
    "identity",
    "to_json",
    "unknown",
]
