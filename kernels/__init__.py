"""Triton kernels of moelab, imported as ``moelab.kernels``; every op stands beside its PyTorch reference."""
