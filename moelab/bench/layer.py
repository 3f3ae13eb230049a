"""`moelab bench layer`: one MoE layer, forward and backward, against the dense layer of equal active FLOPs.

Top-1; S tokens through experts M -> F -> M with GELU, gradients to input, gate and weights. Ours at capacity factor 1.0 (random token
selection; as the paper trains) and drop-free; the baseline with masks and einsum; where installed, DeepSpeed's MoE layer and
transformers' expert functions (gated, so F is cut to two thirds for equal FLOPs). Weight gradients are kept, and overwritten, from step to step.
Floor: the FLOPs at the measured rate of a large product, plus expert weights read twice and their gradient written once at the copy rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelab.bench import harness as common
from moelab.kernels import combine, dispatch, expert_ffn, gate, row_table
from moelab.models import baseline

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Layer(nn.Module):
    """A gate and E experts; `form` is what happens between them."""

    def __init__(self, M: int, F_: int, E: int, form: Callable[[Layer, Tensor], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.form, self.experts = form, E
        self.wg = nn.Parameter(torch.randn(E, M) * 0.1)
        self.w1, self.b1 = nn.Parameter(torch.randn(E, M, F_) * M**-0.5), nn.Parameter(torch.zeros(E, F_))
        self.w2, self.b2 = nn.Parameter(torch.randn(E, F_, M) * F_**-0.5), nn.Parameter(torch.zeros(E, M))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.form(self, x)


def _ours(capacity_factor: float | None) -> Callable[[Layer, Tensor], tuple[Tensor, Tensor]]:
    def form(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(x.float(), layer.wg.float())
        capacity = max(4, math.ceil(len(x) / layer.experts * capacity_factor)) if capacity_factor else None
        g = gate(logits, 1, capacity, seed=1)
        table = row_table(g)
        rows = expert_ffn(dispatch(x, table), table.offsets_E1, layer.w1, layer.b1, layer.w2, layer.b2)
        return combine(rows, table, g.weight_SK), g.aux_loss

    return form


def _einsum(layer: Layer, x: Tensor, capacity: int = 0) -> tuple[Tensor, Tensor]:
    logits = F.linear(x.float(), layer.wg.float())
    capacity = capacity or max(4, math.ceil(len(x) / layer.experts))
    g = baseline.mask_gate(logits, 1, capacity, seed=1)
    dispatch_SEC, combine_SEC = baseline.one_hot_masks(g, capacity, x.dtype)
    rows_ECM = baseline.einsum_dispatch(x, dispatch_SEC)
    hidden_ECF = F.gelu(torch.baddbmm(layer.b1[:, None], rows_ECM, layer.w1), approximate="tanh")
    rows_ECM = torch.baddbmm(layer.b2[:, None], hidden_ECF, layer.w2)
    return baseline.einsum_combine(rows_ECM, combine_SEC), g.aux_loss


def _loop(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    """What one writes in ten minutes: sort the tokens, loop over the experts, drop-free."""
    probs = F.softmax(F.linear(x.float(), layer.wg.float()), -1)
    weight, expert = probs.max(-1)
    order = expert.argsort(stable=True)
    counts = torch.bincount(expert, minlength=layer.experts)
    outputs = []
    weights = zip(layer.w1.unbind(), layer.b1.unbind(), layer.w2.unbind(), layer.b2.unbind(), strict=True)
    for rows, (w1, b1, w2, b2) in zip(x[order].split(counts.tolist()), weights, strict=True):
        outputs.append(torch.addmm(b2, F.gelu(torch.addmm(b1, rows, w1), approximate="tanh"), w2))
    y = torch.empty_like(x).index_copy(0, order, torch.cat(outputs)) * weight[:, None].to(x.dtype)
    return y, layer.experts * (probs.mean(0) * counts / len(x)).sum()


class Dense(nn.Module):
    """The layer that does the same FLOPs without choosing."""

    def __init__(self, M: int, F_: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(M, F_), nn.Linear(F_, M)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.down(F.gelu(self.up(x), approximate="tanh")), x.new_zeros(())


def _deepspeed(M: int, F_: int, E: int) -> nn.Module | None:
    """DeepSpeed's MoE layer, one process, capacity factor 1.0, random token selection."""
    try:
        import deepspeed
        from deepspeed.moe.layer import MoE
    except ImportError:
        return None
    import os

    if not torch.distributed.is_initialized():
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "29517")
        deepspeed.init_distributed("gloo" if not torch.cuda.is_available() else "nccl", verbose=False)
    expert = nn.Sequential(nn.Linear(M, F_), nn.GELU(approximate="tanh"), nn.Linear(F_, M))
    moe = MoE(M, expert, num_experts=E, ep_size=1, k=1, capacity_factor=1.0, min_capacity=4, use_rts=True)
    moe.set_deepspeed_parallelism()

    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe = moe

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y, aux_loss, _ = self.moe(x)
            return y, aux_loss

    return Adapter()


