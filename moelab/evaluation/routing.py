"""Measure how a model routes text: how even each layer's load is, by domain, and what tells the choice of an expert.

found = measure(str(directory), stamp(directory), DataConfig("mix5", context=512), max_tokens=20_000)
found["layers"], found["shares"], found["loads"]
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moelab.config import DataConfig

if TYPE_CHECKING:
    import numpy as np

    from moelab.data import Tokenizer
    from moelab.models import GPT

BATCH = 4096
"""Tokens that are routed at a time."""


@dataclass(frozen=True)
class Layer:
    """Hold how one MoE layer routed the text, counting all K choices of a token.

    Attributes:
        layer: its number, from 1.
        experts: E.
        p50, p90, p99, busiest: percentiles of the experts' loads, and the largest load, over the mean load.
        max_violation: MaxVio, `busiest` less one.
        domain_violation: the same within the text of one domain, the mean over domains.
        dead_experts, load_entropy, router_entropy: see `moelab.training.balance`.
        by_token, by_domain: how much these tell of the choice, see `told`.
    """

    layer: int
    experts: int
    p50: float
    p90: float
    p99: float
    busiest: float
    max_violation: float
    domain_violation: float
    dead_experts: float
    load_entropy: float
    router_entropy: float
    by_token: float
    by_domain: float


def measure(
    model: str, stamp: str, data: DataConfig, max_tokens: int, dtype: str = "bf16", device: str = "cpu"
) -> dict[str, Any]:
    """Route the validation text of a corpus with the model in a directory, as published or exported, or of a run.

    Args:
        model, stamp: the directory, and its `stamp`, by which a measurement is stored.
        data: corpus and context (at most the model's); the tokens are those of the model's own tokenizer.
        max_tokens: at most so many of each domain; 0 is all.
        dtype: of the weights, "fp32" or "bf16".

    Returns:
        As `routing`.

    Raises:
        ValueError: there is no such model, text or device; the message is one line.
    """
    import torch

    from moelab import paths
    from moelab.inference.text import open_model

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("routing: no CUDA device is available here; take scale cpu")
    cache = paths.home() / "data"
    return routing(*open_model(Path(model), cache=cache, dtype=dtype, device=device), data, cache, max_tokens)


def routing(model: GPT, tokenizer: Tokenizer, data: DataConfig, cache: Path, max_tokens: int = 0) -> dict[str, Any]:
    """Route the validation text of a corpus, and count.

    Args:
        cache: folder of downloaded text.

    Returns:
        "layers", the fields of a `Layer` for each MoE layer; "loads", for each the tokens that chose each expert;
        "shares", the share of a domain's choices that each expert of a layer takes (keys layer, domain, expert, share);
        "tokens", by domain.
    """
    import numpy as np
    import torch

    from moelab.data import encode_validation
    from moelab.models.moe import MoE
    from moelab.training.expert_use import routed

    config = model.eval().config
    routers = [block.ffn.router for block in model.blocks if isinstance(block.ffn, MoE)]
    T = min(data.context, config.context)
    texts = encode_validation(replace(data, context=T), cache, tokenizer, max_tokens)
    batches = [
        (domain, part)
        for domain, windows_NT in texts.items()
        for part in torch.from_numpy(windows_NT).split(max(1, BATCH // T))
    ]
    for router in routers:
        router.entropies = []
    found = list(routed(model, batches))
    sizes, domains = [len(ids) for _, ids, _ in found], tuple(texts)
    domain_S = np.repeat([domains.index(domain) for domain, _, _ in found], sizes)
    _, token_S = np.unique(np.concatenate([ids for _, ids, _ in found]), return_inverse=True)
    layers, loads, shares = [], {}, []
    for i, (number, E) in enumerate((at, experts) for at, experts in enumerate(config.experts, 1) if experts):
        expert_SK = np.concatenate([choices[i] for _, _, choices in found])
        by_domain_DE, by_token_VE = _counts(domain_S, expert_SK, E), _counts(token_S, expert_SK, E)
        entropy = np.average([float(x) for x in routers[i].entropies], weights=sizes)
        routers[i].entropies = None
        layers.append(asdict(_layer(number, by_domain_DE, by_token_VE, float(entropy))))
        loads[str(number)] = by_domain_DE.sum(0).tolist()
        share_DE = by_domain_DE / by_domain_DE.sum(1, keepdims=True)
        shares += [
            {"layer": number, "domain": domain, "expert": expert, "share": share}
            for domain, row in zip(domains, share_DE.tolist(), strict=True)
            for expert, share in enumerate(row)
        ]
    tokens = {domain: int(windows_NT.size) for domain, windows_NT in texts.items()}
    return {"layers": layers, "loads": loads, "shares": shares, "tokens": tokens}


def stamp(directory: Path) -> str:
    """Return a digest of the names, sizes and times of the files of a directory's model."""
    files = [file for pattern in ("*.json", "*.safetensors", "checkpoints/**/*") for file in directory.glob(pattern)]
    rows = [(file.relative_to(directory), file.stat()) for file in sorted(files) if file.is_file()]
    text = "\n".join(f"{file} {at.st_size} {at.st_mtime_ns}" for file, at in rows)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def told(counts_XE: np.ndarray) -> float:
    """Return the share of the expert's entropy that another variable tells, from their joint counts [values, experts].

    The share, from 0 to 1, is mutual information over entropy, both less what the same counts tell after shuffling,
    because a small sample tells something by chance.
    """
    import numpy as np

    x_N, e_N = (np.repeat(part, counts_XE.flatten()) for part in map(np.ravel, np.indices(counts_XE.shape)))
    shuffled_XE = np.zeros_like(counts_XE)
    np.add.at(shuffled_XE, (x_N, np.random.default_rng(0).permutation(e_N)), 1)

    def entropy(counts: np.ndarray) -> float:
        p = counts[counts > 0] / counts.sum()
        return float(-(p * np.log(p)).sum())

    sides = entropy(counts_XE.sum(1)) + entropy(counts_XE.sum(0))
    chance = sides - entropy(shuffled_XE)
    most = entropy(counts_XE.sum(0)) - chance
    return float(np.clip((sides - entropy(counts_XE) - chance) / most, 0, 1)) if most > 1e-9 else 0.0


def _counts(value_S: np.ndarray, expert_SK: np.ndarray, experts: int) -> np.ndarray:
    """Return how often each value of a variable and each expert come together, int64 [values, E]."""
    import numpy as np

    pairs = value_S.repeat(expert_SK.shape[1]) * experts + expert_SK.ravel()
    values = int(value_S.max()) + 1
    return np.bincount(pairs, minlength=values * experts).reshape(values, experts)


def _layer(number: int, by_domain_DE: np.ndarray, by_token_VE: np.ndarray, router_entropy: float) -> Layer:
    import numpy as np

    from moelab.training.balance import layer_statistics, max_violation

    load_E = by_domain_DE.sum(0)
    p50, p90, p99, busiest = np.percentile(load_E / load_E.mean(), (50, 90, 99, 100), method="nearest").tolist()
    even = layer_statistics(load_E)
    return Layer(
        layer=number,
        experts=len(load_E),
        p50=p50,
        p90=p90,
        p99=p99,
        busiest=busiest,
        max_violation=busiest - 1,
        domain_violation=float(np.mean([max_violation({"": load}) for load in by_domain_DE.tolist()])),
        dead_experts=even["dead_experts"],
        load_entropy=even["load_entropy"],
        router_entropy=router_entropy,
        by_token=told(by_token_VE),
        by_domain=told(by_domain_DE),
    )
