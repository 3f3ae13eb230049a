"""Compile the kernels ahead of time, for cards that are not there (`compile.py`)."""
