"""Check somebody's MoE layer: balance, drops, gradients under accumulation and recomputation, determinism.

checks = conform(load("my_package.moe:MyLayer"))
ours = conform(reference)

The callable is called as ``make(hidden, experts, top_k)`` and returns a module. The module takes x [B, T, M], fp32,
and returns y of that shape, alone or followed by what it says of its routing: an object or a mapping with some of
``expert_SK`` (the chosen experts of each token), ``slot_SK`` (negative where a choice was dropped) and ``aux_loss`` (a
scalar). What it does not say is not checked, and the table names it. `reference` is this project's own layer in that
form.
"""

from __future__ import annotations

import copy
import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moelab.config import ModelConfig, RoutingConfig
from moelab.models import build
from moelab.terminal import one_line

Make = Callable[[int, int, int], nn.Module]

B, T = 4, 32
TOLERANCE = 1e-4
"""Relative difference of gradients or outputs that must agree up to the order of sums."""
SLOPE_TOLERANCE = 0.02
"""Relative difference of a gradient to finite differences in fp32."""
STEPS = 60
"""Steps that the balancing loss alone is trained."""


@dataclass(frozen=True)
class Check:
    """Hold the result of one check.

    Attributes:
        name: what was checked.
        passed: None where the layer does not say what the check needs, or does not do what it is about.
        found: what was found, one line.
    """

    name: str
    passed: bool | None
    found: str


class _Output(NamedTuple):
    y: Tensor
    expert_SK: Tensor | None
    slot_SK: Tensor | None
    aux_loss: Tensor | None

    @property
    def drops(self) -> bool:
        return self.slot_SK is not None and bool((self.slot_SK < 0).any())


def load(path: str) -> Make:
    """Return the callable that ``module:name`` names; imports the module, which executes it.

    The current folder is searched first.

    Raises:
        ValueError: one line: no such form, module or name, or the import fails.
    """
    module, separator, name = path.partition(":")
    if not (module and separator and name):
        raise ValueError(f"conform: {path!r}: expected module:callable, such as my_package.moe:MyLayer")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:
        raise ValueError(f"conform: {path}: {type(error).__name__}: {one_line(error)}") from None
    if not callable(found):
        raise ValueError(f"conform: {path} is no callable, but {type(found).__name__}")
    return found


def reference(hidden: int, experts: int, top_k: int) -> nn.Module:
    """Return this project's layer, drop-free, with weights drawn from torch's generator."""
    config = ModelConfig(
        layers=1, hidden=hidden, heads=1, experts=(experts,), top_k=top_k, vocab=16, context=16, init_std=0.2,
        routing=RoutingConfig(drop_tokens=False),
    )  # fmt: skip
    return build(config, int(torch.randint(2**31, ()))).blocks[0].ffn


def conform(make: Make, hidden: int = 32, experts: int = 8, top_k: int = 2) -> list[Check]:
    """Check a layer on a CPU in fp32, on made-up tokens; takes seconds.

    A check that raises has failed; its line is what was raised.
    """
    checks: dict[str, Callable[[_Case], Check]] = {
        "output and choices": _output,
        "balancing loss": _balance,
        "drops": _drops,
        "gradients": _gradients,
        "accumulation": _accumulation,
        "recomputation": _recomputation,
        "determinism": _determinism,
    }
    found = []
    for name, check in checks.items():
        try:
            with torch.random.fork_rng(devices=[]):
                found.append(check(_Case(name, make, hidden, experts, top_k)))
        except Exception as error:
            found.append(Check(name, False, f"{type(error).__name__}: {one_line(error)}"))
    return found