def _transformers(M: int, F_: int, E: int, implementation: str) -> nn.Module | None:
    """The experts of transformers' Mixtral with one of its implementations, behind the same gate; drop-free."""
    try:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    except ImportError:
        return None
    config = MixtralConfig(
        hidden_size=M, intermediate_size=F_ * 2 // 3 // 16 * 16, num_local_experts=E, num_experts_per_tok=1
    )
    config._experts_implementation = implementation

    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = MixtralExperts(config)
            self.wg = nn.Parameter(torch.randn(E, M) * 0.1)
            for p in self.experts.parameters():
                nn.init.normal_(p, 0.0, M**-0.5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            probs = F.softmax(F.linear(x.float(), self.wg.float()), -1)
            weight, expert = probs.topk(1, -1)
            return self.experts(x, expert, weight.to(x.dtype)), probs.mean()

    return Adapter()


def measure(
    tokens: int,
    M: int,
    F_: int,
    experts: int,
    dtype: str,
    rounds: int,
    device: str,
    *,
    backward: bool = True,
    only: Sequence[str] = (),
) -> list[dict]:
    """Rows of one case; see `common.rows`.

    Args:
        backward: False times the forward pass alone, without gradients, as at inference; the floor is then the products once and the weights read
            once (those of as many experts as there are tokens, at most).
        only: some of the candidates beside "dense"; empty is all.
    """
    torch.manual_seed(0)
    make: dict[str, Callable[[], nn.Module | None]] = {
        "dense": lambda: Dense(M, F_),
        "ours, capacity 1.0": lambda: Layer(M, F_, experts, _ours(1.0)),
        "ours, drop-free": lambda: Layer(M, F_, experts, _ours(None)),
        "sort and loop, drop-free": lambda: Layer(M, F_, experts, _loop),
        "einsum (baseline)": lambda: Layer(M, F_, experts, _einsum),
        "deepspeed, capacity 1.0": lambda: _deepspeed(M, F_, experts),
        "transformers grouped_mm": lambda: _transformers(M, F_, experts, "grouped_mm"),
    }
    if unknown := [name for name in only if name not in make]:
        raise ValueError(f"bench layer: unknown candidate {unknown[0]!r}; allowed: {', '.join(make)}")
    modules = {name: build() for name, build in make.items() if not only or name in ("dense", *only)}
    x = torch.randn(tokens, M, device=device).to(DTYPES[dtype])

    def candidate(module: nn.Module) -> common.Candidate:
        module.to(device, DTYPES[dtype])
        if not backward:
            return torch.no_grad()(lambda: module(x))
        leaf = x.clone().requires_grad_()
        parameters = list(module.parameters())
        dy = torch.randn_like(x)

        def step() -> None:
            for p in parameters:
                p.grad = None
            leaf.grad = None
            y, aux_loss = module(leaf)
            torch.autograd.backward(
                [y, aux_loss] if aux_loss.requires_grad else [y],
                [dy, torch.ones_like(aux_loss)] if aux_loss.requires_grad else [dy],
            )

        return step

    times = common.in_turns({name: candidate(m) for name, m in modules.items() if m is not None}, rounds, device)
    passes, read = (3, experts) if backward else (1, min(experts, tokens))
    flops = passes * 2 * tokens * 2 * M * F_
    weight_bytes = passes * read * 2 * M * F_ * DTYPES[dtype].itemsize
    floor = flops / common.gemm_rate(DTYPES[dtype], device) + weight_bytes / common.copy_rate(device)
    case = {
        "tokens": tokens,
        "hidden": M,
        "ffn": F_,
        "experts": experts,
        "dtype": dtype,
        "device": common.device_name(device),
    }
    return common.rows(case, times, "dense", floor)


def main(
    *,
    tokens: int,
    hidden: int,
    ffn: int,
    experts: list[int],
    dtypes: list[str],
    rounds: int,
    threads: int,
    device: str,
    out: Path | None,
) -> None:
    """Measure, print and, with `out` (a folder), write `layer.jsonl`."""
    torch.set_num_threads(threads)
    found = []
    for dtype in dtypes:
        for E in experts:
            case = measure(tokens, hidden, ffn, E, dtype, rounds, device)
            common.show(
                f"layer, forward + backward: S={tokens} M={hidden} F={ffn} E={E} {dtype}, {case[0]['device']}", case
            )
            found += case
    if out is not None:
        common.write(found, out / "layer.jsonl")
        draw(found, out)


def draw(found: list[dict], out: Path) -> None:
    """The figure of `layer.jsonl`."""
    title = (
        f"Our drop-free layer takes {common.span(found, 'ours, drop-free')} times as long as the dense layer of equal FLOPs, "
        f"the einsum baseline {common.span(found, 'einsum (baseline)')} times"
    )
    common.draw(found, out / "layer", title=title, panel="dtype")
