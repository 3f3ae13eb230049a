"""The output head's losses and gradients in C++, beside those that PyTorch computes in float64 from the same numbers."""

import pytest
import torch
import torch.nn.functional as F
from moelab.kernels import _cpp
from moelab.kernels.head import SoftTargets, has_kernel, head
from torch.utils.flop_counter import FlopCounterMode

from moelab.models import loss as models_loss
from moelab.models.loss import linear_losses
from tests.kernels.helpers import assert_same_bits, assert_same_bits_on_any_number_of_threads, poison

SIZES = [(1, 16, 16), (33, 48, 272), (600, 32, 2048), (7, 2064, 32), (40, 16, 20_000), (0, 16, 32)]
"""N, M, V: one of all; odd tiles of rows and of entries; several groups; rows of w far apart; groups of one tile; none."""
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)]


def case(N, M, V, dtypes=DTYPES[0], scale=1.0):
    g = torch.Generator().manual_seed(N * V)
    x, w = torch.randn(N, M, generator=g), torch.randn(V, M, generator=g) * scale / M**0.5
    return x.to(dtypes[0]), w.to(dtypes[1]), torch.randint(V, (N,), generator=g)


def taught(N, V, dtype=torch.float32, temperature=1.0, weight=1.0):
    """What a teacher says; one token's least likely entries have no probability in float32."""
    logits = 3 * torch.randn(N, V, generator=torch.Generator().manual_seed(V))
    logits[:1, ::2] -= 200
    return SoftTargets(logits.to(dtype), temperature, weight)


def exact(x, w, targets, soft=None):
    """Losses and gradients in float64, of w as the products take it."""
    x, w = x.double().requires_grad_(), w.to(x.dtype).double().requires_grad_()
    losses, divergences = F.cross_entropy(x @ w.T, targets, reduction="none"), None
    if soft is not None:
        log_p, log_q = (F.log_softmax(z.double() / soft.temperature, -1) for z in (soft.logits_NV, x @ w.T))
        divergences = soft.weight * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    (losses if divergences is None else losses + divergences).sum().backward()
    return losses.detach(), x.grad, w.grad, None if divergences is None else divergences.detach()


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "M", "V"), SIZES)
def test_losses_and_gradients_are_the_plain_ones(N, M, V, dtypes, instructions):
    x, w, targets = case(N, M, V, dtypes, scale=3.0)
    poison()
    assert has_kernel(x, w)
    found, truth = head(x, w, targets, True, True)[:3], exact(x, w, targets)[:3]
    assert [t.dtype for t in found] == [torch.float32, dtypes[0], torch.float32]
    assert [t.shape for t in found] == [t.shape for t in truth]
    errors = (1e-6, 5e-3, 5e-3) if dtypes[0] == torch.bfloat16 else [4e-6] * 3
    for ours, theirs, error in zip(found, truth, errors, strict=True):
        assert (ours - theirs).norm() <= error * theirs.norm()


@pytest.mark.parametrize(("temperature", "weight"), [(1.0, 1.0), (2.5, 0.3)])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "M", "V"), SIZES)
def test_soft_targets_are_the_plain_ones(N, M, V, dtypes, temperature, weight, instructions):
    x, w, targets = case(N, M, V, dtypes, scale=3.0)
    soft = taught(N, V, dtypes[0], temperature, weight)
    poison()
    assert has_kernel(x, w, soft)
    found, truth = head(x, w, targets, True, True, soft), exact(x, w, targets, soft)
    errors = (1e-6, 5e-3, 5e-3, 2e-5) if dtypes[0] == torch.bfloat16 else [4e-6] * 4
    for ours, theirs, error in zip(found, truth, errors, strict=True):
        assert (ours - theirs).norm() <= error * theirs.norm()
    assert_same_bits(found[0], head(x, w, targets, False, False)[0])
    assert found[3].dtype == torch.float32 and (found[3] >= -1e-6).all()


def test_a_teacher_that_says_the_same_adds_nothing(instructions):
    x, w, targets = case(33, 48, 272)
    alone, (*found, soft) = head(x, w, targets, True, True), head(x, w, targets, True, True, SoftTargets(x @ w.T))
    assert soft.abs().max() < 1e-6
    for ours, theirs in zip(found, alone[:3], strict=True):
        assert (ours - theirs).norm() <= 2e-6 * theirs.norm()


def test_only_wanted_gradients_are_computed(instructions):
    arguments, soft = case(50, 32, 64), taught(50, 64)
    losses, dx, dw, softs = head(*arguments, True, True, soft)
    for for_x, for_w in ((False, False), (True, False), (False, True)):
        poison()
        *some, same = head(*arguments, for_x, for_w, soft)
        assert_same_bits(same, softs)
        assert [t is not None for t in some] == [True, for_x, for_w]
        assert_same_bits([t for t in some if t is not None], [losses, *([dx] * for_x), *([dw] * for_w)])


