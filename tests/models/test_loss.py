import pytest
import torch
import torch.nn.functional as F
from moelab.kernels import _cpp
from moelab.kernels.head import SoftTargets

from moelab.models import loss
from moelab.models.loss import linear_losses


def linear_cross_entropy(*arguments):
    return linear_losses(*arguments)[0]


def plain(x, w, targets, reduction="mean"):
    return F.cross_entropy(F.linear(x, w).to(torch.promote_types(x.dtype, torch.float32)), targets, reduction=reduction)


def outcome(function, x, w, targets, *rest):
    """Loss and both gradients, the loss doubled on its way."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    value = function(x, w, targets, *rest)
    (2 * value).backward()
    return value.detach(), x.grad, w.grad


def case(N, M, V, scale=1.0, dtype=torch.float32):
    g = torch.Generator().manual_seed(N * V)
    x = torch.randn(N, M, generator=g, dtype=dtype)
    return x, torch.randn(V, M, generator=g, dtype=dtype) * scale, torch.randint(V, (N,), generator=g)


@pytest.mark.parametrize("rows", [1, 5, 8, 1000])  # in a chunk: one, not a divisor, a divisor, more than there are
@pytest.mark.parametrize(("N", "M", "V"), [(7, 13, 67), (64, 32, 128), (1, 3, 2), (0, 4, 9)])
def test_loss_and_gradients_are_those_of_the_plain_function(N, M, V, rows, monkeypatch):
    monkeypatch.setitem(loss._CHUNK, "cpu", rows * V)
    arguments = case(N, M, V, dtype=torch.float64)
    each = linear_cross_entropy(*arguments, "none")
    torch.testing.assert_close(each, plain(*arguments, "none"), rtol=1e-12, atol=1e-14)
    if not N:
        return  # the mean of no tokens is not a number
    for ours, theirs in zip(outcome(linear_cross_entropy, *arguments), outcome(plain, *arguments), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("t", [1.0, 2.5])
@pytest.mark.parametrize("rows", [1, 5, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_soft_targets_add_their_divergence_with_its_gradient(rows, dtype, t, monkeypatch):
    """In PyTorch's form; each token has a teacher of its own, so that a chunk that asks for the wrong tokens is found."""
    N, V = 64, 128
    monkeypatch.setitem(loss._CHUNK, "cpu", rows * V * loss._WITH_SOFT_TARGETS)
    x, w, targets = case(N, 32, V, dtype=torch.float64)
    teacher = 3 * torch.randn(N, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def whole(x, w, targets):
        p, log_q = F.softmax(teacher / t, -1), F.log_softmax(x @ w.T / t, -1)
        return plain(x, w, targets) + 0.7 * F.kl_div(log_q, p, reduction="sum") / N

    def ours(x, w, targets):
        soft = SoftTargets(teacher.to(dtype), t, 0.7)
        with _cpp.limited("none"):
            total, more = linear_losses(x.to(dtype), w.to(dtype), targets, soft=soft)
            assert not more.requires_grad
            plain_part = linear_cross_entropy(x.to(dtype), w.to(dtype), targets)
        torch.testing.assert_close(total - more, plain_part.to(more.dtype), rtol=0.02, atol=0.02)
        return total

    error = 1e-12 if dtype == torch.float64 else 0.05
    for a, b in zip(outcome(ours, x, w, targets), outcome(whole, x, w, targets), strict=True):
        assert (a - b).abs().max() <= error * b.abs().max()


@pytest.mark.parametrize("t", [1.0, 2.5])
def test_divergence_and_its_gradient_are_those_of_the_plain_function(t):
    torch.manual_seed(0)
    teacher, student = torch.randn(6, 11) * 2, torch.randn(6, 11).requires_grad_()
    given = student.clone()
    p, q = F.softmax(teacher / t, -1), F.softmax(student / t, -1)
    exact = (p * (p / q).log()).sum()
    (expected,) = torch.autograd.grad(exact, student)
    with torch.no_grad():
        found, gradient = loss.divergence(teacher, student, t)
        same, nothing = loss.divergence(teacher, teacher, t)
    assert float(found) == pytest.approx(float(exact.detach()), rel=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(student, given), "the logits are not changed"
    assert float(same) == pytest.approx(0.0, abs=1e-6) and float(nothing.abs().max()) < 1e-6


def test_fp32_is_as_exact_as_the_plain_function():
    excluded = torch.tensor([[200.0], [-1.0]]), torch.tensor([[1.0], [-1.0], [0.0]]), torch.tensor([1, 0])
    for x, w, targets in (case(600, 32, 1000), excluded):  # e^-400 is the probability of the first of the latter
        exact = outcome(plain, x.double(), w.double(), targets)
        for ours, theirs, truth in zip(
            outcome(linear_cross_entropy, x, w, targets), outcome(plain, x, w, targets), exact, strict=True
        ):
            assert (ours - truth).norm() <= 2 * (theirs - truth).norm() + 1e-7 * truth.norm()


@pytest.mark.parametrize("rows", [16, 100])
def test_bf16_autocast_is_as_exact_as_the_plain_function(rows, monkeypatch):
    monkeypatch.setitem(loss._CHUNK, "cpu", rows * 67)
    x, w, targets = case(333, 13, 67)
    exact = outcome(plain, x.double(), w.double(), targets)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = outcome(linear_cross_entropy, x, w, targets), outcome(plain, x, w, targets)
    assert [t.dtype for t in ours] == [torch.float32] * 3
    assert ours[0] == pytest.approx(theirs[0].item(), rel=1e-6), "the loss is fp32 in both"
    for a, b, truth in zip(ours[1:], theirs[1:], exact[1:], strict=True):
        assert (a - truth).norm() <= 1.1 * (b - truth).norm()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_so(bad):
    x, w, targets = case(9, 4, 11)
    x[3, 2] = bad
    assert not torch.isfinite(linear_cross_entropy(x, w, targets))


def test_no_gradient_is_computed_that_nobody_wants():
    x, w, targets = case(50, 8, 30)
    for wanted in [(True, False), (False, True)]:
        a, b = x.clone().requires_grad_(wanted[0]), w.clone().requires_grad_(wanted[1])
        linear_cross_entropy(a, b, targets).backward()
        assert (a.grad is not None, b.grad is not None) == wanted
    with torch.no_grad():
        value = linear_cross_entropy(x.requires_grad_(), w.requires_grad_(), targets)
    assert not value.requires_grad and value == pytest.approx(plain(x, w, targets).item(), rel=1e-6)


def test_the_logits_are_never_held(monkeypatch):
    """No tensor of the forward and backward passes has as many elements as the logits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                if isinstance(t, torch.Tensor):
                    self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
            return out

    monkeypatch.setitem(loss._CHUNK, "cpu", 8 * 128)
    x, w, targets = case(256, 16, 128)
    for dtype, most in ((torch.float32, 256 * 16), (torch.bfloat16, 4 * 8 * 128)):
        with Largest() as largest, torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            outcome(linear_cross_entropy, x, w, targets)
        assert largest.elements <= most < 256 * 128


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (lambda x, w, t: linear_cross_entropy(x, w, t[:3]), r"\[3|\(3,\)"),
        (lambda x, w, t: linear_cross_entropy(x, w, t, "sum"), "'mean' or 'none'"),
        (lambda x, w, t: linear_losses(x, w, t, "none", SoftTargets(x @ w.T)), "^linear_losses: soft targets have no"),
        (
            lambda x, w, t: linear_losses(x, w, t, soft=SoftTargets(x)),
            r"the teacher's logits must be \[4, 5\], got \(4, 2",
        ),
    ],
)
def test_bad_input_is_one_line(call, part):
    with pytest.raises(ValueError, match=part) as error:
        call(*case(4, 2, 5))
    assert "\n" not in str(error.value)
