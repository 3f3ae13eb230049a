"""Pack a model's weights once for inference on a CPU, for the operations of `moelab.kernels.packed`.

A packed weight replaces that of its module, which is freed; the model's code is that of training. Products of packed
weights take the activation and the sum with the residual stream with them, and an MoE layer whose experts are all in
this process takes two calls, for the gate and for the rest. A row's result has the same bits whatever the other rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moelab import kernels
from moelab.kernels import ACTIVATIONS
from moelab.kernels.packed import MULTIPLE, pack_mix
from moelab.models import GPT
from moelab.models.layers import Linear, RMSNorm
from moelab.models.moe import MLP, Experts, MoE, SharedGate


def can_pack(model: GPT) -> bool:
    """Return whether all matrices of the model can be packed here: its dtype, device and widths fit.

    Feed-forward sizes always fit: they are filled up with zeros.
    """
    weights = [model.token_embedding.weight, *(block.attention.out.weight for block in model.blocks)]
    layers = [module for module in model.modules() if isinstance(module, (MLP, Experts))]
    known = all(ACTIVATIONS[layer.activation].number is not None for layer in layers)
    return known and all(kernels.can_pack(weight) for weight in weights)


@torch.no_grad()
def pack(model: GPT) -> None:
    """Replace the model's weights by packed ones, module by module, so that few exist twice; nothing has a gradient.

    Only the embeddings remain, so that a tied head's matrix exists twice.
    """
    model.requires_grad_(False)
    for block in model.blocks:
        _pack(block.attention.qkv)
        _pack(block.attention.out)
        ffn = block.ffn
        if isinstance(ffn, MoE):
            ffn.router.packed = kernels.pack(ffn.router.rounded(ffn.router.weight.float()))
            _free(ffn.router, "weight")
            _pack_experts(ffn.experts)
            if isinstance(ffn.mix, SharedGate):
                _pack(ffn.mix)
            elif ffn.mix is not None:
                ffn.mix.packed = pack_mix(ffn.mix.weight, ffn.mix.bias)
                _free(ffn.mix, "weight", "bias")
        mlp = ffn.mlp if isinstance(ffn, MoE) else ffn
        if mlp is not None:
            _pack_mlp(mlp)
    for norm in model.modules():
        if isinstance(norm, RMSNorm):
            norm.packed = norm.weight.shape[0] % MULTIPLE == 0
    model.packed = kernels.pack(model.output_weight)
    if model.output is not None:
        _free(model.output, "weight")
    for module in model.modules():  # as plain attributes they are found at once; a module's search takes a microsecond
        module.__dict__.update({**module._modules, **module._parameters})


def _free(module: nn.Module, *names: str) -> None:
    """Remove weights whose packed forms have taken their place."""
    for name in names:
        setattr(module, name, None)


def _pack(linear: Linear) -> None:
    linear.packed = kernels.pack(linear.weight)
    _free(linear, "weight")


def _pack_mlp(mlp: MLP) -> None:
    gates = 1 + ACTIVATIONS[mlp.activation].gated
    up, down = mlp.up, mlp.down
    up.packed = kernels.pack(_filled(up.weight.unflatten(0, (gates, -1)), 1))
    if up.bias is not None:
        up.bias = nn.Parameter(_filled(up.bias.view(gates, -1), 1).flatten(), requires_grad=False)
    down.packed = kernels.pack(_filled(down.weight, 1))
    _free(up, "weight")
    _free(down, "weight")


def _pack_experts(experts: Experts) -> None:
    gates = 1 + ACTIVATIONS[experts.activation].gated
    w1_EMN, b1_EN, w2_EFM, b2_EM = experts.weights()
    up = kernels.pack(_filled(w1_EMN.unflatten(2, (gates, -1)).permute(0, 2, 3, 1), 2))
    b1_EN = b1_EN if b1_EN is None else _filled(b1_EN.unflatten(1, (gates, -1)), 2).flatten(1)
    _free(experts, "up", "up_bias")
    experts.packed = (up, b1_EN, kernels.pack(_filled(w2_EFM, 1).mT), b2_EM)
    _free(experts, "down", "down_bias")


def _filled(x: Tensor, dim: int) -> Tensor:
    """Return x with zeros after the last element of a dim, up to a size that the operations take."""
    shape = list(x.shape)
    shape[dim] = -shape[dim] % MULTIPLE
    return torch.cat((x, x.new_zeros(shape)), dim) if shape[dim] else x