@pytest.mark.parametrize("dtypes", DTYPES[:2], ids=str)
def test_bits_depend_neither_on_threads_nor_on_other_rows(dtypes, instructions):
    x, w, targets = case(300, 32, 2048, dtypes)
    soft = taught(300, 2048, dtypes[0])
    assert_same_bits_on_any_number_of_threads(lambda: head(x, w, targets, True, True, soft))
    whole = head(x, w, targets, True, False)[:2]
    for rows in (slice(0, 1), slice(17, 30), slice(250, 300)):
        assert_same_bits(head(x[rows], w, targets[rows], True, False)[:2], [t[rows] for t in whole])


def test_a_token_that_the_model_excludes_costs_what_it_should(instructions):
    """Its probability is e^-400, which float32 has not."""
    x, w = torch.zeros(2, 16), torch.zeros(16, 16)
    x[:, 0], w[0, 0], w[1, 0] = torch.tensor([200.0, -1.0]), 1.0, -1.0
    targets = torch.tensor([1, 0])
    for ours, theirs in zip(head(x, w, targets, True, True)[:3], exact(x, w, targets)[:3], strict=True):
        torch.testing.assert_close(ours, theirs.float())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so(bad, instructions):
    x, w, targets = case(40, 16, 32)
    x[35, 2] = bad
    losses, dx, dw, soft = head(x, w, targets, True, True, taught(40, 32))
    assert soft.isfinite().tolist() == [i != 35 for i in range(40)]
    assert losses.isfinite().tolist() == dx.isfinite().all(1).tolist() == [i != 35 for i in range(40)]
    assert not dw.isfinite().all()


def test_targets_may_be_of_32_bits(instructions):
    x, w, targets = case(7, 16, 32)
    assert torch.equal(head(x, w, targets.int(), True, True)[0], head(x, w, targets, True, True)[0])


@pytest.mark.parametrize("wrong", [-100, 32])
def test_a_target_that_there_is_not_is_one_line(wrong, instructions):
    x, w, targets = case(4, 16, 32)
    targets[2] = wrong
    with pytest.raises(RuntimeError, match=rf"head: target {wrong}, allowed are 0 to 31"):
        head(x, w, targets, True, True)


@pytest.mark.parametrize(
    "change",
    [
        dict(x=torch.zeros(4, 32)),
        dict(x=torch.zeros(4, 16, dtype=torch.int32), w=torch.zeros(32, 16, dtype=torch.int32)),
        dict(w=torch.zeros(24, 16)),
        dict(targets=torch.zeros(3, dtype=torch.int64)),
        dict(soft=taught(3, 32)),
        dict(soft=taught(4, 16)),
    ],
)
def test_what_does_not_fit_is_refused(change, instructions):
    """Memory beyond the tensors would be read and written."""
    x, w, targets = case(4, 16, 32)
    given = dict(x=x, w=w, targets=targets, soft=None) | change
    with pytest.raises(ValueError, match=r"^head: rows, weights, targets and a teacher's logits do not fit"):
        head(given["x"], given["w"], given["targets"], True, True, given["soft"])


@pytest.mark.parametrize("teacher", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES[:2], ids=str)
def test_the_loss_function_calls_it(dtypes, teacher, instructions, monkeypatch):
    """Through autograd, its gradients scaled by that of the loss, beside PyTorch's form for machines without C++."""
    x, w, targets = case(100, 32, 64, dtypes)
    soft = taught(100, 64, dtypes[0], 2.0, 0.5) if teacher else None
    found, calls = [], []
    monkeypatch.setattr(models_loss, "head", lambda *args: calls.append(args) or head(*args))
    for name in (instructions, "none"):
        with _cpp.limited(name):
            a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16, enabled=dtypes[0] == torch.bfloat16):
                loss, more = linear_losses(a, b, targets, soft=soft)
            (3 * loss).backward()
            found.append((loss.detach(), a.grad, b.grad, more))
        assert len(calls) == 1, "with C++ it is called, without it is not"
    error = 1e-2 if dtypes[0] == torch.bfloat16 else 1e-6
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype and (ours - theirs).norm() <= error * theirs.norm()


def test_other_sizes_and_counted_operations_are_left_to_pytorch():
    x, w, targets = case(10, 16, 32)
    for a, b in ((x[:, :13], w[:, :13]), (x, w[:31]), (x.double(), w.double()), (x, w.bfloat16()), (x.half(), w)):
        assert not has_kernel(a, b)
    assert not has_kernel(x, w, taught(10, 32, torch.bfloat16))
    with FlopCounterMode(display=False) as counter:
        linear_losses(x.requires_grad_(), w.requires_grad_(), targets)[0].backward()
    assert counter.get_total_flops() >= 2 * 2 * 10 * 16 * 32  # it does not know all of them
