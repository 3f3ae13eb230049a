"""The paper's inference bars, and the settings under which they are simulated.

The settings are those that `moelab.paper` states; `Bar.assumed` says what is assumed where the paper states nothing.
The free constants were fitted on the bars with `Bar.fitted`; all others are predictions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moelab import paper
from moelab.config import ModelConfig
from moelab.config.parallel import ParallelConfig
from moelab.lazy import pd
from moelab.simulate.decoding import DecodeEstimate, decode
from moelab.simulate.systems import System, system

FITTED = "fig-10"
CLUSTER = "a100-40gb"
BATCH = 8
"""Sequences of a tensor group, derived from latency x throughput of Figs 10 and 11, which gives 8 each time."""
CONTEXT = 10
"""Tokens in the cache; the authors' script runs `--seq-length 10 --out-seq-length 10` (`SCRIPT`): it never has more."""
SCRIPT = "Megatron-DeepSpeed 8f3a0100 (2022-01-06), examples/generate_text.sh"
"""The authors' own inference runs, in the history of a public branch.

They give prompts, batch 8, shapes (width 8192; 29, 44 and 58 layers on 32 nodes, slicing 8), the experts of the large
PR-MoEs (64, in the last two layers 128), and the MoE layers of their students (17 and 19, where the PR-MoEs of 40 and
44 layers have 20 and 22)."""

# The tensor slicing of Table 6; that of dense models is from the captions of Figs 14 and 15.
TENSOR = {"1.3B": 1, "2.4B": 1, "8B": 4, "24B": 8, "47B": 8}


@dataclass(frozen=True)
class Bar:
    """One latency bar of a figure.

    Attributes:
        figure, label, gpus: as the paper gives them.
        system: a name of `moelab.simulate.systems`, or a program of one's own.
        model, parallel: the simulated model and layout.
        paper_ms, low, high: the paper's value and the bounds of its reading, ms; None where the bar is not available.
        fitted: whether the constants were fitted on it.
        assumed: what is assumed because the paper does not state it.
    """

    figure: str
    label: str
    system: str | System
    gpus: int
    model: ModelConfig
    parallel: ParallelConfig
    paper_ms: float | None
    low: float | None
    high: float | None
    fitted: bool = False
    assumed: str = ""

    def simulate(self, **options: Any) -> DecodeEstimate:
        """Return the simulated decoding step; `options` as in `decode_sweep`."""
        return decode(self.model, self.parallel, CLUSTER, program=self.system, batch=BATCH, context=CONTEXT, **options)

    def row(self, **options: Any) -> dict[str, Any]:
        """Return one row of a table, with the paper's and the simulated value.

        It has latencies (ms), their error (per cent), the simulated throughput (tokens / s / GPU), parts and memory.
        """
        got = self.simulate(**options)
        error = None if self.paper_ms is None else 100 * (got.latency_ms / self.paper_ms - 1)
        return {
            "figure": self.figure,
            "model": self.label,
            "system": self.system,
            "gpus": self.gpus,
            "tensor": self.parallel.tensor,
            "paper_ms": self.paper_ms,
            "paper_low": self.low,
            "paper_high": self.high,
            "simulated_ms": got.latency_ms,
            "simulated_throughput": 1e3 * BATCH / self.parallel.tensor / got.latency_ms,
            "error_percent": error,
            "kind": "fitted" if self.fitted else "predicted",
            "bound": got.bound,
            "gib_per_gpu": got.total_gib,
            "fits": got.fits,
            **{f"{part}_ms": ms for part, ms in got.parts_ms.items()},
            "assumed": self.assumed,
        }


def frame(bars: Sequence[Bar]) -> pd.DataFrame:
    """Return `Bar.row` of each bar as a table."""
    return pd.DataFrame([bar.row() for bar in bars])