@dataclass(frozen=True)
class _Case:
    """Hold one check's name, the layer's maker and sizes."""

    name: str
    make: Make
    hidden: int
    experts: int
    top_k: int

    def layer(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.make(self.hidden, self.experts, self.top_k).train()

    def tokens(self, skew: float = 0.0) -> Tensor:
        """Return tokens [B, T, M] that lean towards one direction by `skew`, so that their choices are uneven."""
        draw = torch.Generator().manual_seed(1)
        x_BTM = torch.randn(B, T, self.hidden, generator=draw)
        return x_BTM + skew * torch.randn(self.hidden, generator=draw)

    def result(self, passed: bool | None, found: str) -> Check:
        return Check(self.name, passed, found)


def _call(layer: nn.Module, x_BTM: Tensor, seed: int = 2) -> _Output:
    """Return the layer's output; noise is drawn from the same seed in each call."""
    torch.manual_seed(seed)
    returned = layer(x_BTM)
    y, *more = returned if isinstance(returned, tuple) else (returned,)
    about = more[0] if more else None

    def said(name: str) -> Any:
        return about.get(name) if isinstance(about, Mapping) else getattr(about, name, None)

    return _Output(y, said("expert_SK"), said("slot_SK"), said("aux_loss"))


def _output(case: _Case) -> Check:
    """Check shape, dtype and values of the output, and that choices are K different experts."""
    x = case.tokens()
    out = _call(case.layer(), x)
    if out.y.shape != x.shape or out.y.dtype != x.dtype or not out.y.isfinite().all():
        return case.result(False, f"output {tuple(out.y.shape)} {out.y.dtype}, expected finite {tuple(x.shape)}")
    if out.expert_SK is None:
        return case.result(True, "shape and values right; choices are not reported")
    chosen = out.expert_SK.reshape(B * T, -1).long()
    twice = (chosen.sort(1).values.diff(dim=1) == 0).any() if chosen.shape[1] > 1 else False
    if chosen.shape[1] != case.top_k or chosen.min() < 0 or chosen.max() >= case.experts or twice:
        return case.result(False, f"choices are not {case.top_k} different experts of {case.experts} for each token")
    return case.result(True, f"{case.top_k} different experts of {case.experts} for each token")


def _balance(case: _Case) -> Check:
    """Check that training the balancing loss alone makes the load of skewed tokens more even."""
    layer, x = case.layer(), case.tokens(skew=1.0)
    out = _call(layer, x)
    if out.aux_loss is None or out.expert_SK is None:
        return case.result(None, "no balancing loss or no choices reported")
    before = _busiest(out.expert_SK, case.experts)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for _ in range(STEPS):
        optimizer.zero_grad()
        aux_loss = _call(layer, x).aux_loss
        assert aux_loss is not None
        aux_loss.backward()
        optimizer.step()
    expert_SK = _call(layer, x).expert_SK
    assert expert_SK is not None
    after = _busiest(expert_SK, case.experts)
    return case.result(after < before, f"busiest expert {before:.2f} times an even share, {after:.2f} when trained")


def _busiest(expert_SK: Tensor, experts: int) -> float:
    load_E = torch.bincount(expert_SK.flatten().long(), minlength=experts)
    return float(load_E.max() * experts / load_E.sum())


def _drops(case: _Case) -> Check:
    """Check that dropped choices are those beyond one capacity, and that a layer without drops hides none.

    Without drops, a token's output does not depend on the other tokens.
    """
    layer, x = case.layer(), case.tokens(skew=1.0)
    out = _call(layer, x)
    if out.drops and out.expert_SK is not None and out.slot_SK is not None:
        flat, kept = out.expert_SK.flatten().long(), (out.slot_SK >= 0).flatten()
        load_E = torch.bincount(flat, minlength=case.experts)
        kept_E = torch.bincount(flat[kept], minlength=case.experts)
        expected_E = load_E.clamp(max=int(kept_E.max()))
        good = torch.equal(kept_E, expected_E)
        said = f"{int((~kept).sum())} of {len(flat)} choices dropped at capacity {int(kept_E.max())}"
        return case.result(good, said if good else f"{said}; some experts drop below it")
    with torch.no_grad():
        alone = torch.stack([_call(layer, x[i : i + 1, : T // 2]).y[0] for i in range(B)])
        apart = _apart(alone, out.y[:, : T // 2])
    if apart > TOLERANCE:
        return case.result(False, f"none reported, but outputs depend on the other tokens (relative {apart:.1e})")
    return case.result(True, "none: a token's output does not depend on the other tokens")


def _backward(layer: nn.Module, x: Tensor, weight: Tensor, call: Callable[..., _Output] = _call) -> list[Tensor]:
    """Add the gradients of the weighted sum of outputs; return those of all parameters."""
    (call(layer, x).y * weight).sum().backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in _trained(layer)]


def _trained(layer: nn.Module) -> list[nn.Parameter]:
    return [p for p in layer.parameters() if p.requires_grad]


def _weight(case: _Case) -> Tensor:
    return torch.randn(B, T, case.hidden, generator=torch.Generator().manual_seed(3))


def _apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm().clamp(min=1e-12))


def _worst(found: list[Tensor], expected: list[Tensor]) -> float:
    return max((_apart(a, b) for a, b in zip(found, expected, strict=True) if b.any() or a.any()), default=0.0)


def _gradients(case: _Case) -> Check:
    """Check that parameters get gradients, and the input's gradient against finite differences along directions."""
    layer, x, weight = case.layer(), case.tokens().requires_grad_(), _weight(case)
    out = _call(layer, x)
    (out.y * weight).sum().backward()
    without = [name for name, p in layer.named_parameters() if p.requires_grad and p.grad is None]
    if without or x.grad is None or not x.grad.isfinite().all():
        return case.result(False, f"no gradient reaches {', '.join(without) or 'the input'}")
    errors = []
    for seed in range(5):
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(10 + seed))
        step = 1e-3
        with torch.no_grad():
            up, down = (_call(layer, x + sign * step * direction) for sign in (1, -1))
            slopes_BT = ((up.y - down.y) * weight).sum(-1).double() / (2 * step)
        same_BT = torch.ones(B, T, dtype=torch.bool)
        for moved in (up, down):
            if moved.expert_SK is not None and out.expert_SK is not None:  # a token that goes elsewhere has a jump
                same_BT &= (moved.expert_SK == out.expert_SK).reshape(B, T, -1).all(-1)
        expected_BT = (x.grad * direction).sum(-1).double()
        errors.append(_apart(slopes_BT[same_BT], expected_BT[same_BT]))
    error = sorted(errors)[2]
    return case.result(error < SLOPE_TOLERANCE, f"input's gradient within {error:.1e} of finite differences")


def _accumulation(case: _Case) -> Check:
    """Check that the gradients of two halves of a batch add up to those of the whole."""
    x, weight = case.tokens(), _weight(case)
    if _call(case.layer(), x).drops:
        return case.result(None, "drops depend on the batch, so halves differ from the whole")
    whole, halves = case.layer(), case.layer()
    expected = _backward(whole, x, weight)
    for part in (slice(0, B // 2), slice(B // 2, B)):
        found = _backward(halves, x[part], weight[part])
    apart = _worst(found, expected)
    return case.result(apart < TOLERANCE, f"two halves add up to the whole within {apart:.1e}")


def _recomputation(case: _Case) -> Check:
    """Check that a recomputed forward pass gives the same gradients, and counts nothing twice in buffers."""
    x, weight = case.tokens().requires_grad_(), _weight(case)
    plain = case.layer()
    again = copy.deepcopy(plain)

    def recomputed(layer: nn.Module, x: Tensor) -> _Output:
        torch.manual_seed(2)
        returned = checkpoint(layer, x, use_reentrant=False)
        return _Output(returned[0] if isinstance(returned, tuple) else returned, None, None, None)

    apart = _worst(_backward(again, x, weight, recomputed), _backward(plain, x, weight))
    pairs = zip(again.named_buffers(), plain.buffers(), strict=True)
    if twice := [name for (name, a), b in pairs if not torch.equal(a, b)]:
        return case.result(False, f"{', '.join(twice)} changes with the recomputed pass, too")
    return case.result(apart < TOLERANCE, f"the same gradients within {apart:.1e}, no buffer counted twice")


def _determinism(case: _Case) -> Check:
    """Check that equal seeds and inputs give the same bits of outputs and gradients, in training and evaluation."""
    x, weight = case.tokens(), _weight(case)
    runs = []
    for _ in range(2):
        layer = case.layer()
        gradients = _backward(layer, x, weight)
        with torch.no_grad():
            runs.append([*gradients, _call(layer, x).y, _call(layer.eval(), x).y])
    if all(torch.equal(a, b) for a, b in zip(*runs, strict=True)):
        return case.result(True, "the same bits twice")
    return case.result(False, "outputs or gradients differ between two equal calls")
