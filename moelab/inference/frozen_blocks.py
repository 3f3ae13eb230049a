"""Compute the blocks of a frozen model with few calls of PyTorch, each of which takes microseconds.

`freeze` replaces a model's blocks by those of this module, whose results are the same within rounding. With a cache and
one token of each sequence, attention writes the keys and values of all sequences in one copy each. A MoE layer whose
experts are all in this process and which drops no token does without the gate's table, slots and losses: NumPy chooses
and sorts the experts. In all other cases, the layers compute as they do in training, with frozen products.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelab import kernels
from moelab.inference import elementwise
from moelab.inference.elementwise import sigmoid
from moelab.inference.frozen import FrozenLinear, Matrix, Products, few_rows, fits, freeze_linear, product
from moelab.kernels import ACTIVATIONS, Activation, packed
from moelab.models import GPT
from moelab.models.attention import Attention, Past
from moelab.models.dispatch import LocalDispatch
from moelab.models.gpt import Block
from moelab.models.grouped_attention import GroupedAttention, Rotation
from moelab.models.loss import Further
from moelab.models.moe import MLP, Experts, Mix, MoE, SharedGate
from moelab.models.routing import Router, Routing

Module = TypeVar("Module", bound=nn.Module)


def freeze(model: GPT, products: Products) -> None:
    """Replace the modules that compute matrix products by frozen ones, in place; no parameter has a gradient then.

    Args:
        products: which matrix products are used; with all but the fastest fp32 ones, a token's results have the same
            bits whatever other tokens are computed with it.
    """
    model.requires_grad_(False)
    for i, block in enumerate(model.blocks):  # one by one, so that the parameters of one block at a time exist twice
        model.blocks[i] = FrozenBlock(block, products)
    head, norm = product(model.output_weight, products), freeze_norm(model.norm, products)
    if model.output is not None:
        model.output = nn.Module()  # frees the matrix; None would stand for the embedding's
    model.head = lambda x: head(norm(x), None)
    model.losses = functools.partial(_losses, model.head)


def is_frozen(model: GPT) -> bool:
    """Return whether `freeze` has replaced the model's modules."""
    return any(isinstance(block, FrozenBlock) for block in model.blocks)


def is_compiled(model: GPT) -> bool:
    """Return whether the model is frozen with the products of our compiled code."""
    return is_frozen(model) and model.blocks[0].products == "compiled"


def _losses(
    head: Callable[[Tensor], Tensor],
    x_BTM: Tensor,
    targets_BT: Tensor,
    reduction: str = "mean",
    further: Further | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the losses as `GPT.losses`, from all logits of a frozen head."""
    logits_NV = head(x_BTM.flatten(0, 1)).float()
    loss, more = F.cross_entropy(logits_NV, targets_BT.flatten(), reduction=reduction), logits_NV.new_zeros(())
    if further is not None:
        more, _ = further(logits_NV, 0, len(logits_NV))
        more = more / len(logits_NV) if reduction == "mean" else more
    return loss + more, more


def freeze_norm(norm: nn.LayerNorm | nn.RMSNorm, products: Products) -> Callable[[Tensor], Tensor]:
    """Return the function that computes a norm, without a module's overhead."""
    shape, weight, eps = norm.normalized_shape, norm.weight.detach(), norm.eps
    if isinstance(norm, nn.RMSNorm):
        if products == "compiled" and fits(weight):
            return lambda x: packed.rms_norm(x, weight, eps)
        return lambda x: torch.rms_norm(x, shape, weight, eps)
    bias = norm.bias.detach()
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps, False)


def _as(kind: type[Module], module: nn.Module) -> Module:
    """Return a module of a subclass of the module's class, with the same attributes."""
    frozen = kind.__new__(kind)
    frozen.__dict__.update(module.__dict__)
    return frozen


