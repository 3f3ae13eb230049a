"""Check the folder that all ranks share: file locks, how soon a change is seen, writing a checkpoint."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import torch
import torch.distributed as dist

from moelab.config import ModelConfig
from moelab.engine.checkpoint import storage
from moelab.engine.checkpoint.format import Piece, read_index
from moelab.engine.cluster.findings import VISIBLE_S, Finding, Nodes, size_text
from moelab.engine.collectives import all_gather_json, broadcast_json
from moelab.engine.groups import gloo_group
from moelab.engine.launch.process import Place
from moelab.files import write_text


def files(place: Place, nodes: Nodes, folder: Path) -> Iterator[Finding]:
    """Yield whether locks exclude each other and how soon a replaced file is seen."""
    with _common_folder(place, folder) as inside:
        last = place.world_size - 1
        refused, doubled, errors = set(), set(), set()
        for holder in dict.fromkeys((0, last)):
            mine, error = _lock(inside) if place.rank == holder else (None, "")
            dist.barrier()
            other, other_error = _lock(inside) if place.rank != holder else (None, "")
            answers = all_gather_json([mine is not None, other is not None, error or other_error])
            errors |= {text for _, _, text in answers} - {""}
            if not answers[holder][0]:
                refused.add(nodes.hosts[holder])
            else:
                doubled |= {nodes.hosts[rank] for rank, (_, takes, _) in enumerate(answers) if takes}
            for file in (mine, other):
                if file is not None:
                    file.close()
            dist.barrier()
        bad = refused | doubled
        how = "held by two at once" if doubled else "cannot be taken"
        yield Finding(
            f"file locks in {folder}",
            f"{how}, on {', '.join(sorted(bad)[:3])}{'; '.join(['', *sorted(errors)])}"
            if bad
            else "exclude each other",
            "exclude each other on all ranks",
            "wrong" if bad else "ok",
            "mount with locking (lustre: flock, NFS: no nolock), or put MOELAB_HOME elsewhere" if bad else "",
        )
        seconds = _visible(place, inside)
        everyone = all_gather_json(seconds)
        late = [nodes.hosts[i] for i, value in enumerate(everyone) if value is None]
        worst = max((value for value in everyone if value is not None), default=0.0)
        yield Finding(
            "a file replaced by one rank, seen by the others",
            f"not seen on {late[0]} in {VISIBLE_S:g} s" if late else f"after {worst * 1e3:.3g} ms",
            f"within {VISIBLE_S:g} s",
            "wrong" if late else "ok",
            f"{folder} must be one file system on all nodes, without long caching of attributes" if late else "",
        )


def _lock(folder: Path) -> tuple[IO[str] | None, str]:
    """Return a file that holds the lock (flock, as a run's), or None and why not; no reason if another holds it."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context((folder / "lock").open("a"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None, ""
        except OSError as error:
            return None, error.strerror or str(error)
        stack.pop_all()
        return file, ""


def _visible(place: Place, folder: Path) -> float | None:
    """Return the seconds until this rank sees what rank 0 has written over an older text, None if it does not."""
    path = folder / "seen.txt"
    if place.rank == 0:
        write_text(path, "old")
    dist.barrier()
    with contextlib.suppress(OSError):
        path.read_text()  # so that what is cached is the old text
    dist.barrier()
    if place.rank == 0:
        write_text(path, "new")
    dist.barrier()
    started = time.monotonic()
    while time.monotonic() - started < VISIBLE_S:
        with contextlib.suppress(OSError):
            if path.read_text() == "new":
                return time.monotonic() - started
        time.sleep(0.01)
    return None


@contextlib.contextmanager
def _common_folder(place: Place, folder: Path) -> Iterator[Path]:
    """Give a new folder inside `folder`, which rank 0 makes and every rank must see; rank 0 removes it at the end.

    Raises:
        ValueError: a rank does not see it.
    """
    name = broadcast_json(f".check-cluster-{socket.gethostname()}-{os.getpid()}")
    inside = folder / name
    error = ""
    try:
        if place.rank == 0:
            try:
                inside.mkdir(parents=True)
            except OSError as failed:
                error = f"{folder}: {failed.strerror}"
        error = broadcast_json(error)
        deadline = time.monotonic() + VISIBLE_S
        while not inside.is_dir() and not error and time.monotonic() < deadline:
            time.sleep(0.05)
        seen = all_gather_json(inside.is_dir())
        if error or not all(seen):
            raise ValueError(
                error or f"check-cluster: {folder} is not one folder on all nodes (rank {seen.index(False)})"
            )
        yield inside
        dist.barrier()
    finally:
        if place.rank == 0:
            shutil.rmtree(inside, ignore_errors=True)


def checkpoint(place: Place, folder: Path, size: int) -> Iterator[Finding]:
    """Write a checkpoint of `size` bytes a rank with the engine's own code, and read it back."""
    with _common_folder(place, folder) as inside:
        group, count = gloo_group(), size // 4
        values = torch.arange(count, dtype=torch.float32) + place.rank
        shape, offset = (place.world_size * count,), (place.rank * count,)
        path = inside / "step-00000001"
        dist.barrier()
        started = time.monotonic()
        storage.write(path, 1, {}, [Piece("model/check", shape, offset, values)], 1, group)
        dist.barrier()
        written_s = max(all_gather_json(time.monotonic() - started))
        back = torch.zeros_like(values)
        started = time.monotonic()
        storage.read(path, read_index(path), [Piece("model/check", shape, offset, back)])
        read_s = time.monotonic() - started
        equal = all_gather_json(bool(torch.equal(values, back)))
        total, read_s = size * place.world_size, max(all_gather_json(read_s))
    rate = total / written_s / 1e9
    measured = f"{rate:.3g} GB/s, read back at {total / read_s / 1e9:.3g} GB/s"
    if size >= 16 << 20:  # less says nothing of a large one
        large = ModelConfig.parse("1.3B+MoE-128").parameters() * 12 / 1e9  # fp32 weights and AdamW's two moments
        measured += f"; 1.3B+MoE-128 ({large:.0f} GB) would take {large / rate / 60:.1f} minutes"
    yield Finding(
        f"checkpoint of {size_text(size)} a rank, written and hashed",
        measured,
        "reads back equal",
        "ok" if all(equal) else "wrong",
        "" if all(equal) else "the file system returned other bytes than were written: do not use it",
    )
