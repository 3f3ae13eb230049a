"""Start P ranks, watch them, and end them together.

    launcher     `launch`: starts the ranks, watches them, reports the one that failed
    child        a process that this one starts: its log, how it is stopped, how its end is told
    ranks        ranks as the launcher handles them: local processes, or tasks of srun
    process      what a rank itself calls: find its place, join the process group, give signs of life
    rendezvous   how ranks find each other: the store that rank 0 serves
    postmortem   how a rank died or where it hangs, from exit code, log and stacks

torchrun is not used because its agent does not watch for ranks that hang, takes a rank that stopped as asked, its
checkpoint written, for failed, leaves its ranks alive when it is killed, and loads torch (2 s, and memory) only to wait
(`tests/engine/test_torchs_own.py`). Ranks take their place from the variables that torchrun sets, so torchrun can start
them, too.
"""
