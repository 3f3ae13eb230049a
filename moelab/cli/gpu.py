"""`moelab gpu`: test and measure this machine's GPU, one process after the other, each with a time limit.

A part is a command of its own: the tests that are marked `gpu`, or one benchmark. What it writes stays as it comes, so
that a part which fails, hangs or is killed loses nothing and does not stop the next one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from moelab import environment, paths
from moelab.cli._options import BENCHMARKS, Publish
from moelab.files import read_object, write_json
from moelab.runs.provenance import provenance

ROOT = Path(__file__).parents[2]
"""Of the source tree, in which the parts run."""
PASSED, FAILED, ENDED = "passed", "failed", "ended at its limit"


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        name: of its folder of results.
        what: what it answers, in a line.
        limit_s: seconds after which it is ended, with all processes that it started.
        command: arguments of Python; `OUT` stands for the part's folder.
    """

    name: str
    what: str
    limit_s: int
    command: tuple[str, ...]


OUT = "OUT"


def _tests(*files: str) -> tuple[str, ...]:
    return ("-m", "pytest", "-m", "gpu", "-v", "--tb=short", "-p", "no:cacheprovider", *files)


def _bench(name: str, options: str) -> tuple[str, ...]:
    return ("-m", "moelab.cli", "bench", name, "--device", "cuda", "--out", OUT, *options.split())


PARTS = (
    Part(
        "tests",
        "the kernels at the sizes of real layers, a model, training and a CUDA graph, against their references",
        180,
        _tests("tests/kernels/test_gpu.py", "tests/inference", "tests/training"),
    ),
    Part(
        "layer",
        "The MoE layer of 350M+MoE-128 on a GPU: ours, the einsum baseline and other libraries",
        120,
        _bench("layer", "--dtype bf16 --tokens 8192 --hidden 1024 --ffn 4096 --experts 128"),
    ),
    Part(
        "layer-top8",
        "A layer of 128 small experts, 8 of them for each token, on a GPU",
        120,
        _bench("layer", "--dtype bf16 --tokens 8192 --hidden 2048 --ffn 768 --experts 128 --top-k 8"),
    ),
    Part(
        "layer-decode",
        "The layer of a decoding step with 64 tokens on a GPU, forward",
        60,
        _bench("layer", "--dtype bf16 --tokens 64 --hidden 2048 --ffn 8192 --experts 64 --forward"),
    ),
    Part("gate", "The gate on a GPU: ours, the paper's masks and DeepSpeed's", 60, _bench("gate", "--tokens 16384")),
    Part(
        "decode",
        "A decoding step on a GPU, in bf16, beside the simulator's",
        240,
        _bench(
            "decode",
            "--model 1.3B --model 350M+PR-MoE-32/64 --batch 1 --batch 8 --batch 64 --ranks 0 --dtype bf16 "
            "--prompt 64 --output 64 --rounds 3",
        ),
    ),
    Part(
        "train",
        "Training steps of twins on a GPU, dense and MoE, in bf16",
        180,
        # All candidates are in one process; with fp32 beside bf16 they would take some 50 GB, and an A100 may have 40.
        _bench("train", "--width 256 --width 512 --sequences 256 --dtype bf16"),
    ),
    Part(
        "tune",
        "tile sizes, warps and stages of the kernels",
        240,
        ("-m", "moelab.cli", "kernels", "tune", "--minutes", "3.5"),
    ),
    Part("kernels", "all tests of the kernels, which compile some hundred variants", 300, _tests("tests/kernels")),
)


def register(app: typer.Typer) -> None:
    """Add the command to `moelab`."""
    app.command(rich_help_panel=BENCHMARKS)(gpu)


