"""moelab: every experiment of the DeepSpeed-MoE paper (arXiv 2201.05596), rerun, questioned and extended.

Importing this package loads neither torch nor anything else heavy; import what you need from its subpackages.
"""

__version__ = "0.1.0"
