"""MoE layers on kernels of Liger and of the Triton repository, each with a reference that it is held against.

Written against Liger 0.8.5 (`LigerFusedMoEFunction`) and triton_kernels of Triton 3.8 (`matmul`, `topk`, `reduce`; that
of 3.6 has other names and is taken for absent). Their kernels need a GPU. `check` compares a layer with its reference
before a benchmark times it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelab.bench import peers

TOLERANCE = {torch.float32: 0.01, torch.bfloat16: 0.05}
"""The largest difference of a row over its norm (fp32: the kernels multiply in TF32)."""


class CheckedLayer(nn.Module, ABC):
    """An MoE layer on someone else's kernels."""

    @abstractmethod
    def forward(self, x_SM: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the output [S, M] and the load-balancing loss, if there is one."""

    @abstractmethod
    def reference(self, x_SM: Tensor) -> Tensor:
        """Return the same output from the same parameters in plain PyTorch, one expert after the other, in fp32."""


class LigerLayer(CheckedLayer):
    """Liger's fused MoE behind a top-1 (or top-k) gate, drop-free.

    Its experts are gated, three matrices each, so the feed-forward size is cut to two thirds for equal FLOPs.
    """

    def __init__(self, hidden: int, ffn: int, gate_EM: Tensor, top_k: int = 1) -> None:
        super().__init__()
        from liger_kernel.ops import LigerFusedMoEFunction

        self._fused, self._top_k = LigerFusedMoEFunction, top_k
        E, F_ = len(gate_EM), peers.gated_width(ffn)
        self.gate = nn.Parameter(gate_EM.clone())
        with gate_EM.device:
            self.gate_up = nn.Parameter(torch.randn(E, 2 * F_, hidden) * hidden**-0.5)  # the gate's rows first
            self.down = nn.Parameter(torch.randn(E, hidden, F_) * F_**-0.5)

    def forward(self, x_SM: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output [S, M] and a stand-in for the load-balancing loss, which Liger does not compute."""
        probs_SE, weight_SK, expert_SK = peers.top_k_gate(x_SM, self.gate, self._top_k)
        weight_SK, expert_SK = weight_SK.to(x_SM.dtype), expert_SK.to(torch.int32)
        return self._fused.apply(x_SM, self.gate_up, self.down, expert_SK, weight_SK), probs_SE.mean()

    def reference(self, x_SM: Tensor) -> Tensor:
        """Return the output of SwiGLU experts."""
        _, weight_SK, expert_SK = peers.top_k_gate(x_SM, self.gate, self._top_k)
        weights = list(zip(self.gate_up.unbind(), self.down.unbind(), strict=True))

        def ffn(e: int, x: Tensor) -> Tensor:
            gate_up, down = weights[e]
            gate, up = F.linear(x, gate_up.float()).chunk(2, -1)
            return F.linear(F.silu(gate) * up, down.float())

        return _by_expert(x_SM, weight_SK, expert_SK, len(weights), ffn)


class TritonKernelsLayer(CheckedLayer):
    """Our candidates' weights in triton_kernels: its top-k and row tables, and two products, drop-free.

    The first product gathers the tokens and applies GELU, the second one weights the rows and scatters them; both as
    the package offers it. `matmul` has no backward pass.

    Args:
        gate_EM, w1_EMF, b1_EF, w2_EFM, b2_EM: the weights.
        top_k: K.
    """

    def __init__(
        self, gate_EM: Tensor, w1_EMF: Tensor, b1_EF: Tensor, w2_EFM: Tensor, b2_EM: Tensor, top_k: int = 1
    ) -> None:
        super().__init__()
        from triton_kernels.matmul import FnSpecs, FusedActivation, matmul
        from triton_kernels.reduce import reduce
        from triton_kernels.tensor import make_ragged_tensor_metadata
        from triton_kernels.topk import topk

        from moelab.bench._gelu import gelu_tanh

        self._topk, self._matmul, self._reduce, self._slices = topk, matmul, reduce, make_ragged_tensor_metadata
        self._gelu = FusedActivation(FnSpecs("moelab_gelu_tanh", gelu_tanh), ())
        self._top_k = top_k
        self._gate, self._w1, self._w2 = gate_EM.detach(), w1_EMF.detach(), w2_EFM.detach()
        # As in the package's own benchmark: an expert's matrix column by column, biases in fp32.
        self._w1_columns, self._w2_columns = self._w1.mT.contiguous().mT, self._w2.mT.contiguous().mT
        self._b1, self._b2 = b1_EF.detach().float(), b2_EM.detach().float()

    def forward(self, x_SM: Tensor) -> tuple[Tensor, None]:
        """Return the output [S, M] and no loss; without gradients."""
        (S, M), K = x_SM.shape, self._top_k
        logits_SE = F.linear(x_SM.float(), self._gate.float())
        # A softmax over the chosen ones is a normalised top-k; a single choice has its probability.
        chosen = self._topk(logits_SE if K > 1 else logits_SE.softmax(-1), K, apply_softmax=K > 1)
        order_N = chosen.mask_metadata.col_sorted_indx  # token * K + choice, in the order of the experts
        slices = self._slices(chosen.mask_metadata.col_sum, len(order_N))
        rows_NF = self._matmul(
            x_SM,
            self._w1_columns,
            self._b1,
            a_ragged_metadata=slices,
            gather_indx=order_N // K,
            fused_activation=self._gelu,
        )
        rows_NM = self._matmul(
            rows_NF,
            self._w2_columns,
            self._b2,
            a_ragged_metadata=slices,
            scatter_indx=order_N,
            gammas=chosen.vals.flatten()[order_N],
        )
        return rows_NM if K == 1 else self._reduce(rows_NM.view(S, K, M), dim=1)[0], None

    def reference(self, x_SM: Tensor) -> Tensor:
        """Return the output of GELU experts with biases."""
        _, weight_SK, expert_SK = peers.top_k_gate(x_SM, self._gate, self._top_k)
        if self._top_k > 1:
            weight_SK = weight_SK / weight_SK.sum(1, keepdim=True)

        def ffn(e: int, x: Tensor) -> Tensor:
            hidden = F.gelu(torch.addmm(self._b1[e], x, self._w1[e].float()), approximate="tanh")
            return torch.addmm(self._b2[e], hidden, self._w2[e].float())

        return _by_expert(x_SM, weight_SK, expert_SK, len(self._gate), ffn)


def _by_expert(
    x_SM: Tensor, weight_SK: Tensor, expert_SK: Tensor, experts: int, ffn: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Return the weighted sums of the experts' outputs; `ffn` takes an expert and its tokens in fp32."""
    y_SM = torch.zeros(x_SM.shape, device=x_SM.device)
    for e in range(experts):
        token, choice = (expert_SK == e).nonzero(as_tuple=True)
        if len(token):
            y_SM = y_SM.index_add(0, token, ffn(e, x_SM[token].float()) * weight_SK[token, choice, None])
    return y_SM


# -- before it is timed ---------------------------------------------------------------------------------------------


def check(layer: CheckedLayer, x_SM: Tensor, dy_SM: Tensor | None = None) -> None:
    """Compare a layer with its reference: the output, and the gradients where one for the output is given.

    Rows are compared: tokens, or experts of a parameter. A difference counts over the norm of the row, or over the mean
    norm where that is greater.

    Raises:
        ValueError: one line: what differs, by how much, and what is allowed.
    """
    allowed = TOLERANCE[x_SM.dtype]
    found = _results(layer, lambda x: layer(x)[0], x_SM, dy_SM)
    expected = _results(layer, layer.reference, x_SM, dy_SM)
    for name, right in expected.items():
        if name not in found or found[name].shape != right.shape:
            what = f"has shape {tuple(found[name].shape)}, not {tuple(right.shape)}" if name in found else "is missing"
            raise ValueError(f"wrong result: {name} {what}")
        if not (worst := _difference(found[name], right)) <= allowed:  # NaN is not
            apart = f"{worst:.3g} of a row's norm from the reference, {allowed} allowed"
            raise ValueError(f"wrong result: {name} is {apart}")


def _results(
    layer: CheckedLayer, call: Callable[[Tensor], Tensor], x_SM: Tensor, dy_SM: Tensor | None
) -> dict[str, Tensor]:
    x_SM = x_SM.detach().requires_grad_(dy_SM is not None)
    with torch.set_grad_enabled(dy_SM is not None):
        y_SM = call(x_SM)
    found = {"the output": y_SM.detach()}
    if dy_SM is not None:
        y_SM.backward(dy_SM.to(y_SM.dtype))
        grads = {"the tokens": x_SM.grad} | {name: p.grad for name, p in layer.named_parameters()}
        found |= {f"the gradient of {name}": g for name, g in grads.items() if g is not None}
        layer.zero_grad()
    return found


def _difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference of a row over its norm."""
    axes = tuple(range(1, expected.ndim))
    norms = torch.linalg.vector_norm(expected, dim=axes, dtype=torch.float32)
    apart = torch.linalg.vector_norm(found - expected, dim=axes, dtype=torch.float32)
    return float((apart / norms.clamp(min=max(float(norms.mean()), 1e-30))).max())
