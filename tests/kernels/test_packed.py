"""What is packed, and what is not; `tests/inference/test_packing.py` compares the products."""

import pytest
import torch
from moelab.kernels import _cpp, pack


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40, 32), (3, 64, 48), (2, 2, 33, 16)])
def test_each_value_has_one_place_and_the_rest_is_zero(instructions, shape, dtype):
    weight = (1 + torch.arange(torch.Size(shape).numel()) % 251).view(shape).to(dtype)  # exact in bfloat16
    packed = pack(weight)
    N, K = shape[-2:]
    assert packed.shape == (torch.Size(shape).numel() // (N * K), -(-N // 32), K, 32) and packed.dtype == dtype
    deep = 1 if dtype == torch.float32 else 2  # values of neighbouring k that lie side by side
    rows = packed.reshape(len(packed), -1, K // deep, 32, deep).permute(0, 1, 3, 2, 4).reshape(len(packed), -1, K)
    assert torch.equal(rows[:, :N].reshape(shape), weight) and not rows[:, N:].any()
    assert torch.equal(pack(weight.mT.contiguous().mT), packed)


def test_what_cannot_be_packed(instructions):
    shapes = torch.zeros(32, 24), torch.zeros(32), torch.zeros(32, 16).double(), torch.zeros(32, 16, device="meta")
    for wrong in shapes:
        with pytest.raises(ValueError, match=r"^pack: .* kernels pack float32 or bfloat16 matrices on a CPU"):
            pack(wrong)
    with _cpp.limited("none"), pytest.raises(ValueError, match=r"^pack: torch.float32 \(32, 16\) on cpu"):
        pack(torch.zeros(32, 16))
