"""Freeze a model for inference on a CPU: prepare its matrices for the products of few rows of a decoding step.

GELU and the sum with the residual stream are fused into the product where oneDNN computes it. The cost of other calls
does not depend on the number of rows: `moelab.inference.frozen_blocks` has the modules that make few of them. Each
expert is frozen on its own, so that a step only reads the weights of experts that have tokens. What is prepared
replaces the parameters, which are freed one by one.

**The fastest products** (fp32) depend on the processor. On Intel's, MKL multiplies few rows by the matrix as it is,
oneDNN more rows. Outside the experts oneDNN has a packed copy of the matrix, so that these matrices exist twice
(`_by_rows`). An expert's matrix, of which a model has many, exists once: oneDNN also computes with one that is not
packed (`Matrix`). On others, MKL is slow, and all but small matrices are packed.

**Batch-invariant products**: a row's result is bitwise independent of the other rows. oneDNN's products of packed
matrices have this property for any number of rows, MKL's from a number of rows that depends on the processor and the
shape (`least_rows`); fewer rows are repeated to reach it. Neither library guarantees the property: MKL's products are
examined on the machine, packed ones by tests. GELU that is not part of a product, and SwiGLU, are those of
`moelab.inference.elementwise`. A call of oneDNN takes about 9 us longer than one of MKL, so that small matrices are not
packed (`PACK_FROM`). In bf16 packed products are the fastest as well, so that there is no choice.

**Compiled products** are our own (`moelab.kernels.packed`), batch-invariant, and faster than both libraries' for few
rows. Matrices whose width does not fit take the batch-invariant ones.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelab import machine
from moelab.engine.differentiable import reduce_from_group
from moelab.engine.tensor_slicing import RowLinear
from moelab.inference import elementwise
from moelab.kernels import ACTIVATIONS, packed

PACK_FROM = 1 << 17
"""Elements of the smallest fp32 matrix that is packed; bf16 matrices are always packed.

Measured on AMD Zen 4 with one thread, for 1 and 8 rows: with 2**16 elements, the plain product takes 6 and 19 us, the
packed one 15 and 22 us; with 2**18 elements, 25 and 80 us against 32 and 60 us.
"""
MOST_REPEATED = 8
"""Matrices whose plain products need more rows than this to be independent are packed."""
LARGE = 1 << 19
"""An fp32 matrix of more elements than this is multiplied by MKL up to 4 rows, any other up to 12 (`few_rows`).

Measured on an Intel Xeon with AMX, two threads, matrices of 2**18 to 2**20 elements that are in no cache: at one row
MKL takes 0.5 to 0.8 of the time of the packed product, at 8 rows 0.8 and 1.2 of it with 2**19 and 2**20 elements, at 16
rows 1.3 to 1.6 of it. oneDNN's product of a matrix that is not packed takes 1.0 to 1.5 times that of a packed one.
"""
SMALL = 1 << 15
"""On a processor that is not Intel's, fp32 matrices of fewer elements are multiplied by MKL, others by oneDNN.

Measured on AMD Zen 5, two threads, matrices that are in no cache, 1 / 8 / 32 rows: with 2**14 elements MKL takes 5 / 8
/ 12 us and the packed product 11 / 11 / 13, with 2**15 14 / 14 / 21 and 13 / 13 / 17, with 2**19 166 / 187 / 301 and 48
/ 69 / 117.
"""
_EXAMINED = (*range(1, 65), 100, 256, 1000)


def can_freeze(dtype: torch.dtype) -> bool:
    """Return whether oneDNN packs matrices of this dtype on this CPU: fp32 on all, bf16 with AVX-512 or similar."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


# -- products ----------------------------------------------------------------------------------------------------------

Products = Literal["fastest", "invariant", "compiled"]
"""Which products a frozen model uses: the fastest of the libraries, their batch-invariant ones, or our own."""

Product = Callable[..., Tensor]
"""(x [..., K], bias [N] or None, activation="none", add=None) -> x @ weight.T + bias [..., N].

The activation, "none" or "gelu_tanh", is applied to it, `add` [..., N] is added to it; not both.
"""


def product(weight_NK: Tensor, products: Products) -> Product:
    """Return the function that multiplies by this matrix."""
    weight_NK, batch_invariant = weight_NK.detach(), products != "fastest"
    if products == "compiled" and fits(weight_NK):
        return functools.partial(_compiled, packed.pack(weight_NK))
    if weight_NK.dtype == torch.float32:
        few = 0 if batch_invariant else few_rows(weight_NK)
        if few:
            weight_NK = weight_NK.contiguous()
            small = weight_NK.numel() < PACK_FROM
            for_many = weight_NK if small else torch.ops.mkldnn._reorder_linear_weight(weight_NK)
            return functools.partial(_by_rows, weight_NK, for_many, few)
        if batch_invariant and weight_NK.numel() < PACK_FROM:
            rows = least_rows(*weight_NK.shape, torch.get_num_threads())
            if rows <= MOST_REPEATED:
                return functools.partial(_plain, weight_NK, rows)
    return functools.partial(_packed, torch.ops.mkldnn._reorder_linear_weight(weight_NK.contiguous()))


def fits(weight: Tensor) -> bool:
    """Return whether our compiled code multiplies by matrices [..., N, K] of these sizes; others are for libraries."""
    return weight.shape[-1] % packed.MULTIPLE == 0


@functools.cache
def mkl_is_fast() -> bool:
    """Return whether MKL has its fast products on this processor."""
    return machine.maker()[0] == "GenuineIntel"


