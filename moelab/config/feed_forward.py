"""Describe feed-forwards: their functions, the experts of MoE layers, and what one of them is made of and costs.

`FeedForward` is the only place that counts the parameters, bytes and FLOPs of an expert or a dense feed-forward. Models
are built from it; the simulator, memory checks and the floors of benchmarks read it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Self

from moelab.config._check import check as _check

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}

FunctionName = Literal["gelu", "swiglu"]
"""The values of `DecoderConfig.feed_forward`."""


class Function(NamedTuple):
    """Name the activation of a feed-forward's function, and say whether it is gated."""

    activation: str
    """Its name in `moelab.kernels.ACTIVATIONS`."""
    gated: bool
    """As there; here too, because what counts weights imports no torch."""


FUNCTIONS: dict[FunctionName, Function] = {
    "gelu": Function("gelu_tanh", gated=False),
    "swiglu": Function("swiglu", gated=True),
}


class Weight(NamedTuple):
    """Describe one tensor of a feed-forward."""

    shape: tuple[int, ...]
    """A matrix begins with the size of its input."""
    sliced: int | None
    """The dim that slices of F cut; None for a tensor that all slices have whole, which must enter their sum once."""
    matrix: bool = True
    """Whether rows are multiplied by it; else it is added or multiplied element by element."""


@dataclass(frozen=True)
class FeedForward:
    """Describe one feed-forward M -> F -> M: a dense layer's, a fixed branch's, or one expert's.

    Attributes:
        hidden, ffn: M, F.
        function: key of `FUNCTIONS`. If gated, the first matrix has columns for the gate and for the other half.
        biases: both products have a bias.
    """

    hidden: int
    ffn: int
    function: FunctionName = "gelu"
    biases: bool = True

    @property
    def activation(self) -> str:
        """Return the name of the activation in `moelab.kernels.ACTIVATIONS`."""
        return FUNCTIONS[self.function].activation

    @property
    def gated(self) -> bool:
        """Return whether the activation is gated."""
        return FUNCTIONS[self.function].gated

    @property
    def inner(self) -> int:
        """Return the numbers that a row has between the two products: F, with a gate 2 F."""
        return (1 + self.gated) * self.ffn

    def tensors(self) -> dict[str, Weight]:
        """Return the tensors by name, in the order in which a layer of experts stacks them.

        Their names decide their initial values (`moelab.models.gpt.initial_weight`).
        """
        M, F = self.hidden, self.ffn
        columns = (2, F) if self.gated else (F,)
        named = {
            "up": Weight((M, *columns), len(columns)),
            "up_bias": Weight(columns, len(columns) - 1, matrix=False),
            "down": Weight((F, M), 0),
            "down_bias": Weight((M,), None, matrix=False),
        }
        return {name: weight for name, weight in named.items() if self.biases or not name.endswith("_bias")}

    @property
    def parameters(self) -> int:
        """Return the number of parameters."""
        return sum(math.prod(weight.shape) for weight in self.tensors().values())

    @property
    def weights(self) -> int:
        """Return the elements of the matrices: the multiply-adds of one row."""
        return sum(math.prod(weight.shape) for weight in self.tensors().values() if weight.matrix)

    @property
    def flops(self) -> int:
        """Return the matrix-multiply FLOPs of one row's forward pass."""
        return 2 * self.weights

    def bytes(self, dtype: str = "bf16") -> int:
        """Return the bytes of the parameters in `dtype`: fp32, bf16 or fp16."""
        return self.parameters * itemsize(dtype)

    def slice(self, parts: int) -> Self:
        """Return one of `parts` equal slices of the feed-forward size."""
        return replace(self, ffn=self.ffn // parts)


@dataclass(frozen=True)
class ExpertConfig:
    """Describe the experts of MoE layers.

    Attributes:
        ffn: feed-forward size of a routed expert; 0 means that of dense layers. Fine-grained experts (DeepSeekMoE) have
            a smaller one.
        shared: number of shared experts, which compute every token (DeepSeekMoE); they form one feed-forward of
            `shared * shared_ffn` whose output is added to that of the routed experts.
        shared_ffn: feed-forward size of a shared expert; 0 means that of a routed one.
        shared_gate: the shared experts' output is multiplied by a learned sigmoid per token (Qwen2-MoE).
    """

    ffn: int = 0
    shared: int = 0
    shared_ffn: int = 0
    shared_gate: bool = False

    def __post_init__(self) -> None:
        for what in ("ffn", "shared", "shared_ffn"):
            value = getattr(self, what)
            _check(value >= 0, f"expert: {what} must not be negative, got {value}")
        _check(
            self.shared > 0 or not (self.shared_ffn or self.shared_gate),
            "expert: shared_ffn and shared_gate describe shared experts, but shared is 0",
        )

    def routed(self, dense: FeedForward) -> FeedForward:
        """Return one routed expert of a model whose dense layers are these."""
        return replace(dense, ffn=self.ffn or dense.ffn)

    def shared_branch(self, dense: FeedForward) -> FeedForward | None:
        """Return the shared experts as one feed-forward, None without any."""
        routed = self.routed(dense)
        return replace(routed, ffn=self.shared * (self.shared_ffn or routed.ffn)) if self.shared else None

    def scaled(self, factor: float) -> Self:
        """Return the experts of a model `factor` times as wide."""
        return replace(self, ffn=scaled(self.ffn, factor), shared_ffn=scaled(self.shared_ffn, factor))


def scaled(ffn: int, factor: float) -> int:
    """Return a feed-forward size times `factor`, a multiple of 8; 0 stays 0."""
    return max(8, round(ffn * factor / 8) * 8) if ffn else 0


def itemsize(dtype: str) -> int:
    """Return the bytes of a number; ValueError, one line, for a dtype that is not in `DTYPE_BYTES`."""
    _check(dtype in DTYPE_BYTES, f"dtype must be one of {', '.join(DTYPE_BYTES)}, got {dtype!r}")
    return DTYPE_BYTES[dtype]
