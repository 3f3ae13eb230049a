"""Options and checks that several commands share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from moelab import config, machine
from moelab.files import write_json
from moelab.runs.provenance import provenance
from moelab.runs.store import RunStore, published_weights
from moelab.slurm.profiles import names

EXPERIMENTS = "Experiments and their results"
RUNS = "Runs and models"
CLUSTER = "A cluster"
SIMULATOR = "The simulator"
BENCHMARKS = "Benchmarks and kernels"
"""Groups of commands in the help."""

AsJson = Annotated[bool, typer.Option("--json", help="all of it, as JSON")]
Experts = Annotated[list[int] | None, typer.Option("--experts", help="number of experts; repeat for several")]
Threads = Annotated[int, typer.Option(help="CPU threads")]
Device = Annotated[str, typer.Option(help="cpu or cuda")]
Out = Annotated[Path | None, typer.Option(help="folder for the numbers as JSON lines")]
Publish = Annotated[
    bool, typer.Option("--publish", help="into the published results (results/) instead of the workspace")
]


def experiment_names(incomplete: str) -> list[str]:
    """Complete the name of an experiment."""
    from moelab.experiments import EXPERIMENTS

    return [name for name in EXPERIMENTS if name.startswith(incomplete)]


def _of_experiments(context: typer.Context, names: list[str] | None) -> list[str] | None:
    """Refuse NAME=VALUE, a parameter without -p, among names of experiments."""
    if wrong := [name for name in names or () if "=" in name]:
        context.fail(f"got unexpected extra argument ({wrong[0]})")
    return names


SEVERAL_EXPERIMENTS: Any = typer.Argument(
    metavar="NAME...",
    help="experiments, see `moelab list`",
    autocompletion=experiment_names,
    callback=_of_experiments,
)


def run_names(incomplete: str) -> list[str]:
    """Complete the id of a run, or the name of published weights."""
    names = [path.name for path in published_weights()] + RunStore().ids()
    return [name for name in names if name.startswith(incomplete)]


RunOrModel = Annotated[
    str,
    typer.Argument(
        help="id of a run, or the beginning of it, or a directory of a run or an imported model",
        autocompletion=run_names,
    ),
]


def profile_names(incomplete: str) -> list[str]:
    """Complete the name of a cluster profile."""
    return [name for name in names() if name.startswith(incomplete)]


def _profile(without: str) -> Any:
    """Return the option of a cluster profile; `without` says what holds where it is not given."""
    return typer.Option(
        help=f"cluster: slurm/NAME.yaml or the path of one{without}", metavar="NAME", autocompletion=profile_names
    )


Profile = Annotated[str | None, _profile(" (processes: this machine); by default MOELAB_PROFILE")]
OwnProfile = Annotated[str | None, _profile("; without it this machine, whatever MOELAB_PROFILE says")]
Parameters = Annotated[
    list[str] | None,
    typer.Option(
        "-p",
        "--parameter",
        metavar="NAME=VALUE",
        help="a parameter of the notebook, or a setting of its runs such as train.tokens=4e6",
    ),
]


def parse_parameters(items: Iterable[str] | None, scale: str | None) -> dict[str, str]:
    """``-p NAME=VALUE`` options and --scale as texts by name. ValueError, one line."""
    given = {}
    for item in items or ():
        key, separator, value = item.partition("=")
        if not separator:
            raise ValueError(f"-p {item}: expected NAME=VALUE, such as -p {item or 'seeds'}=3")
        given[key.strip()] = value.strip()
    if scale is not None and given.setdefault("scale", scale) != scale:
        raise ValueError(f"-p scale={given['scale']} and --scale {scale} are two scales; give one of them")
    return given


def would_be_refused(check: Callable[[], None]) -> str:
    """Return for a dry run why a check refuses; empty if it does not. Data that exist nowhere are refused at once."""
    from moelab.data.documents import UnknownCorpus

    try:
        check()
    except UnknownCorpus:
        raise
    except ValueError as error:
        return f"as things are, it would be refused: {error}"
    return ""


def print_json(value: Any) -> None:
    """Print a value, of dataclasses perhaps, as JSON."""

    def plain(part: Any) -> Any:
        if is_dataclass(part) and not isinstance(part, type):
            return asdict(part)
        return part.item() if hasattr(part, "item") else str(part)

    print(json.dumps(value, indent=2, default=plain))


def check_choice(option: str, value: str, allowed: Sequence[str]) -> None:
    """Check an option's value. ValueError, one line, for another than is allowed."""
    if value not in allowed:
        raise ValueError(f"{option} must be {' or '.join(allowed)}, got {value!r}")


def check_dtypes(values: Iterable[str]) -> None:
    """Check --dtype; ValueError, one line."""
    for value in values:
        check_choice("--dtype", value, get_args(config.train.Dtype))


def check_device(device: str) -> None:
    """Check --device. ValueError, one line, for an unknown one or one that this machine lacks."""
    check_choice("--device", device, get_args(config.train.Device))
    if device == "cuda" and not machine.cuda_devices():
        raise ValueError("--device cuda: no CUDA device is available; allowed here: cpu")


def write_provenance(out: Path | None, name: str, title: str = "") -> None:
    """Write commit, versions and hardware next to a benchmark's numbers, with a title; only rank 0 writes."""
    from moelab.engine.launch import process

    place = process.find()
    if out is not None and (place is None or place.rank == 0):
        write_json(out / f"{name}.provenance.json", {**provenance(), **({"title": title} if title else {})})
