"""Frozen modules: a model's matrices made ready for products of few rows on a CPU, as a decoding step has them.

A large matrix is packed for oneDNN (its own memory layout), which at few rows is faster than the plain product; GELU is
computed on the way. A call of oneDNN takes about 9 us longer than one of the plain product, so a small matrix stays as
it is (`PACK_FROM`).

A row's result has the same bits whatever rows are beside it. oneDNN's products have this property at any number of
rows, plain ones (MKL) from `LEAST_ROWS` on; fewer rows get copies of themselves beside them. Neither library promises
it: tests check it on the machine they run on. For one sequence in a model up to 128 wide the property costs 2 to 7 % of
a step's time against the plain model, which does not have it; for wider models or more sequences the frozen model is as
fast as the plain one or faster (17 % at 512 wide).

An expert is frozen alone, so a step reads the weights of the experts that have tokens and no others. Packed copies
replace the parameters, which are freed one by one on the way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelab import kernels
from moelab.engine.differentiable import reduce_from_group
from moelab.engine.parallel import SlicedExperts
from moelab.engine.tensor_slicing import RowLinear
from moelab.models import GPT
from moelab.models.moe import MLP, Experts, Mix, MoE
from moelab.models.routing import Router, Routing

PACK_FROM = 1 << 17
"""Numbers in the smallest fp32 matrix that is packed. Measured (AMD Zen 4, one thread, 1 and 8 rows, shapes from 32 x
32 to 1024 x 256): the plain product of 2**16 numbers takes 6 and 19 us, the packed one 15 and 22; of 2**18 numbers 25
and 80 us against 32 and 60. bf16 matrices are always packed."""
LEAST_ROWS = 4


def can_freeze(dtype: torch.dtype) -> bool:
    """Whether oneDNN packs matrices of this type on this CPU: fp32 on all, bf16 not without AVX-512 (or its like)."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def freeze(model: GPT) -> None:
    """Replace the modules that multiply by matrices, in place."""
    for block in model.blocks:
        block.attention.qkv = freeze_linear(block.attention.qkv)
        block.attention.out = freeze_linear(block.attention.out)
        block.ffn = freeze_moe(block.ffn) if isinstance(block.ffn, MoE) else FrozenMLP(block.ffn)
    head, norm = product(model.token_embedding.weight), model.norm
    model.head = lambda x: head(norm(x), None)


def freeze_moe(moe: MoE) -> MoE:
    """Replace the parts of a MoE layer; its dispatch stays."""
    moe.router, moe.experts = FrozenRouter(moe.router), FrozenExperts(moe.experts)
    moe.mlp = None if moe.mlp is None else FrozenMLP(moe.mlp)
    moe.mix = None if moe.mix is None else FrozenMix(moe.mix)
    return moe


# -- products ------------------------------------------------------------------------------------------------------------

Product = Callable[..., Tensor]
"""(x [..., K], bias [N] or None, gelu=False) -> x @ weight.T + bias [..., N], GELU (tanh) behind it if asked."""


def product(weight_NK: Tensor) -> Product:
    """The product with this matrix, packed if that is faster."""
    weight_NK = weight_NK.detach()
    if weight_NK.dtype == torch.float32 and weight_NK.numel() < PACK_FROM:
        return functools.partial(_plain, weight_NK)
    return functools.partial(_packed, torch.ops.mkldnn._reorder_linear_weight(weight_NK.contiguous()))


def _packed(weight: Tensor, x: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    activation = ("gelu", [], "tanh") if gelu else ("none", [], "")
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, *activation)


def _plain(weight_NK: Tensor, x: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    if x.numel() >= LEAST_ROWS * x.shape[-1]:
        y = F.linear(x, weight_NK, bias)
    else:
        y = F.linear(torch.cat([x] * LEAST_ROWS), weight_NK, bias)[: len(x)]
    return F.gelu(y, approximate="tanh") if gelu else y


# -- modules -------------------------------------------------------------------------------------------------------------


def freeze_linear(linear: nn.Linear, gelu: bool = False) -> nn.Module:
    """The frozen form of a linear layer, whole or sliced."""
    return FrozenRowLinear(linear) if isinstance(linear, RowLinear) else FrozenLinear(linear, gelu)


class FrozenLinear(nn.Module):
    """A linear layer (or one rank's column slice of it), GELU behind it if asked."""

    def __init__(self, linear: nn.Linear, gelu: bool = False) -> None:
        super().__init__()
        self.product, self.gelu = product(linear.weight), gelu
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias, self.gelu)


class FrozenRowLinear(nn.Module):
    """A row slice: partial sums are added up over the tensor group, the bias once."""

    def __init__(self, linear: RowLinear) -> None:
        super().__init__()
        self.product, self.bias, self.group = product(linear.weight), linear.bias.detach(), linear.group

    def forward(self, x: Tensor) -> Tensor:
        return reduce_from_group(self.product(x, None), self.group) + self.bias


class FrozenMLP(nn.Module):
    """A dense feed-forward."""

    def __init__(self, mlp: MLP) -> None:
        super().__init__()
        self.up, self.down = freeze_linear(mlp.up, gelu=True), freeze_linear(mlp.down)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


class FrozenRouter(Router):
    """A router whose matrix is frozen; its rules are `Router.route`'s."""

    def __init__(self, router: Router) -> None:
        super().__init__(0, router.experts, router.top_k, router.config)
        self.weight, self.product = router.weight, product(router.weight.float())

    def forward(self, x_SM: Tensor) -> Routing:
        """As `Router.forward`, outside autocast."""
        return self.route(self.scores(x_SM.float()))

    def scores(self, x_SM: Tensor) -> Tensor:
        """As `Router.scores`, without noise."""
        return self.product(x_SM, None)


class FrozenMix(nn.Module):
    """The residual form's learned mix."""

    def __init__(self, mix: Mix) -> None:
        super().__init__()
        self.linear = FrozenLinear(mix)

    def forward(self, routed_SM: Tensor, fixed_SM: Tensor, x_SM: Tensor) -> Tensor:
        """As `Mix.forward`."""
        return kernels.residual_mix(routed_SM, fixed_SM, coefficient_S2=self.linear(x_SM).float().softmax(1))


class FrozenExperts(nn.Module):
    """Experts, frozen one by one: a call reads the weights of those that have rows."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        bias = experts.down_bias.detach()
        if isinstance(experts, SlicedExperts) and not experts.adds_bias:
            bias = bias * 0
        self.up, self.down = ([product(w.T) for w in stack.detach()] for stack in (experts.up, experts.down))
        self.up_bias, self.down_bias = list(experts.up_bias.detach()), list(bias)

    def forward(self, rows_RM: Tensor, offsets_E1: Tensor) -> Tensor:
        """As `Experts.forward`."""
        bounds = offsets_E1.tolist()
        outputs = []
        for e in np.flatnonzero(np.diff(offsets_E1.numpy())).tolist():
            rows = self.up[e](rows_RM[bounds[e] : bounds[e + 1]], self.up_bias[e], True)
            outputs.append(self.down[e](rows, self.down_bias[e]))
        if bounds[-1] < len(rows_RM) or not outputs:
            outputs.append(rows_RM.new_zeros(len(rows_RM) - bounds[-1], rows_RM.shape[1]))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
