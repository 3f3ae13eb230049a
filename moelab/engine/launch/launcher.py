"""`launch`: start P ranks, watch them, and end them together.

`launch` runs one command P times: as processes of this machine, or as tasks of srun inside an allocation of Slurm. It
returns when all ranks have ended well. When the first rank dies or hangs, all are ended within `Limits.death_s`, and
the error gives that rank, its host, how it died, and the last lines of its log. No process of any rank outlives
`launch`, and no rank outlives the launcher's process.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self

from moelab.engine.launch import postmortem, process
from moelab.engine.launch.postmortem import End, Log
from moelab.engine.launch.process import FINISHED, STOPPED, rank_name
from moelab.engine.launch.ranks import LocalRanks, Ranks, SlurmRanks, in_allocation
from moelab.environment import COLLECTIVE_S, DEATH_S, HANG_S, STOP_S

_POLL_S = 0.1
_RENEW_S = 5.0
"""How often the watch renews its folder's time stamp; much shorter than the age at which a run's sweep removes it."""


class ActiveClock:
    """Measures the seconds in which this process really ran; limits on ranks count these.

    When the machine sleeps (a closed laptop) or everything is halted (SIGSTOP of a whole session, a frozen container),
    ranks and launcher stand still together, which is not a hang. During sleep the monotonic clock stands still, too;
    after a halt two readings of it are further apart than the watch's pauses ever are. The wall clock may be set, by
    hours or backwards, and is not read.
    """

    LONGEST_STEP_S = 5.0  # between two readings; longer than a busy machine delays the watch

    def __init__(self) -> None:
        self.seconds = 0.0
        self._last = time.monotonic()

    def read(self) -> float:
        """Return the active seconds so far; call it at least every second."""
        before, self._last = self._last, time.monotonic()
        passed = self._last - before
        self.seconds += passed if passed <= self.LONGEST_STEP_S else 0.0
        return self.seconds


@dataclass(frozen=True)
class Limits:
    """Limits of the watch, in seconds; the environment may set each, ``MOELAB_HANG_S`` and so on.

    Attributes:
        hang_s: a rank that has given signs of life (`process.beat`) hangs if it gives none for this long.
        death_s: from the first death to the end of all ranks.
        stop_s: from the first rank that has stopped to the last; time for a checkpoint.
        collective_s: a collective that waits longer raises in the ranks (NCCL aborts them). It takes effect if the
            watch fails, so it is longer than `hang_s`.
    """

    hang_s: float = 300
    death_s: float = 20
    stop_s: float = 120
    collective_s: float = 600

    @classmethod
    def read(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """Return the limits that the environment sets, and the defaults of the others.

        Raises:
            ValueError: a value is not a number of seconds; the message is one line.
        """
        found = cls(*(variable.seconds(environment) for variable in (HANG_S, DEATH_S, STOP_S, COLLECTIVE_S)))
        if COLLECTIVE_S.get(environment):
            return found
        return replace(found, collective_s=max(found.collective_s, 2 * found.hang_s))


class RankFailed(RuntimeError):
    """A rank died or hung, and all ranks were ended. The message is one line.

    Attributes:
        rank, host: the failed rank and its host.
        end: how it ended.
        log: its log file.
        tail: the last lines of the log.
    """

    def __init__(self, rank: int, ranks: int, host: str, end: End, log: Path, tail: str) -> None:
        super().__init__(f"rank {rank} of {ranks} on {host} {end.how}")
        self.rank, self.host, self.end, self.log, self.tail = rank, host, end, log, tail


def launch(
    command: Sequence[str],
    ranks: int,
    logs: Path,
    *,
    limits: Limits | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    tick: Callable[[], None] = lambda: None,
    environment: Mapping[str, str] | None = None,
    per_node: int = 8,
    how: Literal["auto", "local", "srun"] = "auto",
    srun: Sequence[str] = (),
) -> int:
    """Run `command` as `ranks` ranks to their end.

    Args:
        logs: folder of the ranks' outputs, ``rank-00003.txt``, appended to; for srun on a disk that all nodes see.
        should_stop: called ten times a second; when it returns True, SIGTERM (srun: SIGUSR1) is sent to all ranks,
            once.
        tick: called as often.
        environment: the ranks' environment, before their place is added; by default this process's.
        per_node: ranks of a node, for srun.
        how: "local" starts processes, "srun" tasks of srun; "auto" uses srun in a job of several nodes or tasks.
        srun: further options of srun (a container, the binding to cores).

    Returns:
        FINISHED (0) if all ended well; STOPPED (75) if some stopped as asked and the others ended well.

    Raises:
        RankFailed: a rank failed.
        ValueError: the job of Slurm has too few tasks on a node for the layout; nothing is started.
        BaseException: whatever `should_stop` and `tick` raise, KeyboardInterrupt included, once the ranks have had
            `limits.stop_s` to stop.
    """
    limits = limits or Limits.read()
    environment = process.without_rank(environment if environment is not None else os.environ)
    environment[COLLECTIVE_S.name] = str(limits.collective_s)
    environment.setdefault("PYTHONUNBUFFERED", "1")  # keeps the last output of a rank that is killed
    logs.mkdir(parents=True, exist_ok=True)
    logs = logs.resolve()  # ranks on other nodes or in a container may have another working directory
    slurm = how == "srun" or (how == "auto" and in_allocation(environment))
    # Signs of life are written often; they go beside the logs only where other nodes write them, too.
    session = Path(tempfile.mkdtemp(prefix=".session-" if slurm else "moelab-ranks-", dir=logs if slurm else None))
    started: Ranks | None = None
    try:
        if slurm:
            started = SlurmRanks([*srun, *command], ranks, logs, session, environment, per_node)
        else:
            started = LocalRanks(command, ranks, logs, session, environment)
        watch = _Watch(started, limits, session)
        try:
            return watch.run(should_stop, tick)
        except RankFailed:
            raise
        except BaseException:
            watch.stop()
            raise
    finally:
        if started is not None:
            started.end(0.0)
        shutil.rmtree(session, ignore_errors=True)


class _Watch:
    def __init__(self, started: Ranks, limits: Limits, session: Path) -> None:
        self.started, self.limits, self.session = started, limits, session
        self.asked = False
        self.first_stopped: float | None = None
        self.order: list[int] = []  # ranks in the order of their failures
        self.beats: dict[int, tuple[int, float]] = {}  # rank -> time stamp of its file, and when it was seen to change
        self.clock = ActiveClock()
        self._looked = self._renewed = 0.0

    def run(self, should_stop: Callable[[], bool], tick: Callable[[], None]) -> int:
        while True:
            self.clock.read()
            self._renew()
            codes = self.started.codes()
            if self._failed(codes):
                raise self._dead()
            if all(code is not None for code in codes):
                return STOPPED if any(code != FINISHED for code in codes) else FINISHED
            if not self.asked and (should_stop() or STOPPED in codes):
                self._ask()
            if self._left_alone(codes):
                if any(code in self._by_request for code in codes):
                    # A rank was asked before it could handle that, so no rank has come further than meeting the others.
                    self.started.end(0.0)
                    return STOPPED
                late = f"did not stop within {self.limits.stop_s:g} s of the others"
                raise self._failure(codes.index(None), End(STOPPED, late, late))
            if time.monotonic() - self._looked > 0.5:
                self._looked = time.monotonic()
                if hanging := self._hanging(codes):
                    # The rank that hangs may have given its last sign a moment later than those that wait for it.
                    others = [rank for rank, code in enumerate(codes) if code is None and rank not in hanging]
                    raise self._hung(hanging + others, f"hangs: no sign of life for {self.limits.hang_s:g} s")
            tick()
            time.sleep(_POLL_S)

    def stop(self) -> None:
        """Let the ranks write a checkpoint and end, for at most `stop_s`."""
        self._ask()
        deadline = time.monotonic() + self.limits.stop_s
        while time.monotonic() < deadline:
            self._renew()
            codes = self.started.codes()
            if None not in codes:
                return
            if self._failed(codes):
                deadline = min(deadline, time.monotonic() + self.limits.death_s)
            time.sleep(_POLL_S)

    def _renew(self) -> None:
        """Show that the session's folder is in use.

        Nothing else changes its time stamp while the ranks start or wait, and the run's next trainer removes old
        folders from the logs.
        """
        if time.monotonic() - self._renewed > _RENEW_S:
            self._renewed = time.monotonic()
            with contextlib.suppress(OSError):
                os.utime(self.session)

    def _ask(self) -> None:
        if not self.asked:
            self.asked = True
            self.started.signal(self.started.stop_signal)

    @property
    def _by_request(self) -> tuple[int, ...]:
        """The codes of ranks that were asked to stop before they handled the signal, which is no failure."""
        return (-signal.SIGTERM, -signal.SIGUSR1) if self.asked else ()

    def _failed(self, codes: Sequence[int | None]) -> list[int]:
        """Return the ranks that failed, in the order of their ends as far as it is known."""
        good = {None, FINISHED, STOPPED, *self._by_request}
        self.order += [rank for rank, code in enumerate(codes) if code not in good and rank not in self.order]
        return self.order

    def _left_alone(self, codes: Sequence[int | None]) -> bool:
        """Return whether a rank goes on long after another has stopped."""
        ended = [code for code in codes if code not in (None, FINISHED)]
        if not ended or None not in codes:
            return False
        if self.first_stopped is None:
            self.first_stopped = self.clock.seconds
        # The others would wait in vain for a rank that was killed while starting.
        limit = self.limits.stop_s if all(code == STOPPED for code in ended) else self.limits.death_s
        return self.clock.seconds - self.first_stopped > limit

    def _hanging(self, codes: Sequence[int | None]) -> list[int]:
        """Return the ranks that have given no sign of life for too long."""
        now, late = self.clock.seconds, []
        for rank, code in enumerate(codes):
            try:
                stamp = (self.session / rank_name(rank)).stat().st_mtime_ns
            except OSError:  # no file yet: the rank is still starting, or reads data
                continue
            # Another machine sets the file's time stamp, so this machine's clock measures how long it has not changed.
            if self.beats.get(rank, (None,))[0] != stamp:
                self.beats[rank] = (stamp, now)
            elif code is None and now - self.beats[rank][1] > self.limits.hang_s:
                late.append(rank)
        return late

    def _dead(self) -> RankFailed:
        """End all ranks and return the failure that ended the first.

        The others get a moment to show whether they only lost the connection to it.
        """
        deadline = time.monotonic() + self.limits.death_s
        settle = time.monotonic() + min(2.0, self.limits.death_s / 4)
        codes = self.started.codes()
        while None in codes and time.monotonic() < settle:
            time.sleep(_POLL_S)
            codes = self.started.codes()
        self._failed(codes)
        ends = {rank: self.started.told_end(rank, code) for rank in self.order if (code := codes[rank]) is not None}
        killed = [rank for rank, end in ends.items() if end.killed]
        cut_off = [rank for rank, end in ends.items() if postmortem.lost_connection(end.error)]
        causes = [rank for rank in ends if rank not in killed and rank not in cut_off]
        silent = [rank for rank, code in enumerate(codes) if code is None]
        if not killed and not causes and silent:
            why = f"hangs: rank {cut_off[0]} waited for it ({ends[cut_off[0]].error})"
            return self._hung(silent, why, deadline)
        rank = (killed or causes or cut_off)[0]
        return self._failure(rank, ends[rank], deadline)

    def _hung(self, late: Sequence[int], how: str, deadline: float | None = None) -> RankFailed:
        """End all ranks and return the failure of the late rank that hangs; stacks show which only wait for it."""
        deadline = deadline or time.monotonic() + self.limits.death_s
        dumps = {rank: Log(self.started.logs[rank].path) for rank in late}
        halted = [rank for rank in late if self.started.halted(rank)]
        if not halted:
            self.started.signal(signal.SIGUSR2)
            self._await_stacks(list(dumps.values()))
        stacks = {rank: postmortem.stacks(dump.text) for rank, dump in dumps.items()}
        culprits = halted or [r for r in late if not postmortem.in_collective(stacks[r])] or list(late)
        rank = culprits[0]
        if rank in halted:
            how += "; it is halted by a signal (SIGSTOP)"
        elif where := postmortem.innermost(stacks[rank]):
            how += f"; it stands at {where}"
        if waiting := [r for r in late if r not in culprits]:
            how += f"; {_list(waiting)} {'wait' if len(waiting) > 1 else 'waits'} for others"
        if len(culprits) > 1:
            how += f"; {_list(culprits[1:])} too"
        return self._failure(rank, End(None, how), deadline)

    def _await_stacks(self, dumps: Sequence[Log]) -> None:
        """Wait until all ranks have written their stacks, for at most half of `death_s`."""
        deadline = time.monotonic() + self.limits.death_s / 2
        before: list[int] = []
        while time.monotonic() < deadline:
            time.sleep(0.25)
            sizes = [dump.grown for dump in dumps]
            if sizes == before and all(sizes):
                return
            before = sizes

    def _failure(self, rank: int, end: End, deadline: float | None = None) -> RankFailed:
        """End all ranks and return the failure of one of them."""
        log = self.started.logs[rank]
        host = self.started.host(rank)
        tail = "\n".join(log.text.splitlines()[-20:])
        self.started.end(max(0.1, (deadline or time.monotonic() + self.limits.death_s) - time.monotonic()))
        return RankFailed(rank, len(self.started.logs), host, end, log.path, tail)


def _list(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