class FrozenBlock(nn.Module):
    """Compute one layer as `Block`; sums with the residual stream are part of the products."""

    def __init__(self, block: Block, products: Products) -> None:
        super().__init__()
        self.products = products
        self.attention_norm, self.ffn_norm = (
            freeze_norm(norm, products) for norm in (block.attention_norm, block.ffn_norm)
        )
        kind = FrozenAttention if isinstance(block.attention, Attention) else FrozenGroupedAttention
        self.attention = _as(kind, block.attention)
        self.attention.qkv = freeze_linear(block.attention.qkv, products)
        self.attention.out = freeze_linear(block.attention.out, products)
        make = FrozenMoE.of if isinstance(block.ffn, MoE) else FrozenMLP
        self.ffn = make(block.ffn, products)

    def forward(
        self, x_BTM: Tensor, past: Past | None = None, rotation: Rotation | None = None
    ) -> tuple[Tensor, Routing | None]:
        """Return (the layer's output [B, T, M], the routing); None for a dense layer and where no table is made."""
        x_BTM = self.attention.forward(self.attention_norm(x_BTM), past, rotation, x_BTM)
        found = self.ffn.forward(self.ffn_norm(x_BTM), x_BTM)
        return found if isinstance(found, tuple) else (found, None)


# -- attention ---------------------------------------------------------------------------------------------------------


class FrozenAttention(Attention):
    """Compute `Attention`, with few calls for one token of each sequence."""

    def forward(
        self, x_BTM: Tensor, past: Past | None = None, rotation: None = None, add: Tensor | None = None
    ) -> Tensor:
        """Return the attention's output [B, T, M], with `add` [B, T, M] added."""
        B, T, _ = x_BTM.shape
        if past is None or T != 1:
            y_BTM = super().forward(x_BTM, past)
            return y_BTM if add is None else y_BTM + add
        q, k, v = self.qkv.forward(x_BTM).view(B, 3, self.heads, 1, self.head_size).unbind(1)
        return self.out.forward(past.attend(q, k, v).reshape(B, 1, self.heads * self.head_size), add)


class FrozenGroupedAttention(GroupedAttention):
    """Compute `GroupedAttention`."""

    def forward(
        self, x_BTM: Tensor, past: Past | None = None, rotation: Rotation | None = None, add: Tensor | None = None
    ) -> Tensor:
        """Return the attention's output [B, T, M], with `add` [B, T, M] added."""
        y_BTM = super().forward(x_BTM, past, rotation)
        return y_BTM if add is None else y_BTM + add


# -- feed-forward ------------------------------------------------------------------------------------------------------


def check(activation: str) -> Activation:
    """Return the entry of an activation that frozen layers compute.

    Raises:
        ValueError: one line: they do not compute this one.
    """
    if activation not in elementwise.ACTIVATIONS:
        known = ", ".join(map(repr, elementwise.ACTIVATIONS))
        raise ValueError(
            f"inference: layers are frozen with activation {known}, got {activation!r}; mode 'baseline' freezes nothing"
        )
    return ACTIVATIONS[activation]


def fused(activation: Activation) -> tuple[str, str]:
    """Return what the first product is followed by inside it, and what is computed after it."""
    return ("none", activation.name) if activation.gated else (activation.name, "none")


class FrozenMLP(nn.Module):
    """Compute a dense feed-forward."""

    def __init__(self, mlp: MLP, products: Products) -> None:
        super().__init__()
        inside, after = fused(check(mlp.activation))
        plain = products == "fastest" and mlp.up.weight.dtype == torch.float32
        self.after = ACTIVATIONS[after].forward if plain else elementwise.ACTIVATIONS[after]
        self.up = freeze_linear(mlp.up, products, inside)
        self.down = freeze_linear(mlp.down, products)

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """Return the output [..., M] of x [..., M], with `add` [..., M] added."""
        return self.down.forward(self.after(self.up.forward(x)), add)


class Rows(NamedTuple):
    """Tell which expert computes which rows, sorted by expert."""

    experts: list[int]
    """The experts that have rows, ascending."""
    bounds: list[int]
    """Expert `experts[i]` has the rows `bounds[i]` to `bounds[i + 1]`."""
    token_R: Tensor | None
    """int64 [R]: the token of each row; None if there is one row."""
    row_N: Tensor | None
    """int64 [S * K]: the row of each entry s * K + k; None if there is one row."""


