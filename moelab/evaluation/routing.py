"""Measure how a model routes text: how even each layer's load is, by domain, and what tells the choice of an expert.

found = measure(str(directory), stamp(directory), DataConfig("mix5", context=512), max_tokens=20_000)
found["layers"], found["shares"], found["loads"]
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moelab import paths
from moelab.config import DataConfig
from moelab.lazy import np

if TYPE_CHECKING:
    from torch import Tensor

    from moelab.data.tokenizer import Tokenizer
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
        by_token, by_domain: how much these tell of the choice, see `explained_entropy`.
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

    from moelab.inference.text import open_model

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("routing: no CUDA device is available here; take scale cpu")
    cache = paths.home() / "data"
    return routing(*open_model(Path(model), cache=cache, dtype=dtype, device=device), data, cache, max_tokens)


@dataclass(frozen=True)
class ExpertUse:
    """Hold how one MoE layer routed a text, counting all K choices of a token.

    Attributes:
        layer: its number, from 1.
        domains: names of the domains, in the text's order.
        by_domain_DE: tokens of each domain whose choices include the expert, int64.
        by_token_VE: the same by token id, for the V ids that the text has.
    """

    layer: int
    domains: tuple[str, ...]
    by_domain_DE: np.ndarray
    by_token_VE: np.ndarray

    def shares(self) -> list[dict[str, Any]]:
        """Return the share of each domain's choices that each expert takes: layer, domain, choices, expert, share."""
        return [
            {"layer": self.layer, "domain": domain, "choices": sum(row), "expert": expert, "share": taken / sum(row)}
            for domain, row in zip(self.domains, self.by_domain_DE.tolist(), strict=True)
            for expert, taken in enumerate(row)
        ]


def expert_use(model: GPT, batches: Iterable[tuple[str, Tensor]]) -> list[ExpertUse]:
    """Route text, and return how each MoE layer routed it.

    Args:
        model: in evaluation mode.
        batches: (domain, tokens [B, T]).
    """
    import torch

    device = model.token_embedding.weight.device
    texts: list[tuple[str, np.ndarray]] = []
    chosen: list[list[np.ndarray]] = []
    with torch.no_grad():
        for domain, tokens_BT in batches:
            _, routing = model.hidden_states(tokens_BT.to(device))
            texts.append((domain, tokens_BT.flatten().numpy()))
            chosen.append([layer.expert_SK.cpu().numpy() for layer in routing])
    domains = tuple(dict.fromkeys(domain for domain, _ in texts))
    domain_S = np.repeat([domains.index(domain) for domain, _ in texts], [len(ids) for _, ids in texts])
    _, token_S = np.unique(np.concatenate([ids for _, ids in texts]), return_inverse=True)
    uses = []
    for i, (number, E) in enumerate((at, experts) for at, experts in enumerate(model.config.experts, 1) if experts):
        expert_SK = np.concatenate([layers[i] for layers in chosen])
        uses.append(ExpertUse(number, domains, _counts(domain_S, expert_SK, E), _counts(token_S, expert_SK, E)))
    return uses


def routing(model: GPT, tokenizer: Tokenizer, data: DataConfig, cache: Path, max_tokens: int = 0) -> dict[str, Any]:
    """Route the validation text of a corpus, and count.

    Args:
        cache: folder of downloaded text.

    Returns:
        "layers", the fields of a `Layer` for each MoE layer; "loads", for each the tokens that chose each expert;
        "shares", the share of a domain's choices that each expert of a layer takes (see `ExpertUse.shares`);
        "tokens", by domain.
    """
    import torch

    from moelab.data.preparation import encode_validation
    from moelab.models.moe import MoE

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
    layers, loads, shares = [], {}, []
    for router, use in zip(routers, expert_use(model, batches), strict=True):
        entropy = np.average([float(x) for x in router.entropies or ()], weights=[part.numel() for _, part in batches])
        router.entropies = None
        layers.append(asdict(_layer(use, float(entropy))))
        loads[str(use.layer)] = use.by_domain_DE.sum(0).tolist()
        shares += use.shares()
    tokens = {domain: int(windows_NT.size) for domain, windows_NT in texts.items()}
    return {"layers": layers, "loads": loads, "shares": shares, "tokens": tokens}


def stamp(directory: Path) -> str:
    """Return a digest of the names, sizes and times of the files of a directory's model."""
    files = [file for pattern in ("*.json", "*.safetensors", "checkpoints/**/*") for file in directory.glob(pattern)]
    rows = [(file.relative_to(directory), file.stat()) for file in sorted(files) if file.is_file()]
    text = "\n".join(f"{file} {at.st_size} {at.st_mtime_ns}" for file, at in rows)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def explained_entropy(counts_XE: np.ndarray) -> float:
    """Return the share of the experts' entropy that another variable explains, from joint counts [values, experts].

    The share, from 0 to 1, is mutual information over entropy, both less what the same counts tell after shuffling,
    because a small sample tells something by chance.
    """
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
    pairs = value_S.repeat(expert_SK.shape[1]) * experts + expert_SK.ravel()
    values = int(value_S.max()) + 1
    return np.bincount(pairs, minlength=values * experts).reshape(values, experts)


def _layer(use: ExpertUse, router_entropy: float) -> Layer:
    from moelab.training.balance import layer_statistics, max_violation

    load_E = use.by_domain_DE.sum(0)
    p50, p90, p99, busiest = np.percentile(load_E / load_E.mean(), (50, 90, 99, 100), method="nearest").tolist()
    even = layer_statistics(load_E)
    return Layer(
        layer=use.layer,
        experts=len(load_E),
        p50=p50,
        p90=p90,
        p99=p99,
        busiest=busiest,
        max_violation=busiest - 1,
        domain_violation=float(np.mean([max_violation({"": load}) for load in use.by_domain_DE.tolist()])),
        dead_experts=even["dead_experts"],
        load_entropy=even["load_entropy"],
        router_entropy=router_entropy,
        by_token=explained_entropy(use.by_token_VE),
        by_domain=explained_entropy(use.by_domain_DE),
    )
