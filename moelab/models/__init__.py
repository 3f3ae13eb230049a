"""Provide the decoder (gpt.py) and its MoE layer (moe.py).

routing.py has the router, dispatch.py the copying of tokens to their experts and back, and baseline.py the paper's
PyTorch baseline. The kernels look for the tile sizes of this workspace's cards (`moelab kernels tune`) in its home.
"""

from moelab import paths
from moelab.kernels import tuning
from moelab.models.gpt import GPT, Output, build, empty
from moelab.models.routing import Routing

tuning.FOLDERS.append(paths.home() / "tuned")

__all__ = ["GPT", "Output", "Routing", "build", "empty"]