def layout(model: ModelConfig, gpus: int, tensor: int, program: str) -> ParallelConfig:
    """Return the paper's layout of `gpus` GPUs (section 5.2).

    It has tensor slicing, then as much expert parallelism as there are experts, then expert slicing. Layers of fewer
    experts than GPUs use their own number of ranks. Expert slicing is the same in all layers: what the layer of most
    experts needs.
    """
    most = max(model.experts, default=0)
    slicing = max(1, gpus // most) if most else 1
    return ParallelConfig(
        tensor=tensor,
        data=gpus // tensor,
        expert_slicing=slicing,
        gpus_per_node=8 if model.is_moe else max(8, tensor),
        exchange=system(program).exchange,
    )


def family(base: str, layers: int = 0) -> dict[str, ModelConfig]:
    """Return the standard MoE of a base and its variants: "MoE", "PR-MoE", "PR-MoE+MoS".

    The PR-MoE has the expert counts of the 1.3B base, which the authors' script (`SCRIPT`) has for the large models,
    too. The Mixture-of-Students has an eighth fewer layers: 21 of 24, and in `SCRIPT` 35 of 40 and 38 of 44.

    Args:
        layers: of the first two, where they are fewer than the base's.
    """
    depth = f"+L{layers}" if layers else ""
    plain, pr_moe = (ModelConfig.parse(f"{base}+{experts}{depth}") for experts in ("MoE-128", "PR-MoE-64/128"))
    student = ModelConfig.parse(f"{base}+PR-MoE-64/128+L{round(pr_moe.layers * 7 / 8)}")
    return {"MoE": plain, "PR-MoE": pr_moe, "PR-MoE+MoS": student}


def fig10() -> list[Bar]:
    """Return the bars of the fit: 52B on 8 to 64 GPUs, both systems."""
    return _measured("fig-10")


def fig11() -> list[Bar]:
    """Return the bars of 107B to 2T: PyTorch on 128 GPUs, DeepSpeed on 128 or 256.

    Of 2T only the printed ratio is available, of 349B nothing.
    """
    bars = _measured("fig-11")
    have = {(b.label, b.system) for b in bars}
    for name, gpus in (("8B+MoE-128", 128), ("24B+MoE-128", 256), ("47B+MoE-128", 256)):
        for program, count in (("pytorch", 128), ("deepspeed", gpus)):
            if (name, program) not in have:
                bars.append(_bar("fig-11", name, program, count, "no bar at hand"))
    order = ["2.4B+MoE-128", "8B+MoE-128", "24B+MoE-128", "47B+MoE-128"]
    return sorted(bars, key=lambda b: (order.index(b.label), b.system != "pytorch"))


def tutorial() -> list[Bar]:
    """Return the tutorial's bars of the two systems that are simulated, without those that repeat Fig 10."""
    repeated = {(b.label, b.gpus) for b in fig10()}
    return [b for b in _measured("tutorial") if (b.label, b.gpus) not in repeated]


def variants(names: tuple[str, ...] = ("1.3B", "2.4B", "8B", "24B", "47B")) -> list[Bar]:
    """Return the bars of Fig 13: standard MoE, PR-MoE and PR-MoE + MoS of every size on DeepSpeed.

    GPU counts are as in Fig 11. The paper's values are not available.
    """
    bars = []
    for base in names:
        gpus = 256 if base in ("24B", "47B") else 128
        for kind, model in family(base).items():
            assumed = "" if kind == "MoE" or base in ("1.3B", "8B") else "experts 64/128 as in the sizes that are known"
            bars.append(_bar("fig-13", f"{base} {kind}", "deepspeed", gpus, assumed, model=model, tensor=TENSOR[base]))
    return bars


def fig14() -> list[Bar]:
    """Return the bars of Fig 14: 6.7B dense on one GPU, and the 52B family on 128."""
    dense = _bar("fig-14", "6.7B dense", "pytorch", 1, model=ModelConfig.parse("6.7B"), tensor=1)
    return [dense, *_family_bars("fig-14", "52B MoE", 128, family("1.3B"), 1)]


def fig15() -> list[Bar]:
    """Return the bars of Fig 15: 175B dense in 16 slices, and the 1.5T family in 8.

    GPU counts and the shape of the 1.5T model are not in the paper; the authors' script (`SCRIPT`) has 32 nodes and 44
    layers of width 8192, which hold 1.54T.
    """
    dense = _bar("fig-15", "175B dense", "pytorch", 16, model=ModelConfig.parse("175B"), tensor=16)
    assumed = "shape and GPU count from the authors' script"
    return [dense, *_family_bars("fig-15", "1.5T MoE", 256, family("47B", layers=44), 8, assumed)]


def _family_bars(
    figure: str, label: str, gpus: int, models: dict[str, ModelConfig], tensor: int, assumed: str = ""
) -> list[Bar]:
    """Return the bars of a standard MoE on both systems, and of its variants on DeepSpeed."""
    served = [(label, "pytorch", models["MoE"])]
    served += [(label if kind == "MoE" else kind, "deepspeed", model) for kind, model in models.items()]
    return [_bar(figure, name, program, gpus, assumed, model=model, tensor=tensor) for name, program, model in served]


def _measured(figure: str) -> list[Bar]:
    rows = paper.inference_results(figure=figure, metric="latency").where(variant="standard")
    bars: dict[tuple[str, str, int], Bar] = {}
    for row in rows:
        if row.system in ("pytorch", "deepspeed") and row.gpus and row.how.startswith("read off"):
            bars.setdefault((row.model, row.system, row.gpus), _bar(figure, row.model, row.system, row.gpus, row=row))
    return list(bars.values())


def _bar(
    figure: str,
    label: str,
    program: str,
    gpus: int,
    assumed: str = "",
    *,
    row: paper.InferenceResult | None = None,
    model: ModelConfig | None = None,
    tensor: int | None = None,
) -> Bar:
    model = model or ModelConfig.parse(label)
    tensor = tensor or TENSOR[label.split("+")[0]]
    return Bar(
        figure=figure,
        label=label,
        system=program,
        gpus=gpus,
        model=model,
        parallel=layout(model, gpus, tensor, program),
        paper_ms=row.value if row else None,
        low=row.value_low if row else None,
        high=row.value_high if row else None,
        fitted=figure == FITTED,
        assumed=assumed,
    )
