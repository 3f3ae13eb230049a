"""The routed models of Clark et al., "Unified Scaling Laws for Routed Language Models" (arXiv 2202.01169), as data.

The table `clark.csv` has the last row of each of the 223 settings of `data/curves.csv.gz`, from the public repository
google-deepmind/scaling_laws_for_routing (Apache-2.0), at the commit that each row names; `clark_curves.csv` has the
losses before. Both are made by

    clark.write(Path("curves.csv.gz"), ["seen", "first"])

Losses are what a prediction is tested on, so most of them are *sealed*: the tables leave them out, and only the kinds
of `seal` that are named are filled in. What was seen or opened once stays so.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from moelab.paper._table import Provenance, Table, load

Seal = Literal["seen", "first", "sealed"]

COMMIT = "42da0c392b127df2c01fa7b705f72396050d05e5"
"""Of google-deepmind/scaling_laws_for_routing: the last one, of 2022-07-21."""

SHA256 = "c03e7531add85e594f368d33bac4a0220280be858a7ed12d147cf73af6a3819f"
"""Of data/curves.csv.gz at `COMMIT`."""

LEARNED = ("S-Base", "RL-R")
FIRST_EXPERTS = (2, 8, 16, 256, 512)
"""Numbers of experts whose settings the first prediction is compared with, of the `LEARNED` routers at every size."""

_LOSSES = {
    "loss": "loss_validation",
    "loss_c4": "loss_c4",
    "loss_curation": "loss_curation_corpus",
    "loss_lambada": "loss_lambada",
    "loss_pile": "loss_pile",
    "loss_wikitext": "loss_wikitext103",
}
"""Column -> that of the source."""


@dataclass(frozen=True, kw_only=True)
class RoutedModel(Provenance):
    """One trained setting at its last step: a decoder, top-k routing in a share of its layers; losses in nats a token.

    setting: its number in the source. router: `Dense`, `S-Base`, `RL-R` or `Hash`. experts: per routed layer, E; 1 if
    dense. frequency: share of layers that are routed. flop_increase: of a dense model, how much wider its feed-forward
    layers are. size: the source's label. parameters, total: that a token passes, and in all. step: of about 250,000.
    seal: `seen` (dense models, and what was looked at before any prediction), `first` (opened after the first
    prediction) or `sealed` (for a later one). loss: on held-out text of the training's kind; the others on other
    texts, empty where the source has none. All are empty while they are sealed.
    """

    setting: int
    router: str
    experts: int
    k: int
    frequency: float
    flop_increase: float
    hidden: int
    layers: int
    seed: int
    size: str
    parameters: float
    total: float
    step: int
    seal: str
    loss: float | None
    loss_c4: float | None
    loss_curation: float | None
    loss_lambada: float | None
    loss_pile: float | None
    loss_wikitext: float | None


def routed_models(seal: str | None = None) -> Table[RoutedModel]:
    """Return the settings of Clark et al., of one kind of `seal` or all; ValueError for an unknown kind."""
    return load("clark.csv", RoutedModel).where(seal=seal)


@dataclass(frozen=True, kw_only=True)
class RoutedCurve(Provenance):
    """The curve of one setting: `losses` as in `RoutedModel` at `steps`, every 10,000 of about 250,000."""

    setting: int
    steps: tuple[int, ...]
    losses: tuple[float, ...]


def routed_curves() -> Table[RoutedCurve]:
    """Return the losses during training of the settings that are not sealed."""
    return load("clark_curves.csv", RoutedCurve)


def seal(router: str, experts: int, size: str, k: int, frequency: float, flop_increase: float) -> Seal:
    """Return whether a setting has been seen, is opened after the first prediction, or stays sealed.

    Seen before any prediction were dense models, 370M and 1.3B with 32, 64 and 128 experts, S-Base with 128 at every
    size, and two experts a token of 8 and 64.
    """
    plain = k == 1 and frequency == 0.5 and flop_increase == 1
    if router == "Dense":
        return "seen" if plain else "sealed"
    if (
        (plain and size in ("370M", "1.3B") and experts in (32, 64, 128))
        or (plain and router == "S-Base" and experts == 128)
        or (k == 2 and experts in (8, 64))
    ):
        return "seen"
    return "first" if plain and router in LEARNED and experts in FIRST_EXPERTS else "sealed"


def rows(curves: Path, reveal: Iterable[str]) -> list[dict[str, object]]:
    """Return the table's rows from the source.

    Args:
        curves: the source's data/curves.csv.gz.
        reveal: kinds of `Seal` whose losses are filled in.

    Raises:
        ValueError: one line: it is another file.
    """
    shown = set(reveal)
    last: dict[str, Mapping[str, str]] = {}
    for row in _source(curves):
        if row["hyper_id"] not in last or int(row["step"]) >= int(last[row["hyper_id"]]["step"]):
            last[row["hyper_id"]] = row
    return [_row(row, shown) for row in sorted(last.values(), key=lambda row: int(row["hyper_id"]))]


def curve_rows(curves: Path, reveal: Iterable[str]) -> list[dict[str, object]]:
    """Return the rows of `routed_curves` from the source, losses of the untrained models left out; see `rows`."""
    points: dict[int, dict[int, float]] = {int(str(r["setting"])): {} for r in rows(curves, reveal) if r["loss"] != ""}
    for row in _source(curves):
        setting, step = int(row["hyper_id"]), int(row["step"])
        if setting in points and step > 0 and row["loss_validation"]:
            points[setting][step] = round(float(row["loss_validation"]), 5)
    return [
        {
            "setting": setting,
            "steps": " ".join(map(str, sorted(of))),
            "losses": " ".join(str(of[s]) for s in sorted(of)),
            **_FROM,
        }
        for setting, of in points.items()
    ]


def _source(curves: Path) -> csv.DictReader[str]:
    packed = curves.read_bytes()
    if (found := hashlib.sha256(packed).hexdigest()) != SHA256:
        raise ValueError(f"{curves}: sha256 is {found}, expected {SHA256} (data/curves.csv.gz at {COMMIT[:7]})")
    return csv.DictReader(gzip.decompress(packed).decode().splitlines())


_FROM = {
    "source": f"arXiv 2202.01169; google-deepmind/scaling_laws_for_routing data/curves.csv.gz at {COMMIT[:7]}",
    "how": "table cell",
    "conflict": "",
    "note": "",
}


def _row(row: Mapping[str, str], shown: set[str]) -> dict[str, object]:
    router, experts, size = row["router_type"], int(row["num_experts"]), row["model_size_label"]
    k, frequency, flops = int(row["k"]), float(row["routing_frequency"]), float(row["flop_increase"])
    kind = seal(router, experts, size, k, frequency, flops)
    given = {name: row[theirs] if kind in shown else "" for name, theirs in _LOSSES.items()}
    losses = {name: round(float(text), 5) if text else "" for name, text in given.items()}
    return {
        "setting": int(row["hyper_id"]),
        "router": router,
        "experts": experts,
        "k": k,
        "frequency": round(frequency, 6),
        "flop_increase": flops,
        "hidden": int(row["d_model"]),
        "layers": int(row["num_blocks"]),
        "seed": int(row["seed"]),
        "size": size,
        "parameters": float(row["dense_parameter_count"]),
        "total": float(row["total_parameter_count"]),
        "step": int(row["step"]),
        "seal": kind,
        **losses,
        **_FROM,
    }


def write(curves: Path, reveal: Iterable[str]) -> None:
    """Write `clark.csv` and `clark_curves.csv` anew, see `rows`."""
    kinds, own = list(reveal), [field.name for field in fields(Provenance)]
    tables = {"clark.csv": (RoutedModel, rows), "clark_curves.csv": (RoutedCurve, curve_rows)}
    for name, (kind, made) in tables.items():
        names = [field.name for field in fields(kind) if field.name not in own]
        with Path(__file__).with_name(name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, names + own, lineterminator="\n")
            writer.writeheader()
            writer.writerows(made(curves, kinds))