def sort(expert_SK: np.ndarray) -> Rows:
    """Return the rows of tokens that chose these experts; an expert's rows are in the order of their tokens."""
    expert_N = expert_SK.ravel()
    N = len(expert_N)
    if N == 1:
        return Rows(expert_N.tolist(), [0, 1], None, None)
    order = expert_N.argsort(kind="stable")
    sorted_N = expert_N[order]
    starts = np.flatnonzero(sorted_N[1:] != sorted_N[:-1]) + 1
    bounds = [0, *starts.tolist(), N]
    row_N = np.empty_like(order)
    row_N[order] = np.arange(N)
    token_R = order // expert_SK.shape[1]
    return Rows(sorted_N[bounds[:-1]].tolist(), bounds, torch.from_numpy(token_R), torch.from_numpy(row_N))


class FrozenMoE(MoE):
    """Compute `MoE`, with few calls where the experts are all in this process and no token is dropped."""

    @classmethod
    def of(cls, moe: MoE, products: Products) -> FrozenMoE:
        """Return the frozen form of a layer, which loses its parameters."""
        frozen = _as(cls, moe)
        frozen.router = FrozenRouter(moe.router, products)
        frozen.experts = freeze_experts(moe.experts, products)
        frozen.mlp = None if moe.mlp is None else FrozenMLP(moe.mlp, products)
        if moe.mix is not None:
            kind = FrozenMix if isinstance(moe.mix, Mix) else FrozenSharedGate
            frozen.mix = kind(moe.mix, products)
        return frozen

    def forward(self, x: Tensor, add: Tensor | None = None) -> tuple[Tensor, Routing | None]:
        """Return (y [..., M], with `add` [..., M] added; the routing, None where no table is made)."""
        x_SM = x.reshape(-1, x.shape[-1])
        chosen = None
        if isinstance(self.dispatcher, LocalDispatch) and not torch.is_autocast_enabled("cpu"):
            chosen = self.router.choose(x_SM)
        if chosen is None:
            y, routing = super().forward(x)
            return y if add is None else y + add, routing
        add_SM = None if add is None else add.reshape(x_SM.shape)
        if self.mlp is None:
            return self.routed(x_SM, *chosen, add_SM).view(x.shape), None
        y_SM = self.routed(x_SM, *chosen, None)
        if self.mix is None:
            y_SM = self.mlp.forward(x_SM, y_SM)
        else:
            y_SM = self.mix.forward(y_SM, self.mlp.forward(x_SM), x_SM)
        return (y_SM if add is None else y_SM + add_SM).view(x.shape), None

    def routed(self, x_SM: Tensor, expert_SK: np.ndarray, weight_SK: np.ndarray, add_SM: Tensor | None) -> Tensor:
        """Return each token's weighted sum of its experts' outputs, with `add_SM` added, [S, M]."""
        if isinstance(self.experts, CompiledExperts):
            return self.experts.of_tokens(x_SM, torch.from_numpy(expert_SK), torch.from_numpy(weight_SK), add_SM)
        rows = self.sort(expert_SK)
        rows_RM = x_SM if rows.token_R is None else x_SM.index_select(0, rows.token_R)
        rows_RM = self.experts.of_rows(rows_RM, rows.experts, rows.bounds)
        return self.combine(rows_RM, rows.row_N, torch.from_numpy(weight_SK), add_SM)

    sort = staticmethod(sort)

    @staticmethod
    def combine(rows_RM: Tensor, row_N: Tensor | None, weight_SK: Tensor, add_SM: Tensor | None) -> Tensor:
        """Return each token's weighted sum of its rows, summed in fp32, with `add_SM` added, [S, M]."""
        dtype = rows_RM.dtype
        if row_N is not None:
            rows_RM = rows_RM.index_select(0, row_N)
        rows_RM, K = rows_RM.to(weight_SK.dtype), weight_SK.shape[1]
        total_SM = add_SM if add_SM is None else add_SM.to(weight_SK.dtype)
        for k in range(K):
            rows_SM, weight_S1 = (rows_RM, weight_SK) if K == 1 else (rows_RM[k::K], weight_SK[:, k : k + 1])
            total_SM = rows_SM * weight_S1 if total_SM is None else torch.addcmul(total_SM, rows_SM, weight_S1)
        return total_SM.to(dtype)