def few_rows(weight_NK: Tensor) -> int:
    """Return the number of rows up to which MKL multiplies by this fp32 matrix, see `LARGE` and `SMALL`."""
    if mkl_is_fast():
        return 12 if weight_NK.numel() <= LARGE else 4
    return sys.maxsize if weight_NK.numel() < SMALL else 0


@functools.cache
def least_rows(N: int, K: int, threads: int) -> int:
    """Return the number of rows from which a row's plain fp32 product has the same bits with any other rows.

    The products of up to 1,000 random rows are compared, so that the number is that of this processor. On an Intel Xeon
    with AVX-512 it grows with K: 2 for K = 32, 6 for 128, 16 for 768; on AMD Zen 4, 4 were enough for all shapes tried.
    """
    generator = torch.Generator().manual_seed(0)
    weight_NK = torch.randn(N, K, generator=generator)
    x = torch.randn(max(_EXAMINED), K, generator=generator)
    fewest = 1
    for bias_N in (None, torch.randn(N, generator=generator)):
        most = F.linear(x, weight_NK, bias_N)
        different = [n for n in _EXAMINED if not torch.equal(F.linear(x[:n], weight_NK, bias_N), most[:n])]
        fewest = max(fewest, 1 + max(different, default=0))
    return fewest


_linear = torch.ops.mkldnn._linear_pointwise.default  # an overload named here is not looked up at each call
_linear_add = torch.ops.mkldnn._linear_pointwise.binary
_POINTWISE = {"none": ("none", [], ""), "gelu_tanh": ("gelu", [], "tanh")}  # activation -> what oneDNN calls it


def _compiled(
    weight: packed.Packed, x: Tensor, bias: Tensor | None, activation: str = "none", add: Tensor | None = None
) -> Tensor:
    return packed.linear(x, weight, bias, activation, add)


def _packed(
    weight: Tensor, x: Tensor, bias: Tensor | None, activation: str = "none", add: Tensor | None = None
) -> Tensor:
    if add is not None:
        return _linear_add(x, add, weight, bias, "add")
    return _linear(x, weight, bias, *_POINTWISE[activation])


def _plain(
    weight_NK: Tensor, least: int, x: Tensor, bias: Tensor | None, activation: str = "none", add: Tensor | None = None
) -> Tensor:
    if x.numel() >= least * x.shape[-1] or not len(x):
        y = F.linear(x, weight_NK, bias)
    else:
        y = F.linear(torch.cat([x] * least), weight_NK, bias)[: len(x)]
    if add is not None:
        return y + add
    return elementwise.INVARIANT[activation](y)


def _by_rows(
    weight_NK: Tensor,
    for_many: Tensor,
    few: int,
    x: Tensor,
    bias: Tensor | None,
    activation: str = "none",
    add: Tensor | None = None,
) -> Tensor:
    if x.numel() > few * x.shape[-1]:
        return _packed(for_many, x, bias, activation, add)
    y = F.linear(x, weight_NK, bias)
    if add is not None:
        return y.add_(add)
    return ACTIVATIONS[activation].forward(y)


class Matrix:
    """Hold an fp32 matrix [N, K] for products that write to given memory; the bits of a row depend on the others."""

    def __init__(self, weight_NK: Tensor) -> None:
        self.weight_NK = weight_NK.contiguous()
        self.weight_KN, self.few = self.weight_NK.t(), few_rows(weight_NK)  # found once: a call takes microseconds

    def multiply(self, x_RK: Tensor, bias_N: Tensor | None, out_RN: Tensor) -> None:
        """Write x_RK @ weight.T + bias to `out_RN`; x has at least one row."""
        if len(x_RK) > self.few:
            out_RN.copy_(_linear(x_RK, self.weight_NK, bias_N, "none", [], ""))
        elif bias_N is None:
            torch.mm(x_RK, self.weight_KN, out=out_RN)
        else:
            torch.addmm(bias_N, x_RK, self.weight_KN, out=out_RN)


# -- linear layers -----------------------------------------------------------------------------------------------------


def freeze_linear(linear: nn.Linear, products: Products, activation: str = "none") -> FrozenLinear | FrozenRowLinear:
    """Return the frozen form of a linear layer, whole or sliced; only a row slice has no activation."""
    if isinstance(linear, RowLinear):
        return FrozenRowLinear(linear, products)
    return FrozenLinear(linear, products, activation)


class FrozenLinear(nn.Module):
    """Compute a linear layer (or one rank's column slice of it), followed by the activation, "none" or "gelu_tanh"."""

    def __init__(self, linear: nn.Linear, products: Products, activation: str = "none") -> None:
        super().__init__()
        self.product, self.activation = product(linear.weight, products), activation
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """Return the output [..., N] of x [..., K], with `add` [..., N] added."""
        return self.product(x, self.bias, self.activation, add)


class FrozenRowLinear(nn.Module):
    """Compute a row slice of a linear layer: sum the partial products over the tensor group, then add the bias."""

    def __init__(self, linear: RowLinear, products: Products) -> None:
        super().__init__()
        self.product, self.group = product(linear.weight, products), linear.group
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor, add: Tensor | None = None) -> Tensor:
        """Return the layer's output [..., N] from this rank's slice of its input, with `add` [..., N] added."""
        y = reduce_from_group(self.product(x, None), self.group)
        y = y if self.bias is None else y + self.bias
        return y if add is None else y + add
