"""Look before a batch begins whether its runs can be trained here: devices, texts, folders, free space."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from moelab import environment, machine, paths
from moelab.runs.spec import RunSpec
from moelab.runs.store import Run, RunStore

MOMENTS_AND_WEIGHT = 12
"""Bytes that a checkpoint takes for a parameter: fp32 weight and AdamW's two moments."""

ROOM = 64 << 20
"""Bytes for everything else: metrics, logs, the executed notebook."""


def check(
    specs: Sequence[RunSpec],
    store: RunStore | None = None,
    *,
    device: str = "cpu",
    publish: bool = False,
    executor: str | None = None,
    same_files: bool = True,
    same_packages: bool = True,
) -> None:
    """Check what can be known before any work; takes a moment and writes nothing.

    Finished runs need nothing but the folders. Runs that a cluster trains are not checked for devices here.

    Args:
        device: that the notebook itself measures on.
        publish: whether results go into the published ones, whose folder must be writable then.
        executor: what trains the runs, see `moelab.lab.Lab.run`; by default `MOELAB_EXECUTOR`.
        same_files: the runs see this machine's files; in a container, a folder of texts may have another path.
        same_packages: the runs are trained with this interpreter's packages.

    Raises:
        ValueError: one line: what is missing, where, and what helps.
    """
    store = store or RunStore()
    executor = executor or environment.EXECUTOR.get() or "processes"
    waiting = unfinished(specs, store)
    todo = waiting if executor != "read" else []
    # Of runs, too: one may be another user's.
    for folder in dict.fromkeys((paths.home(), *(existing(store.root / spec.id) for spec in todo))):
        _check_writable("home", environment.HOME.name, folder)
    if publish:
        _check_writable("results", environment.RESULTS.name, paths.results())
    check_devices(todo if executor in ("processes", "inline") else [], device)
    again = [s.start.run for s in todo if s.start and Run(s, store.root / s.id).trains_trunk_again]
    for teacher in {s.teacher.id: s.teacher for s in (*todo, *again) if s.teacher}.values():
        if (run := Run(teacher, store.root / teacher.id)).finished:
            run.require_weights()
    check_texts(waiting, same_files=same_files, same_packages=same_packages and executor != "read")
    _check_space(todo, again, store, publish)


def unfinished(specs: Sequence[RunSpec], store: RunStore) -> list[RunSpec]:
    """Return the specs of the runs without a result, and of those that these require."""
    return [spec for spec in store.needed(specs).values() if not Run(spec, store.root / spec.id).finished]


def _check_writable(name: str, variable: str, folder: Path) -> None:
    there = existing(folder)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "is not writable" if there.is_dir() else "is not a folder"
        raise ValueError(f"{name} folder {folder}: {there} {why}; {variable} names another")


def check_devices(specs: Sequence[RunSpec], device: str = "cpu") -> None:
    """Check that this machine has the CUDA devices that the runs want, and `device`; ValueError, one line.

    Runs on several ranks in a job of Slurm are not checked: other machines may train them.
    """
    from moelab.engine.launch.ranks import in_allocation

    elsewhere = in_allocation(os.environ)
    here = [s.parallel.ranks for s in specs if s.train.device == "cuda" and not (elsewhere and s.parallel.ranks > 1)]
    needed = max(here, default=int(device == "cuda"))
    if not needed:
        return
    if not (count := machine.cuda_devices()):
        raise ValueError(
            "no CUDA device is available here; scales smoke, quick, cpu and full need none, `moelab submit` asks a "
            "cluster"
        )
    if needed > count:
        raise ValueError(
            f"a run on {needed} ranks needs as many CUDA devices, {count} here; `moelab submit` asks a cluster"
        )


def check_texts(specs: Sequence[RunSpec], *, same_files: bool = True, same_packages: bool = True) -> None:
    """Check that the texts of runs are known, the user's are here and tokenizers suit the models; asks no network.

    Args:
        same_files, same_packages: as for `check`.

    Raises:
        UnknownCorpus: a text with this name exists nowhere.
        ValueError: one line.
    """
    from moelab.data.corpus import open_corpus
    from moelab.data.preparation import is_prepared
    from moelab.data.tokenizer import bpe_vocabulary

    folder = paths.home() / "data"
    for config in {repr(spec.data): spec.data for spec in specs}.values():
        if not same_files and config.corpus.startswith(("folder:", "hf:")):
            continue
        open_corpus(config, folder)
        if not same_packages or not config.corpus.startswith("hf:"):
            continue
        lacking = [package for package in ("datasets", "zstandard") if not find_spec(package)]
        if lacking and not is_prepared(config, folder):
            raise ValueError(
                f"data: {config.corpus} is read by the package {lacking[0]}, which {sys.executable} lacks: "
                "pip install -e '.[hf]'"
            )
    for spec in specs:
        entries = bpe_vocabulary(spec.data.tokenizer) or 50_257  # of GPT-2
        if entries > spec.model.vocab:
            raise ValueError(
                f"{spec.title}: tokenizer {spec.data.tokenizer} has {entries} entries, the model's embedding only "
                f"{spec.model.vocab} (data.tokenizer, model.vocab)"
            )


def _check_space(specs: Sequence[RunSpec], again: Sequence[RunSpec], store: RunStore, publish: bool) -> None:
    needed = ROOM + sum(max(0, _checkpoint_bytes(spec) - _present(store.root / spec.id)) for spec in specs)
    needed += sum(map(_checkpoint_bytes, again))  # of trunks, in their branches' folders
    for name, folder, size in (("home", store.root, needed), *([("results", paths.results(), ROOM)] * publish)):
        if (free := shutil.disk_usage(existing(folder)).free) < size:
            raise ValueError(
                f"{name} folder {folder}: {free / 2**30:.2f} GiB free, {size / 2**30:.2f} GiB needed"
                + (f" for the checkpoints of {len(specs)} runs" if size > ROOM else "")
            )


def _checkpoint_bytes(spec: RunSpec) -> int:
    """Return what the checkpoints take at most: two that stay, one being written, those for branches."""
    steps, every = spec.train.steps(spec.data.context), spec.train.checkpoint_every
    count = (min(3, -(-steps // every)) if every > 0 else 1) + len(spec.train.keep_at)
    return spec.model.parameters() * MOMENTS_AND_WEIGHT * count


def _present(run: Path) -> int:
    """Return the bytes of a run's checkpoints, which those that it goes on to write replace."""
    size = 0
    with contextlib.suppress(FileNotFoundError):  # removed meanwhile by who trains the run
        for file in (run / "checkpoints").rglob("*"):
            size += file.stat().st_size
    return size


def existing(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that exists."""
    return folder if folder.exists() or folder == folder.parent else existing(folder.parent)
