"""The decoder and its MoE layer: gpt.py, moe.py and routing.py, each readable top-down."""

from moelab.models.gpt import GPT, Output, build
from moelab.models.routing import Routing

__all__ = ["GPT", "Output", "Routing", "build"]
