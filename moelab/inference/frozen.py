"""Freeze a model for inference on a CPU: prepare its matrices for the products of few rows of a decoding step.

A large matrix is packed into oneDNN's memory layout, which is faster at few rows than the plain product; GELU is fused
into the product. A call of oneDNN takes about 9 us longer than a plain product, so that small matrices are not packed
(`PACK_FROM`).

A row's result is bitwise independent of the other rows. oneDNN's products have this property for any number of rows,
plain ones (MKL) for at least `LEAST_ROWS`; fewer rows are repeated to reach that number. Neither library guarantees it:
tests check it on the machine that runs them. With one sequence and a hidden size up to 128, a step takes 2 to 7 %
longer than with the plain model, which does not have the property; with larger hidden sizes or more sequences the
frozen model is as fast as the plain one or faster (by 17 % at hidden size 512).

Each expert is frozen on its own, so that a step only reads the weights of experts that have tokens. Packed copies
replace the parameters, which are freed one by one.
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
from moelab.models.activations import swiglu
from moelab.models.moe import MLP, Experts, Mix, MoE, SharedGate
from moelab.models.routing import Router, Routing

PACK_FROM = 1 << 17
"""Elements of the smallest fp32 matrix that is packed; bf16 matrices are always packed.

Measured on AMD Zen 4 with one thread, for 1 and 8 rows: with 2**16 elements, the plain product takes 6 and 19 us, the
packed one 15 and 22 us; with 2**18 elements, 25 and 80 us against 32 and 60 us.
"""
LEAST_ROWS = 4
"""Rows from which a row's result of a plain product is independent of the other rows."""


