"""Submit runs and notebooks as jobs of a Slurm cluster, or of this machine, and show how they stand. Imported by `lab` and `cli` only."""
