"""Two ways to compute the same model, for inference only: "optimised", as fast as we can, and "baseline", the paper's PyTorch.

**baseline** (section 5.4): gating by one-hot masks, dispatch and combine by einsum, every expert computes the busiest expert's load. Among ranks that
share experts all slots travel, empty ones too, in flat all-to-alls (`moelab.engine.padded`).

**optimised**: on CUDA the fused gate, table and grouped kernels that training uses, too. On CPU it packs every weight matrix for oneDNN: at the
few rows of a decoding step that is two to three times as fast as the plain product; GELU is computed on the way; and, as tests check, a row's
result has the same bits whatever rows are beside it. An expert is packed alone, so a step reads the weights of the experts that have
tokens and no others. The packed copies replace the parameters.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from moelab.engine.padded import PaddedExchange
from moelab.engine.parallel import SlicedExperts
from moelab.engine.tensor_slicing import RowLinear, leave
from moelab.kernels import gate, residual_mix
from moelab.models import GPT, Routing
from moelab.models.moe import DISPATCH, MLP, Experts, MoE
from moelab.models.routing import Router

MODES = ("optimised", "baseline")


def set_mode(model: GPT, mode: str = "optimised", *, drop_free: bool = True) -> GPT:
    """Make the model compute in this mode, in place; returns it.

    Args:
        drop_free: False keeps the routing's evaluation capacity, under which a token's fate depends on who else is in the batch.

    Raises:
        ValueError: no such mode.
    """
    if mode not in MODES:
        raise ValueError(f"inference: mode must be {' or '.join(map(repr, MODES))}, got {mode!r}")
    moes = [block.ffn for block in model.blocks if isinstance(block.ffn, MoE)]
    for moe in moes:
        if drop_free:
            moe.router.config = replace(moe.router.config, drop_tokens=False)
        if moe.flow in DISPATCH.values():
            moe.flow = DISPATCH["einsum" if mode == "baseline" else "local"]
        elif mode == "baseline":  # instead of the engine's exchange
            moe.flow = PaddedExchange(moe.flow.groups, moe.flow.traffic)
        if mode == "baseline":
            moe.router = MaskRouter(moe.router)
    weight = model.token_embedding.weight
    if mode == "optimised" and weight.device.type == "cpu" and can_pack(weight.dtype):
        _pack(model)
    return model.eval()


class MaskRouter(nn.Module):
    """The baseline's gate: softmax, one-hot masks, cumulative sums, each its own operation."""

    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router = router

    def forward(self, x_SM: Tensor) -> Routing:
        return _route(self.router, nn.functional.linear(x_SM.float(), self.router.weight.float()), "reference")


def _route(router: Router, logits_SE: Tensor, backend: str = "auto") -> Routing:
    config, K = router.config, router.top_k
    capacity = config.capacity(len(logits_SE), router.experts, K, False)
    seed = 0 if config.drop_tokens and config.random_token_selection else None
    normalize = K > 1 if config.normalize_weights is None else config.normalize_weights
    return gate(logits_SE, K, capacity, seed=seed, normalize=normalize, backend=backend)


# -- packed for oneDNN (CPU) -----------------------------------------------------------------------------------------------------


def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN packs matrices of this type on this CPU: fp32 on all, bf16 not without AVX-512 (or its like)."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _packed(weight_NK: Tensor) -> Tensor:
    """An opaque tensor that `_linear` reads."""
    return torch.ops.mkldnn._reorder_linear_weight(weight_NK.detach().contiguous())


def _linear(x: Tensor, packed: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """x @ weight.T + bias, then GELU (tanh) if asked."""
    activation = ("gelu", [], "tanh") if gelu else ("none", [], "")
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, *activation)


def _pack(model: GPT) -> None:
    """Replace the modules that multiply by matrices; their parameters are freed one by one on the way."""
    for block in model.blocks:
        block.attention.qkv, block.attention.out = _pack_linear(block.attention.qkv), _pack_linear(block.attention.out)
        block.ffn = PackedMoE(block.ffn) if isinstance(block.ffn, MoE) else PackedMLP(block.ffn)
    head, norm = _packed(model.token_embedding.weight), model.norm
    model.head = lambda x: _linear(norm(x), head, None)


def _pack_linear(linear: nn.Linear, gelu: bool = False) -> nn.Module:
    return PackedRowLinear(linear) if isinstance(linear, RowLinear) else PackedLinear(linear, gelu)


class PackedLinear(nn.Module):
    """A linear layer (or one rank's column slice of it), GELU behind it if asked."""

    def __init__(self, linear: nn.Linear, gelu: bool = False) -> None:
        super().__init__()
        self.packed, self.gelu = _packed(linear.weight), gelu
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self.packed, self.bias, self.gelu)


class PackedRowLinear(nn.Module):
    """A row slice: partial sums are added up over the tensor group, the bias once."""

    def __init__(self, linear: RowLinear) -> None:
        super().__init__()
        self.packed, self.bias, self.group = _packed(linear.weight), linear.bias.detach(), linear.group

    def forward(self, x: Tensor) -> Tensor:
        return leave(_linear(x, self.packed, None), self.group) + self.bias


class PackedMLP(nn.Module):
    """A dense feed-forward."""

    def __init__(self, mlp: MLP) -> None:
        super().__init__()
        self.up, self.down = _pack_linear(mlp.up, gelu=True), _pack_linear(mlp.down)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


class PackedExperts(nn.Module):
    """Experts, packed one by one: a call reads the weights of those that have rows."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        ups, downs = experts.up.detach(), experts.down.detach()
        bias = experts.down_bias.detach()
        if isinstance(experts, SlicedExperts) and not experts.adds_bias:
            bias = bias * 0
        self.up, self.down = [_packed(w.T) for w in ups], [_packed(w.T) for w in downs]
        self.up_bias, self.down_bias = list(experts.up_bias.detach()), list(bias)

    def forward(self, rows_RM: Tensor, offsets_E1: Tensor) -> Tensor:
        """As `Experts.forward`."""
        bounds = offsets_E1.tolist()
        outputs = [
            _linear(_linear(rows_RM[a:b], self.up[e], self.up_bias[e], True), self.down[e], self.down_bias[e])
            for e, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))
            if b > a
        ]
        if bounds[-1] < len(rows_RM) or not outputs:
            outputs.append(rows_RM.new_zeros(len(rows_RM) - bounds[-1], rows_RM.shape[1]))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class PackedMoE(MoE):
    """A MoE layer whose gate, experts, fixed MLP and mix are packed; its `flow` is the original's."""

    def __init__(self, moe: MoE) -> None:
        nn.Module.__init__(self)
        self.router, self.flow = moe.router, moe.flow
        self.logits = _packed(moe.router.weight.float())
        self.experts = PackedExperts(moe.experts)
        self.mlp = None if moe.mlp is None else PackedMLP(moe.mlp)
        self.mix = None if moe.mix is None else PackedLinear(moe.mix)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        x_SM = x.reshape(-1, x.shape[-1])
        routing = self.route(x_SM)
        y_SM = self.flow(x_SM, routing, self.experts)
        if self.mlp is not None:
            share_S2 = None if self.mix is None else self.mix(x_SM).float().softmax(1)
            y_SM = residual_mix(y_SM, self.mlp(x_SM), coefficient_S2=share_S2)
        return y_SM.view_as(x), routing

    def route(self, x_SM: Tensor) -> Routing:
        return _route(self.router, _linear(x_SM.float(), self.logits, None))
