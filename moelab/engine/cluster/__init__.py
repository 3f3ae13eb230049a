"""`moelab check-cluster`: what the ranks of an allocation can do together, each check a row, a verdict at the end.

    check          the checks of ranks, cores, interfaces and clocks; the verdict, and `main`
    links          all-reduce and all-to-all among ranks
    shared_folder  file locks, visibility and a checkpoint on the folder that all ranks share
    findings       a row, and the ranks by node

All ranks call each check; whatever raises on one rank ends in a time limit. Rates of this machine and the expected
times of collectives come from the caller, because the rooms that know them are above the engine.
"""