def gpu(
    part: Annotated[list[str] | None, typer.Option("--part", help="only this part; repeat for several")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list the parts with their limits, run nothing")] = False,
    again: Annotated[bool, typer.Option("--again", help="also parts that have passed")] = False,
    out: Annotated[
        Path | None, typer.Option(help="folder of logs and numbers; by default gpu/CARD in the workspace")
    ] = None,
    publish: Publish = False,
) -> None:
    """Test and measure this machine's GPU, in parts of at most 25 minutes together.

    Called again, it leaves out the parts that have passed. The results pages list the numbers.
    """
    known = {one.name: one for one in PARTS}
    if unknown := [name for name in part or () if name not in known]:
        raise ValueError(f"gpu: no part {unknown[0]!r}; allowed: {', '.join(known)}")
    chosen = [one for one in PARTS if not part or one.name in part]
    if dry_run:
        for one in chosen:
            print(f"{one.name}: {one.what} (at most {one.limit_s} s)")
        print(f"at most {sum(one.limit_s for one in chosen) / 60:.0f} minutes in all")
        return
    import torch

    if not torch.cuda.is_available():
        built = "" if torch.version.cuda else f"; torch {torch.__version__} is built without CUDA"
        raise ValueError(f"gpu: no CUDA device is available{built}")
    card = folder_name(torch.cuda.get_device_name())
    folder = (out or paths.home() / "gpu" / card).resolve()
    good = run(chosen, folder, paths.results_for(publish) / "benchmarks" / card, again=again)
    raise typer.Exit(int(not good))


def folder_name(card: str) -> str:
    """Return a GPU's name as that of a folder: "nvidia-h100-80gb-hbm3"."""
    return "-".join("".join(c if c.isalnum() else " " for c in card).split()).lower()


def run(parts: Sequence[Part], folder: Path, results: Path, *, again: bool = False) -> bool:
    """Run parts one after the other; return whether all have passed, now or before.

    How each ended stands in `parts.json`, written after each; what it printed in `<part>/log.txt`.

    Args:
        results: where the results pages look for benchmarks.
    """
    about = provenance()
    ends: dict[str, Any] = read_object(folder / "parts.json") or {}
    for part in parts:
        before = ends.get(part.name, {})
        if again or before.get("status") != PASSED:
            print(f"{part.name}: {part.what} (at most {part.limit_s} s)", flush=True)
            ends[part.name] = {**asdict(part), **_run(part, folder / part.name), "commit": about["commit"]}
            write_json(folder / "parts.json", ends)
            _publish(part, folder / part.name, results, about)
        end = ends[part.name]
        earlier = f", earlier, at commit {str(end['commit'])[:12]}" if end is before else ""
        print(f"{part.name}: {end['status']} in {end['seconds']:.0f} s{earlier}: {end['last_line']}", flush=True)
    return all(ends[part.name]["status"] == PASSED for part in parts)


def _run(part: Part, folder: Path) -> dict[str, Any]:
    """Run a part's command to its end or its limit; return how it ended."""
    folder.mkdir(parents=True, exist_ok=True)
    arguments = [str(folder) if argument == OUT else argument for argument in part.command]
    for rows in list(folder.glob("*.jsonl")):  # else a part that fails would publish them as those of this commit
        for earlier in list(folder.glob(f"{rows.stem}.*")):
            earlier.unlink()
    started, log = time.monotonic(), folder / "log.txt"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, environment.HOME.name: str(paths.home()), "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        try:
            status = FAILED if process.wait(part.limit_s) else PASSED
        except subprocess.TimeoutExpired:
            status = ENDED
        finally:
            with contextlib.suppress(ProcessLookupError):  # also what a part that has ended left behind
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
    return {"status": status, "seconds": round(time.monotonic() - started, 1), "last_line": last[:300]}


def _publish(part: Part, folder: Path, results: Path, about: dict[str, Any]) -> None:
    """Copy a benchmark's rows and figures to where the results pages list them, with provenance."""
    for rows in folder.glob("*.jsonl"):
        results.mkdir(parents=True, exist_ok=True)
        for earlier in list(results.glob(f"{part.name}.*")):  # such as a figure that is not drawn this time
            earlier.unlink()
        for file in folder.glob(f"{rows.stem}.*"):
            if not file.name.endswith(".provenance.json"):
                shutil.copyfile(file, results / (part.name + file.name.removeprefix(rows.stem)))
        write_json(results / f"{part.name}.provenance.json", {**about, "title": part.what})
