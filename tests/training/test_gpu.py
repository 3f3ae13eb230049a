"""A model and its training on a GPU, against the CPU's."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from moelab.config import RoutingConfig
from moelab.engine.testing import run_on_ranks
from moelab.models import build
from moelab.training.loop import train

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
"""On the CPU these tests show that they would run on a GPU."""


@pytest.fixture
def model(tiny_model):
    """One that draws nothing: what is drawn on a GPU is not what a CPU draws."""
    return replace(tiny_model, dropout=0.0, routing=RoutingConfig(drop_tokens=False))


@pytest.mark.parametrize("device", DEVICES)
def test_a_model_has_the_cpus_loss_and_gradients(device, model):
    config, found = model, []
    tokens = torch.randint(config.vocab, (3, 33), generator=torch.Generator().manual_seed(0))
    for where in (device, "cpu"):
        made = build(config, 0, where).train()
        output = made(tokens[:, :-1].to(where), targets_BT=tokens[:, 1:].to(where))
        (output.loss + output.routing_loss()).backward()
        found.append({"loss": output.loss.detach().cpu(), **{n: p.grad.cpu() for n, p in made.named_parameters()}})
    for name, want in found[1].items():
        torch.testing.assert_close(found[0][name], want, rtol=2e-4, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("device", DEVICES)
def test_training_ends_with_the_cpus_loss(device, dtype, model, tiny_train, data, tmp_path):
    config, ends = replace(tiny_train, dtype=dtype), []
    for i, where in enumerate((device, "cpu")):
        given = replace(config, device=where), data, 32, tmp_path / str(i)
        ends.append(train(model, *given)["validation_loss"])
    assert ends[0] == pytest.approx(ends[1], abs=0.005 if dtype == "fp32" else 0.05)


def exchanged():
    x = torch.arange(12.0, device="cuda")
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x)
    dist.all_reduce(x)
    return torch.equal(out, x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nccl_sends_a_ranks_rows_to_itself():
    """With one GPU there is nobody else: it shows that NCCL starts here."""
    assert run_on_ranks(1, exchanged, backend="nccl") == [True]
