"""Compute each operation of a MoE layer on CPU tensors with PyTorch, NumPy and threads of our own.

One file per operation (`gating`, `permute`, `experts`, `residual`), each proven against the reference in the public
file of the same name one folder up; `layout` shares rows out over slots of equal size, `gelu` and `swiglu` are the
experts' activations, `buffers` reuses memory and `pool` shares tasks out over threads.
"""
