"""The library of fp32 products: exact where it is chosen, chosen where it was measured, and nothing stays set."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from moelab.kernels.attention import LONGEST

from moelab import machine
from moelab.config import DecoderConfig, ModelConfig, RoutingConfig
from moelab.models import build, products
from moelab.models.attention import uses_kernel
from moelab.models.products import default_products, fastest_products, onednn_is_faster

matmul = torch.backends.mkldnn.matmul


@pytest.fixture(autouse=True)
def _forget():
    yield
    onednn_is_faster.cache_clear()


def on(monkeypatch, vendor=products.VENDOR, avx512=True, amx=False, error=1e-6):
    monkeypatch.setattr(machine, "vendor", lambda: vendor)
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(products, "_error", lambda: error)
    onednn_is_faster.cache_clear()


def test_it_is_set_inside_and_not_after_unless_the_program_has_set_another(monkeypatch):
    on(monkeypatch)
    with fastest_products():
        assert matmul.fp32_precision == "bf16"
    assert matmul.fp32_precision == "none"
    with pytest.raises(RuntimeError, match="in the middle"), fastest_products():
        raise RuntimeError("in the middle")
    assert matmul.fp32_precision == "none"
    with default_products(), fastest_products():
        assert matmul.fp32_precision == "ieee", "PyTorch's choice can be asked for"
    assert matmul.fp32_precision == "none"
    matmul.fp32_precision = "ieee"
    try:
        with fastest_products():
            assert matmul.fp32_precision == "ieee"
    finally:
        matmul.fp32_precision = "none"


@pytest.mark.parametrize(
    "case",
    [{"vendor": "GenuineIntel"}, {"avx512": False}, {"amx": True}, {"error": 2.0**-9}],
)
def test_elsewhere_it_is_not(monkeypatch, case):
    on(monkeypatch, **case)
    with fastest_products():
        assert matmul.fp32_precision == "none"


def test_products_are_those_of_fp32_on_this_machine():
    """Whatever was chosen, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    for rows, inner, columns in ((1, 7, 5), (33, 128, 65), (513, 64, 256)):
        x, w = (torch.randn(*shape, generator=generator) for shape in ((rows, inner), (columns, inner)))
        leaves = [t.clone().requires_grad_() for t in (x, w)]
        wide = [t.double().requires_grad_() for t in (x, w)]
        with fastest_products():
            torch.nn.functional.linear(*leaves).square().sum().backward()
        torch.nn.functional.linear(*wide).square().sum().backward()
        for found, exact in zip(leaves, wide, strict=True):
            assert (found.grad - exact.grad).abs().max() < 1e-5 * exact.grad.abs().max()


@pytest.mark.skipif(torch.cpu._is_amx_tile_supported(), reason="with AMX, oneDNN computes in bf16 when it may")
@pytest.mark.parametrize("decoder", [DecoderConfig(), DecoderConfig.modern(kv_heads=1)], ids=["paper", "modern"])
@pytest.mark.parametrize("experts", [(0, 0), (0, 8)])
def test_a_model_is_the_same_with_either_library(experts, decoder, monkeypatch):
    """Loss and gradients, by short attention, which PyTorch's fused one would slow down, and padded groups of rows."""
    on(monkeypatch)
    free, sizes = RoutingConfig(drop_tokens=False), {"hidden": 48, "heads": 3, "vocab": 96, "context": 64}
    config = ModelConfig(layers=2, experts=experts, routing=free, decoder=decoder, **sizes)
    assert uses_kernel(config, 64) and not uses_kernel(config, LONGEST + 16)
    assert not uses_kernel(replace(config, dropout=0.1), 64)
    model = build(config, 0)
    tokens_BT = torch.randint(96, (9, 65), generator=torch.Generator().manual_seed(1))
    fused, calls = F.scaled_dot_product_attention, []
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k))
    found = []
    for wanted in (False, True):
        model.zero_grad(set_to_none=True)
        with fastest_products(wanted):
            output = model(tokens_BT[:, :-1], targets_BT=tokens_BT[:, 1:])
            output.loss.backward()
        found.append((output.loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]))
        assert not calls
    (loss, gradients), (other, others) = found
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=1e-5)
    for a, b in zip(others, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_the_check_finds_bf16_where_there_is_amx():
    assert (products._error() > products._MAX_ERROR) == torch.cpu._is_amx_tile_supported()