def can_freeze(dtype: torch.dtype) -> bool:
    """Return whether oneDNN packs matrices of this dtype on this CPU: fp32 on all, bf16 with AVX-512 or similar."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def freeze(model: GPT) -> None:
    """Replace the modules that compute matrix products by frozen ones, in place."""
    for block in model.blocks:
        block.attention.qkv = freeze_linear(block.attention.qkv)
        block.attention.out = freeze_linear(block.attention.out)
        block.ffn = freeze_moe(block.ffn) if isinstance(block.ffn, MoE) else FrozenMLP(block.ffn)
    head, norm = product(model.output_weight), model.norm
    model.output = None
    model.head = lambda x: head(norm(x), None)


def freeze_moe(moe: MoE) -> MoE:
    """Replace the parts of a MoE layer by frozen ones, except its dispatch, and return the layer."""
    moe.router, moe.experts = FrozenRouter(moe.router), FrozenExperts(moe.experts)
    moe.mlp = None if moe.mlp is None else FrozenMLP(moe.mlp)
    if moe.mix is not None:
        moe.mix = FrozenMix(moe.mix) if isinstance(moe.mix, Mix) else FrozenSharedGate(moe.mix)
    return moe


# -- products ----------------------------------------------------------------------------------------------------------

Product = Callable[..., Tensor]
"""(x [..., K], bias [N] or None, gelu=False) -> x @ weight.T + bias [..., N], with gelu followed by GELU (tanh)."""


def product(weight_NK: Tensor) -> Product:
    """Return the function that multiplies by this matrix, packed if that is faster."""
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


# -- modules -----------------------------------------------------------------------------------------------------------


def freeze_linear(linear: nn.Linear, gelu: bool = False) -> nn.Module:
    """Return the frozen form of a linear layer, whole or sliced; `gelu` applies to a whole or column-sliced one."""
    return FrozenRowLinear(linear) if isinstance(linear, RowLinear) else FrozenLinear(linear, gelu)


class FrozenLinear(nn.Module):
    """Compute a linear layer (or one rank's column slice of it), with `gelu` followed by GELU."""

    def __init__(self, linear: nn.Linear, gelu: bool = False) -> None:
        super().__init__()
        self.product, self.gelu = product(linear.weight), gelu
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Return the output [..., N] of x [..., K]."""
        return self.product(x, self.bias, self.gelu)


class FrozenRowLinear(nn.Module):
    """Compute a row slice of a linear layer: sum the partial products over the tensor group, then add the bias."""

    def __init__(self, linear: RowLinear) -> None:
        super().__init__()
        self.product, self.group = product(linear.weight), linear.group
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output [..., N] from this rank's slice of its input."""
        y = reduce_from_group(self.product(x, None), self.group)
        return y if self.bias is None else y + self.bias


class FrozenMLP(nn.Module):
    """Compute a dense feed-forward."""

    def __init__(self, mlp: MLP) -> None:
        super().__init__()
        self.gated = mlp.gated
        self.up, self.down = freeze_linear(mlp.up, gelu=not mlp.gated), freeze_linear(mlp.down)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output [..., M] of x [..., M]."""
        h = self.up(x)
        return self.down(swiglu(h) if self.gated else h)


class FrozenRouter(Router):
    """Route with a frozen matrix, by the rules of `Router.route`."""

    def __init__(self, router: Router) -> None:
        super().__init__(0, router.experts, router.top_k, router.config)
        self.share(router)
        self.product = product(router.weight.float())

    def forward(self, x_SM: Tensor, sequences: int = 1) -> Routing:
        """Route as `Router.forward`; runs outside autocast."""
        return self.route(self.scores(x_SM.float()), sequences)

    def scores(self, x_SM: Tensor) -> Tensor:
        """Return the logits [S, E], without noise."""
        return self.product(x_SM, None)


class FrozenMix(nn.Module):
    """Compute the residual form's learned mix."""

    def __init__(self, mix: Mix) -> None:
        super().__init__()
        self.linear = FrozenLinear(mix)

    def forward(self, routed_SM: Tensor, fixed_SM: Tensor, x_SM: Tensor) -> Tensor:
        """Return the weighted sum of the branches, as `Mix.forward`."""
        return kernels.residual_mix(routed_SM, fixed_SM, coefficient_S2=self.linear(x_SM).float().softmax(1))


class FrozenSharedGate(nn.Module):
    """Compute the gated sum of routed and shared experts."""

    def __init__(self, gate: SharedGate) -> None:
        super().__init__()
        self.linear = FrozenLinear(gate)

    def forward(self, routed_SM: Tensor, fixed_SM: Tensor, x_SM: Tensor) -> Tensor:
        """Return the sum of the branches, as `SharedGate.forward`."""
        return routed_SM + fixed_SM * self.linear(x_SM).sigmoid()


class FrozenExperts(nn.Module):
    """Compute experts that are frozen one by one: a call only reads the weights of experts that have rows."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.gated = experts.activation == "swiglu"
        up, down = experts.up.detach().flatten(2), experts.down.detach()
        self.up, self.down = ([product(w.T) for w in stack] for stack in (up, down))
        self.up_bias = self.down_bias = [None] * len(up)
        if experts.down_bias is not None:
            bias = experts.down_bias.detach()
            if isinstance(experts, SlicedExperts) and not experts.adds_bias:
                bias = bias * 0
            self.up_bias, self.down_bias = list(experts.up_bias.detach().flatten(1)), list(bias)

    def forward(self, rows_RM: Tensor, offsets_E1: Tensor) -> Tensor:
        """Return the experts' outputs, as `Experts.forward`."""
        bounds = offsets_E1.tolist()
        outputs = []
        for e in np.flatnonzero(np.diff(offsets_E1.numpy())).tolist():
            rows = self.up[e](rows_RM[bounds[e] : bounds[e + 1]], self.up_bias[e], not self.gated)
            rows = swiglu(rows) if self.gated else rows
            outputs.append(self.down[e](rows, self.down_bias[e]))
        if bounds[-1] < len(rows_RM) or not outputs:
            outputs.append(rows_RM.new_zeros(len(rows_RM) - bounds[-1], rows_RM.shape[1]))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)
