"""Clusters: the data-sheet figures of a GPU, a node and the network between nodes.

    cluster("a100-40gb")        # the paper's machines (also a100); a100-80gb, h100
    cluster("mine.yaml")        # another file with the same fields

The clusters that come with the package are the YAML files in `clusters/`. How much of these figures a program reaches
is in `moelab.simulate.constants`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import resources
from operator import attrgetter
from pathlib import Path

from moelab.config import from_json, unknown

ALIASES = {"a100": "a100-40gb"}


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        memory_gib: memory that CUDA reports, GiB.
        memory_gb_s: memory bandwidth, 1e9 bytes per second.
        tflops: dense fp16 or bf16 tensor-core rate, 1e12 operations per second.
        fp8: whether it multiplies fp8, at twice that rate.
    """

    name: str
    memory_gib: float
    memory_gb_s: float
    tflops: float
    fp8: bool = True


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of G GPUs.

    Attributes:
        gpus_per_node: G.
        near_gb_s: between GPUs of a node, 1e9 bytes per second and GPU, each direction.
        far_gb_s: between nodes, 1e9 bytes per second and GPU, each direction.
        price_per_gpu_hour: for the cost of tokens, in `currency`.
        currency: such as USD; empty for one that is not said.
        source: where the numbers come from.
    """

    name: str
    gpu: Gpu
    gpus_per_node: int
    near_gb_s: float
    far_gb_s: float
    price_per_gpu_hour: float = 0.0
    currency: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        figures = ("gpu.memory_gib", "gpu.memory_gb_s", "gpu.tflops", "gpus_per_node", "near_gb_s", "far_gb_s")
        for what, value in zip(figures, attrgetter(*figures)(self), strict=True):
            if not value > 0:
                raise ValueError(f"cluster {self.name}: {what} must be positive, got {value}")
        if not self.price_per_gpu_hour >= 0:
            raise ValueError(
                f"cluster {self.name}: price_per_gpu_hour must not be negative, got {self.price_per_gpu_hour}"
            )


def clusters() -> tuple[str, ...]:
    """Return the names of the clusters that come with the package."""
    files = resources.files(__package__).joinpath("clusters").iterdir()
    return tuple(sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml")))


def cluster(name: str | Cluster) -> Cluster:
    """Return a cluster of the package by name, or one described in a YAML file.

    Raises:
        ValueError: an unknown name, an unreadable file, or a wrong field; the message is one line.
    """
    if isinstance(name, Cluster):
        return name
    if name.endswith((".yaml", ".yml")):
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a UTF-8 text"
            raise ValueError(f"cluster file {name}: {reason}") from None
        return parse(text, name)
    known = clusters()
    plain = ALIASES.get(name.lower(), name.lower())
    if plain not in known:
        listing = f"{', '.join((*ALIASES, *known))}, or a YAML file"
        raise ValueError(unknown(f"no cluster {name!r}", name, known, listing=listing))
    return _shipped(plain)


def cluster_of_card(card: str) -> Cluster | None:
    """Return the package's cluster of a GPU, by its name as CUDA gives it; None if there is none.

    The clusters' GPUs are SXM modules; cards of PCIe (NVL, too) and slices (MIG) have other memory and rates.
    """
    words = card.lower().replace("-", " ").split()
    if {"pcie", "nvl", "mig"} & {*words}:
        return None
    known = (name for name in clusters() if all(word in words for word in name.split("-")))
    return next(map(cluster, known), None)


@cache
def _shipped(name: str) -> Cluster:
    return parse(resources.files(__package__).joinpath("clusters", f"{name}.yaml").read_text(encoding="utf-8"), name)


def parse(text: str, where: str) -> Cluster:
    """Return the cluster that a YAML text describes; a ValueError names the field that is missing, unknown or wrong."""
    import yaml

    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise ValueError(f"cluster file {where}{line}: not valid YAML") from None
    if not isinstance(data, dict):
        raise ValueError(f"cluster file {where}: expected fields such as name and gpu, got {type(data).__name__}")
    return from_json(Cluster, data, f"cluster file {where}")
