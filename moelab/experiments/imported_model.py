"""Show how a published MoE model routes text, and what serving it would cost (beyond the paper).

Shows, for a model in a directory (as published or after `moelab import`) or a run of ours: for each MoE layer, which
share of each domain's tokens goes to each expert; how uneven the experts' load is (percentiles, MaxVio, entropy; see
`moelab.training.balance`); how much the token and the domain tell of the choice, as in `specialisation`; and the
simulated cost of serving the model on a cluster, with an even load and with the measured one.

Without a model, one of OLMoE's form with random weights is made, which shows the page and finds nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moelab import paths
from moelab.config import DataConfig, DecoderConfig, ModelConfig, RoutingConfig, digest
from moelab.design.experiment import Experiment, Scale
from moelab.evaluation.routing import Layer
from moelab.lazy import pd
from moelab.runs.store import RunStore

if TYPE_CHECKING:
    from moelab.config.parallel import ParallelConfig
    from moelab.simulate import DecodeEstimate

CORPUS = {"smoke": "made", "cpu": "mix5", "gpu": "mix5"}
"""Scale -> the text, where none is given."""
_RANDOM = ModelConfig(
    layers=4, hidden=64, heads=4, experts=(16,) * 4, top_k=4, vocab=512, context=512, init_std=0.3,
    decoder=DecoderConfig.modern(qk_norm="all", ffn=32),
    routing=RoutingConfig(drop_tokens=False, normalize_weights=False, aux_choices="all"), name="random OLMoE",
)  # fmt: skip


def directory(model: str) -> Path:
    """Return the directory of a model: a path, a run's id, or if empty that of the random one, which is made once.

    Raises:
        ValueError: there is none, or it has no MoE layer; the message is one line.
    """
    from moelab.inference.text import model_config

    path = RunStore().find(model).resolve() if model else _random_model()
    if not model_config(path).is_moe:
        raise ValueError(f"imported-model: {path} is dense, it routes nothing")
    return path


def check(parameters: Mapping[str, Any]) -> None:
    """Refuse a model, text, cluster or program that does not exist, or a number out of range; ValueError, one line."""
    from moelab import simulate

    model, corpus = parameters.get("model", ""), parameters.get("corpus", "")
    try:
        simulate.cluster(parameters.get("cluster", "h100"))
        if (code := simulate.system(parameters.get("system", "moelab"))).only == "training":
            raise ValueError(f"system {code.name} is for training alone")
        data = DataConfig(corpus or CORPUS["cpu"], context=parameters.get("context", 512))
        if corpus:
            from moelab.data.corpus import open_corpus

            open_corpus(data, paths.home() / "data")
        if (dtype := parameters.get("dtype", "bf16")) not in ("bf16", "fp32"):
            raise ValueError(f"dtype must be bf16 or fp32, got {dtype!r}")
        for name, least in (("gpus", 1), ("cached", 1), ("max_tokens", 0)):
            if (value := parameters.get(name, least)) < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if model and "/" not in model and Path(model).is_dir():  # the notebook's kernel works in another folder
            raise ValueError(f"model {model}: a relative path needs a /, as in ./{model}")
        longest = _RANDOM.context
        if model:
            path = directory(model)
            from moelab.inference.text import model_config

            longest = model_config(path).context
        if 0 < (most := parameters.get("max_tokens", 0)) < (least := min(data.context, longest)):
            raise ValueError(f"max_tokens must be 0 (all) or at least {least}, the tokens of a sequence, got {most}")
    except ValueError as error:
        raise ValueError(f"imported-model: {str(error).removeprefix('imported-model: ')}") from None


def _random_model() -> Path:
    """Return the directory of a model with random weights, in the format in which OLMoE is published."""
    from filelock import FileLock

    from moelab.data import synthetic
    from moelab.data.tokenizer import Tokenizer
    from moelab.engine.checkpoint import hf
    from moelab.models import build

    place = paths.home() / "models" / f"random-olmoe-{digest(_RANDOM)}"
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_suffix(".lock")):
        if not place.exists():
            texts = [text for domain in synthetic.DOMAINS for _, text in islice(synthetic.documents(domain), 20)]
            hf.export(build(_RANDOM, 0), place, Tokenizer.train(texts, _RANDOM.vocab), "olmoe")
    return place


def tables(measured: Mapping[str, Any]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return what `moelab.evaluation.routing.measure` found as frames: layers, shares."""
    columns = ([f.name for f in fields(Layer)], ["layer", "domain", "choices", "expert", "share"])
    return tuple(pd.DataFrame(measured[name], columns=c) for name, c in zip(("layers", "shares"), columns, strict=True))


