"""Benchmarks of the kernels; each measures its candidates in turns, in one process, beside a floor counted first."""
