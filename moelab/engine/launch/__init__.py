"""Start P ranks, watch them, and end them together.

    launcher     `launch`: starts the ranks, watches them, reports the one that failed
    ranks        ranks as the launcher handles them: local processes, or tasks of srun
    process      what a rank does itself: find its place, join the process group, give signs of life
    rendezvous   how ranks find each other: the store that rank 0 serves
    postmortem   how a rank died or where it hangs, from exit code, log and stacks

Why not torchrun here: its agent answers SIGTERM by giving the ranks 30 s, and knows no difference between "stopped, the
checkpoint is written" and "failed"; it has no watch for ranks that hang; its ranks outlive it when it is killed; and it
loads torch (2 s, and memory) only to wait. Ranks take their place from the variables that torchrun sets, so torchrun
starts them just as well.
"""

from moelab.engine.launch.launcher import Limits, RankFailed, launch

__all__ = ["Limits", "RankFailed", "launch"]