class FrozenRouter(Router):
    """Route with a frozen matrix, by the rules of `Router.route`."""

    def __init__(self, router: Router, products: Products) -> None:
        super().__init__(0, router.experts, router.top_k, router.config)
        self.share(router)
        self.product = product(router.weight.float(), products)

    def forward(self, x_SM: Tensor, sequences: int = 1) -> Routing:
        """Route as `Router.forward`; runs outside autocast."""
        return self.route(self.logits(x_SM.float()), sequences)

    def logits(self, x_SM: Tensor) -> Tensor:
        """Return the logits [S, E], without noise."""
        return self.product(x_SM, None)

    def activate(self, logits_SE: Tensor) -> Tensor:
        """Return the scores as `Router.activate`, a token's bits independent of the other tokens."""
        if self.config.scores == "softmax":  # computed row by row
            return super().activate(logits_SE)
        if self.config.scores == "sigmoid":
            return torch.from_numpy(sigmoid(logits_SE.numpy()))
        return elementwise.of_elements(super().activate, logits_SE)

    def choose(self, x_SM: Tensor) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the chosen experts, int64 [S, K], and their weights, fp32 [S, K], as `route` does.

        None if the layer may drop tokens, if there are none, or if a token cannot be routed (see `kernels.gate`).
        """
        cfg = self.config
        if cfg.drop_tokens or not len(x_SM) or self.entropies is not None:
            return None
        logits_SE = self.product(x_SM.float(), None)
        needed = cfg.scores != "softmax" or self.balance_bias is not None
        scores_SE = self.activate(logits_SE).numpy() if needed else None
        logits_SE = logits_SE.numpy()
        choice_SE = None if self.balance_bias is None else scores_SE + self.balance_bias.float().numpy()
        normalize = self.top_k > 1 if cfg.normalize_weights is None else cfg.normalize_weights
        weights_SE = None if cfg.scores == "softmax" else scores_SE
        return kernels.choose(logits_SE, self.top_k, normalize, choice_SE, weights_SE)


class FrozenMix(nn.Module):
    """Compute the residual form's learned mix."""

    def __init__(self, mix: Mix, products: Products) -> None:
        super().__init__()
        self.linear = FrozenLinear(mix, products)

    def forward(self, routed_SM: Tensor, fixed_SM: Tensor, x_SM: Tensor) -> Tensor:
        """Return the weighted sum of the branches, as `Mix.forward`."""
        routed_S1, fixed_S1 = self.linear.forward(x_SM).float().softmax(1).split(1, 1)
        return torch.addcmul(routed_SM * routed_S1, fixed_SM.to(routed_S1.dtype), fixed_S1).to(routed_SM.dtype)


class FrozenSharedGate(nn.Module):
    """Compute the gated sum of routed and shared experts."""

    def __init__(self, gate: SharedGate, products: Products) -> None:
        super().__init__()
        self.linear = FrozenLinear(gate, products)

    def forward(self, routed_SM: Tensor, fixed_SM: Tensor, x_SM: Tensor) -> Tensor:
        """Return the sum of the branches, as `SharedGate.forward`."""
        gate_S1 = torch.from_numpy(sigmoid(self.linear.forward(x_SM).float().numpy()))
        return routed_SM + fixed_SM * gate_S1.to(fixed_SM.dtype)


def freeze_experts(experts: Experts, products: Products) -> FrozenExperts | CompiledExperts:
    """Return the frozen form of experts: packed, or as they are where MKL multiplies few rows in less time."""
    if products == "compiled" and fits(experts.down) and fits(experts.down.mT):
        return CompiledExperts(experts)
    plain = experts.up.dtype == torch.float32 and products == "fastest"
    if plain and few_rows(experts.up[0]) and few_rows(experts.down[0]):
        return FrozenExperts(experts, Matrix)
    return PackedExperts(experts, functools.partial(product, products=products))


def detached(experts: Experts) -> list[Tensor | None]:
    """Return `Experts.weights` without gradients."""
    return [weight if weight is None else weight.detach() for weight in experts.weights()]


