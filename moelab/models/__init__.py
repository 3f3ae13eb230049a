"""The decoder (gpt.py) and its MoE layer: moe.py, with the router in routing.py, the ways to the experts and back in
dispatch.py, and the paper's PyTorch baseline in baseline.py. Each is readable top-down."""

from moelab.models.gpt import GPT, Output, build
from moelab.models.routing import Routing

__all__ = ["GPT", "Output", "Routing", "build"]
