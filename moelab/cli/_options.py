"""Options and checks that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from moelab import config

Experts = Annotated[list[int] | None, typer.Option("--experts", help="number of experts; repeat for several")]
Threads = Annotated[int, typer.Option(help="CPU threads")]
Device = Annotated[str, typer.Option(help="cpu or cuda")]
Out = Annotated[Path | None, typer.Option(help="folder for the numbers as JSON lines")]


def check_device(device: str) -> None:
    """Check --device. ValueError, one line, for an unknown one or one that this machine lacks."""
    import torch

    if device not in (allowed := get_args(config.train.Device)):
        raise ValueError(f"--device must be {' or '.join(allowed)}, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no CUDA device is available; allowed here: cpu")


def write_provenance(out: Path | None, name: str) -> None:
    """Write commit, versions and hardware beside a benchmark's numbers."""
    if out is not None:
        from moelab.files import write_json
        from moelab.runs.provenance import provenance

        write_json(out / f"{name}.provenance.json", provenance())