class FrozenExperts(nn.Module):
    """Compute experts that are frozen one by one, in fp32: a call only reads the weights of experts that have rows.

    All rows share one activation, and the products write to its input and to the output.

    Args:
        prepare: makes of an expert's matrix [N, K] what `of_rows` uses of it: here a `Matrix`.
    """

    def __init__(self, experts: Experts, prepare: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.activation = check(experts.activation)
        up_EKN, up_bias, down_EKN, down_bias = detached(experts)
        self.up, self.down = ([prepare(matrix_KN.T) for matrix_KN in stack] for stack in (up_EKN, down_EKN))
        none = [None] * len(self.up)
        self.up_bias, self.down_bias = (none if bias is None else list(bias) for bias in (up_bias, down_bias))

    def forward(self, rows_RM: Tensor, offsets_E1: Tensor) -> Tensor:
        """Return the experts' outputs, as `Experts.forward`."""
        offsets_np = offsets_E1.numpy()
        experts = np.flatnonzero(offsets_np[1:] != offsets_np[:-1]).tolist()
        bounds = [*offsets_np[experts].tolist(), int(offsets_np[-1])]
        return self.of_rows(rows_RM, experts, bounds)

    def of_rows(self, rows_RM: Tensor, experts: list[int], bounds: list[int]) -> Tensor:
        """Return the outputs [R, M] of rows [R, M]: expert `experts[i]` has rows `bounds[i]` to `bounds[i + 1]`.

        Rows after the last expert's are empty and become zeros.
        """
        R, N, filled = len(rows_RM), len(self.up[0].weight_NK), bounds[-1] if experts else 0
        sizes = [b - a for a, b in itertools.pairwise(bounds)] if experts else []
        sizes.append(R - filled)
        h_RN, y_RM = rows_RM.new_empty(R, N), torch.empty_like(rows_RM)
        for e, x, h in zip(experts, rows_RM.split(sizes), h_RN.split(sizes), strict=False):
            self.up[e].multiply(x, self.up_bias[e], h)
        h_RN[filled:].zero_()
        h_RF = self.activation.forward(h_RN)
        for e, h, y in zip(experts, h_RF.split(sizes), y_RM.split(sizes), strict=False):
            self.down[e].multiply(h, self.down_bias[e], y)
        y_RM[filled:].zero_()
        return y_RM


class PackedExperts(FrozenExperts):
    """Compute experts that are packed one by one; `prepare` returns the function that multiplies by a matrix."""

    def of_rows(self, rows_RM: Tensor, experts: list[int], bounds: list[int]) -> Tensor:
        """Return the outputs, as `FrozenExperts.of_rows`."""
        R, outputs, (inside, after) = len(rows_RM), [], fused(self.activation)
        groups = [rows_RM] if bounds == [0, R] else (rows_RM[a:b] for a, b in itertools.pairwise(bounds))
        for e, rows in zip(experts, groups, strict=True) if experts else ():
            h = elementwise.ACTIVATIONS[after](self.up[e](rows, self.up_bias[e], inside))
            outputs.append(self.down[e](h, self.down_bias[e]))
        if bounds[-1] < R or not outputs:
            outputs.append(rows_RM.new_zeros(R - bounds[-1], rows_RM.shape[1]))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class CompiledExperts(nn.Module):
    """Compute experts by our compiled code, whose matrices of all experts are one tensor."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        gates = 2 if check(experts.activation).gated else 1
        up_EKN, self.up_bias, down_EKN, self.down_bias = detached(experts)
        self.up = packed.pack(up_EKN.mT.unflatten(1, (gates, -1)))
        self.down = packed.pack(down_EKN.mT)

    def of_tokens(self, x_SM: Tensor, expert_SK: Tensor, weight_SK: Tensor, add_SM: Tensor | None) -> Tensor:
        """Return each token's weighted sum of its experts' outputs, with `add_SM` added, [S, M]."""
        return packed.experts(x_SM, expert_SK, weight_SK, self.up, self.up_bias, self.down, self.down_bias, add_SM)

    def forward(self, rows_RM: Tensor, offsets_E1: Tensor) -> Tensor:
        """Return the outputs [R, M] of rows [R, M] sorted by expert; rows after the last expert's become zeros."""
        sizes_E = offsets_E1.diff().long()
        expert_R = torch.repeat_interleave(torch.arange(len(sizes_E)), sizes_E)
        y_RM = torch.zeros_like(rows_RM)
        if n := len(expert_R):
            y_RM[:n] = self.of_tokens(rows_RM[:n], expert_R[:, None], torch.ones(n, 1, dtype=torch.float32), None)
        return y_RM
