"""Provide the decoder (gpt.py) and its MoE layer (moe.py).

routing.py has the router, dispatch.py the copying of tokens to their experts and back, and baseline.py the paper's
PyTorch baseline.
"""

from moelab.models.gpt import GPT, Output, build, empty
from moelab.models.routing import Routing

__all__ = ["GPT", "Output", "Routing", "build", "empty"]
