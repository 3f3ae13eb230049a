"""Publish and show results: publications, the claims ledger, views of a run, the results pages.

May import every room but `notebook`, `slurm`, `lab` and `cli`.
"""
