"""Publish and show results: publications, the claims ledger, sweeps, the results pages.

May import every room but `notebook`, `slurm`, `lab` and `cli`.
"""
