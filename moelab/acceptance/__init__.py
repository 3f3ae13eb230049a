"""What can this machine do? Checks and measures a new GPU in stages, and the ranks of a cluster.

`stages.py` has the stages of `moelab gpu` with their limits and runs them; each stage's cases are in a module of its
name. `cluster.py` is `moelab check-cluster`, with `links.py` and `shared_folder.py`. May import the rooms below it:
experiments, runs, bench, simulate and on.
"""