def headline(layers: pd.DataFrame) -> str:
    """Return how uneven the load is, in one line."""
    worst = layers.loc[layers["busiest"].idxmax()]
    return (
        f"the busiest of {int(worst['experts'])} experts takes {layers['busiest'].median():.1f} times an even share in "
        f"the median layer and {worst['busiest']:.1f} times in layer {int(worst['layer'])}"
    )


# -- serving -----------------------------------------------------------------------------------------------------------


def imbalance(loads: Mapping[str, Sequence[int]], layout: ParallelConfig) -> float:
    """Return the load of the busiest rank over an even share, the mean over layers, if ranks hold experts in order."""
    from moelab.training.balance import layer_statistics

    busiest = []
    for load in loads.values():
        ranks = layout.experts(len(load)).parallel
        busiest.append(1 + layer_statistics(load, ranks).get("busiest_rank", 0.0))
    return sum(busiest) / len(busiest)


def serving(
    config: ModelConfig,
    loads: Mapping[str, Sequence[int]],
    cluster: str,
    gpus: int,
    *,
    program: str = "moelab",
    context: int = 2048,
    dtype: str = "bf16",
) -> pd.DataFrame:
    """Search layouts of a model on a cluster, and simulate each with an even and with the measured load.

    Args:
        loads: of `moelab.evaluation.routing.measure`.
        gpus: at most so many.
        program, context, dtype: see `moelab.simulate.plan`.

    Returns:
        A row for each layout of the Pareto front, the fastest first: columns of `moelab.simulate.search.frame`;
        best_by, the objectives by which it is the best; imbalance; and latency_uneven_ms, uneven_per_s_per_gpu and
        uneven_per_million with the measured load.

    Raises:
        ValueError: nothing fits, or an unknown cluster or program; the message is one line.
    """
    from moelab import simulate
    from moelab.simulate.search import OBJECTIVES, frame

    where, options = simulate.cluster(cluster), {"program": program, "context": context, "dtype": dtype}
    objectives = [name for name in OBJECTIVES if name != "cost" or where.price_per_gpu_hour]
    plans = {name: simulate.plan(config, gpus, where, objective=name, **options) for name in objectives}
    even: list[DecodeEstimate] = []
    for estimate in (*plans["latency"].front, *(plan.best for plan in plans.values())):
        if estimate not in even:
            even.append(estimate)
    even.sort(key=lambda estimate: estimate.latency_ms)
    sliced = simulate.system(program).sliced  # every rank has a slice of all experts
    factors = [1.0 if sliced else imbalance(loads, e.parallel) for e in even]
    uneven = [
        simulate.decode(config, e.parallel, where, batch=e.batch, imbalance=factor, **options)
        for e, factor in zip(even, factors, strict=True)
    ]
    return frame(even).assign(
        best_by=[", ".join(name for name, plan in plans.items() if plan.best == e) for e in even],
        imbalance=factors,
        latency_uneven_ms=[e.latency_ms for e in uneven],
        uneven_per_s_per_gpu=[e.tokens_per_s_per_gpu for e in uneven],
        uneven_per_million=[e.cost_per_million for e in uneven],
        currency=where.currency,
    )


def serving_headline(rows: pd.DataFrame, name: str, cluster: str) -> str:
    """Return what serving costs in one line, from `serving`."""
    fast, cheap = rows.iloc[0], rows.loc[rows["tokens_per_s_per_gpu"].idxmax()]
    price = f"; {cheap['cost_per_million']:.3g} {cheap['currency']} per million" if cheap["cost_per_million"] else ""
    more = (rows["latency_uneven_ms"] / rows["latency_ms"]).max() - 1
    return (
        f"{cluster}: {fast['latency_ms']:.1f} ms a token at best, {cheap['tokens_per_s_per_gpu']:,.0f} "
        f"tokens/s/GPU at most{price}; the measured load adds at most {more:.1%} to a step of {name} (simulated)"
    )


EXPERIMENT = Experiment(
    name="imported-model",
    number=26,
    title="A published model: routing and cost",
    paper="beyond the paper",
    question="How does a published MoE model route text, and what does serving it cost on a cluster of my choice?",
    paper_answer="Not examined.",
    scales={
        "smoke": Scale("random weights of OLMoE's form; text made by a rule", "seconds (tests)"),
        "cpu": Scale("the model given; 20 k tokens of each domain of mix5", "a pass over the text"),
        "gpu": Scale("the model given, on one GPU", "not yet run; one GPU"),
    },
    check=check,
    measures_on_gpu=("gpu",),
)
