"""Activations whose bits do not depend on the place of an element."""

import pytest
import torch
import torch.nn.functional as F
from moelab.kernels import ACTIVATIONS

from moelab.inference import elementwise


@torch.inference_mode()
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("rows", [7, 163, 1501])
@pytest.mark.parametrize("width", [2, 24, 40, 64, 100, 200])
def test_a_row_has_the_same_bits_in_any_company(width, rows, count, threads):
    """Also where threads begin and end within a row, above 2**14 and 2**15 elements."""
    threads(count)
    generator = torch.Generator().manual_seed(rows)
    for function, columns in ((elementwise.gelu, width), (elementwise.swiglu, 2 * width)):
        x = torch.randn(rows, columns, generator=generator)
        y = function(x)
        for i in range(0, rows, 1 + rows // 100):
            assert torch.equal(function(x[i : i + 1])[0], y[i])
        for n in (3, rows // 2, rows - 1):
            assert torch.equal(function(x[:n]), y[:n])


@torch.inference_mode()
@pytest.mark.parametrize("shape", [(5, 26), (2, 3, 64), (0, 24)])
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
def test_values_are_those_of_the_plain_functions(shape, dtype, rounding):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul(3).to(dtype)
    for ours, theirs in (
        (elementwise.gelu(x), F.gelu(x, approximate="tanh")),
        (elementwise.swiglu(x), ACTIVATIONS["swiglu"].forward(x)),
        (elementwise.gelu(x.transpose(0, 1)), F.gelu(x.transpose(0, 1), approximate="tanh")),
    ):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs, rtol=rounding, atol=rounding)
