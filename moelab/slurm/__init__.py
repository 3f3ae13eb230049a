"""Submit runs and notebooks as jobs of a Slurm cluster or of this machine, and show their states.

Only `lab` and `cli` import this package.
"""
