"""Compare every kernel with its PyTorch reference on the device: outputs and gradients, odd sizes, empty experts.

The references run on the same device. Then a model against the same model on the CPU, decoding from a CUDA graph
against decoding without one, and a collective of one rank. The full tests are in tests/kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from moelab.acceptance.cases import Case, Context, Numbers
from moelab.config import ModelConfig, RoutingConfig
from moelab.inference.generate import Generator
from moelab.inference.modes import set_mode
from moelab.inference.sampling import Sampling
from moelab.kernels import ACTIVATIONS, combine, dispatch, expert_ffn, gate, residual_mix, row_table, tuning
from moelab.models.gpt import build

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {"fp32": 5e-5, "bf16": 3e-2, "fp16": 4e-3}
"""Largest difference, relative to the greatest value of a tensor, or to 1."""


class Mismatch(AssertionError):
    """Results differ; the message says where and by how much."""


def compare(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> Numbers:
    """Return the worst relative difference of tensors by name; integers must be equal.

    Raises:
        Mismatch: names the first tensor that differs, how many values do, the worst of them and its place.
    """
    worst = 0.0
    for name, b in want.items():
        a = got[name]
        if a.shape != b.shape or a.dtype != b.dtype:
            raise Mismatch(f"{name}: {a.dtype} {tuple(a.shape)}, not {b.dtype} {tuple(b.shape)}")
        if not b.numel():
            continue
        exact = not b.is_floating_point()
        wide_a, wide_b = (a.long(), b.long()) if exact else (a.float(), b.float())
        scale = max(1.0, float(wide_b.abs().max()) if exact else float(wide_b.nan_to_num().abs().max()))
        error = (wide_a - wide_b).abs() / scale
        error = error.masked_fill_(wide_a.isnan() & wide_b.isnan(), 0.0).nan_to_num_(nan=torch.inf)
        allowed = 0.0 if exact else tolerance
        if (count := int((error > allowed).sum())) > 0:
            at = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
            raise Mismatch(
                f"{name}: {count} of {b.numel()} values differ, worst at {at}: {wide_a[at]:.6g}, not {wide_b[at]:.6g} "
                f"(allowed: {allowed:g} of {scale:.3g})"
            )
        worst = max(worst, float(error.max()))
    return {"worst_error": worst, "tolerance": tolerance, "finding": f"equal, worst difference {worst:.1e}"}


# Sizes: gate (S, E, K, dtype, options), permute (S, E, K, M, dtype), ffn (rows of the experts, spare rows, M, F, dtype,
# activation), mix (S, M, dtype, learned). Most valuable first: those that decide whether a model works, then odd ones.
GATES = [
    (8192, 128, 1, "fp32", {"capacity": 64, "seed": 1}),
    (1, 128, 1, "fp32", {}),
    (64, 128, 1, "fp32", {"capacity": 4, "seed": 1}),
    (16384, 128, 8, "bf16", {"normalize": True}),
    (67, 7, 2, "fp32", {"capacity": 5, "seed": 3, "normalize": True}),
    (333, 16, 1, "fp32", {"capacity": 40, "one": True}),
    (8192, 64, 2, "fp32", {"capacity": 256, "normalize": True}),
    (16384, 512, 1, "fp32", {"capacity": 32}),
    (512, 16, 2, "fp16", {"capacity": 64, "seed": 5}),
]
PERMUTES = [
    (8192, 128, 1, 1024, "bf16"),
    (67, 7, 2, 13, "fp32"),
    (8192, 32, 2, 2048, "fp16"),
    (333, 64, 2, 100, "fp32"),
]
EXPERTS = [
    ([64] * 128, 0, 1024, 4096, "bf16", "gelu_tanh"),
    ([0, 67, 0, 1], 0, 67, 33, "fp32", "gelu"),
    ([0, 0, 700, 0], 5, 128, 256, "bf16", "gelu_tanh"),
    ([1] * 8 + [0] * 56, 0, 2048, 8192, "bf16", "gelu_tanh"),
    ([512] * 128, 0, 2048, 768, "bf16", "gelu_tanh"),
    ([3, 0, 4], 2, 13, 7, "fp32", "none"),
    ([5, 9, 31, 17], 0, 64, 48, "fp16", "gelu"),
    ([512] * 8, 0, 512, 2048, "fp32", "gelu_tanh"),
    ([120] * 5, 0, 100, 401, "bf16", "none"),
    ([512] * 64, 0, 2048, 1024, "bf16", "swiglu"),
]
PERSISTENT = [  # with the programs for each multiprocessor
    ([512] * 128, 0, 2048, 768, "bf16", "gelu_tanh", 1),
    ([0, 67, 0, 1], 3, 67, 33, "fp32", "gelu", 2),
    ([0, 0, 700, 0], 5, 128, 256, "bf16", "swiglu", 1),
    ([1] * 8 + [0] * 56, 0, 2048, 8192, "bf16", "gelu_tanh", 4),
]
MIXES = [(8192, 1024, "bf16", True), (333, 100, "fp32", True), (8192, 2048, "fp16", False)]
TINY = {
    "gate": [(7, 5, 2, "fp32", {"capacity": 2, "seed": 1, "normalize": True}), (600, 5, 1, "fp32", {"one": True})],
    "permute": [(7, 5, 2, 13, "fp32")],
    "ffn": [([3, 0, 4], 2, 13, 7, "fp32", "gelu_tanh")],
    "persistent ffn": [([3, 0, 9], 2, 13, 7, "fp32", "swiglu", 1)],
    "mix": [(7, 13, "bf16", True)],
}
FULL = {"gate": GATES, "permute": PERMUTES, "ffn": EXPERTS, "persistent ffn": PERSISTENT, "mix": MIXES}


def cases(context: Context) -> Iterator[Case]:
    """Yield the checks: the first of each op, then a model, then the other sizes."""
    sizes = TINY if context.tiny else FULL
    checks = {"gate": _gate, "permute": _permute, "ffn": _experts, "persistent ffn": _persistent, "mix": _mix}

    def of(op: str, given: Sequence) -> Case:
        return Case(f"{op} {_named(op, given)}", lambda: checks[op](*given, device=context.device))

    for op, all_sizes in sizes.items():
        yield of(op, all_sizes[0])
    yield Case("model, PR-MoE, fp32: as on the CPU", lambda: _model(context.device))
    yield Case("decoding from a CUDA graph: as without", lambda: _graph(context.device))
    yield Case("all-to-all of one rank", lambda: _collective(context.device))
    for op, all_sizes in sizes.items():
        for given in all_sizes[1:]:
            yield of(op, given)


def _named(op: str, given: Sequence) -> str:
    if op.endswith("ffn"):
        counts, spare, M, F, dtype, activation, *programs = given
        shape = f"E{len(counts)} rows {min(counts)} to {max(counts)} + {spare}, M{M} F{F} {dtype} {activation}"
        return shape + "".join(f", programs per multiprocessor: {n}" for n in programs)
    if op == "gate":
        S, E, K, dtype, options = given
        return " ".join([f"S{S} E{E} K{K} {dtype}", *(f"{k}={v}" for k, v in options.items())])
    if op == "permute":
        return "S{} E{} K{} M{} {}".format(*given)
    S, M, dtype, learned = given
    return f"S{S} M{M} {dtype} {'learned' if learned else 'given'}"


def _both(run: Callable[[str], dict[str, Tensor]], dtype: str) -> Numbers:
    """Compare what `run` returns with the kernels and with the reference."""
    return compare(run("triton"), run("reference"), TOLERANCE[dtype])


def _gate(S: int, E: int, K: int, dtype: str, options: dict, *, device: str) -> Numbers:
    torch.manual_seed(0)
    logits = torch.randn(S, E).to(device, DTYPES[dtype])
    options = dict(options)
    if options.pop("one", False):  # all tokens to one expert
        logits[:, E // 2] = 20.0
    d_weight = torch.randn(S, K).to(device)

    def run(backend: str) -> dict[str, Tensor]:
        leaf = logits.clone().requires_grad_()
        g = gate(leaf, K, backend=backend, **options)
        torch.autograd.backward([g.weight_SK, g.aux_loss, g.z_loss], [d_weight, *torch.ones(2, device=device)])
        names = ("expert_SK", "slot_SK", "weight_SK", "load_E", "kept_E", "aux_loss", "z_loss")
        return {name: getattr(g, name).detach() for name in names} | {"d_logits": leaf.grad}

    return _both(run, dtype)


def _permute(S: int, E: int, K: int, M: int, dtype: str, *, device: str) -> Numbers:
    torch.manual_seed(0)
    x, dy = (torch.randn(S, M).to(device, DTYPES[dtype]) for _ in range(2))
    g = gate(torch.randn(S, E).to(device), K, max(1, S * K // E), backend="reference")  # some are dropped
    rows = S * K

    def run(backend: str) -> dict[str, Tensor]:
        leaf, weight = x.clone().requires_grad_(), g.weight_SK.detach().clone().requires_grad_()
        table = row_table(g, rows=rows, backend=backend)
        rows_RM = dispatch(leaf, table, backend=backend)
        y = combine(rows_RM, table, weight, backend=backend)
        y.backward(dy)
        found = {"rows": rows_RM.detach(), "y": y.detach(), "dx": leaf.grad, "d_weight": weight.grad}
        return {"row_SK": table.row_SK, "entry_R": table.entry_R, "offsets": table.offsets_E1, **found}

    return _both(run, dtype)


def _experts(counts: list[int], spare: int, M: int, F: int, dtype: str, activation: str, *, device: str) -> Numbers:
    torch.manual_seed(0)
    E, R = len(counts), sum(counts) + spare
    wide = 2 * F if ACTIVATIONS[activation].gated else F
    shapes = {"x": (R, M), "w1": (E, M, wide), "b1": (E, wide), "w2": (E, F, M), "b2": (E, M)}
    scale = {"w1": M**-0.5, "w2": F**-0.5}
    with torch.device(device):
        given = {name: (torch.randn(s) * scale.get(name, 1.0)).to(DTYPES[dtype]) for name, s in shapes.items()}
        dy = torch.randn(R, M).to(DTYPES[dtype])
        offsets = torch.tensor([0, *torch.tensor(counts, device="cpu").cumsum(0).tolist()], dtype=torch.int32)

    def run(backend: str) -> dict[str, Tensor]:
        x, w1, b1, w2, b2 = leaves = [t.clone().requires_grad_() for t in given.values()]
        y = expert_ffn(x, offsets, w1, b1, w2, b2, activation=activation, backend=backend)
        y.backward(dy)
        return {"y": y.detach()} | {f"d_{name}": t.grad for name, t in zip(given, leaves, strict=True)}

    return _both(run, dtype)


def _persistent(*given, device: str) -> Numbers:
    *shape, programs = given
    with tuning.persistent(programs):
        return _experts(*shape, device=device)


def _mix(S: int, M: int, dtype: str, learned: bool, *, device: str) -> Numbers:
    torch.manual_seed(0)
    kind = DTYPES[dtype]
    given = {"moe": torch.randn(S, M), "mlp": torch.randn(S, M)}
    if learned:
        given |= {"x": torch.randn(S, M), "w": torch.randn(2, M) * M**-0.5, "b": torch.randn(2)}
    else:
        given |= {"a": torch.rand(S, 2)}
    given = {name: t.to(device, torch.float32 if name == "a" else kind) for name, t in given.items()}
    dy = torch.randn(S, M).to(device, kind)

    def run(backend: str) -> dict[str, Tensor]:
        leaves = {name: t.clone().requires_grad_() for name, t in given.items()}
        rest = [leaves[name] for name in given if name != "a"]
        y = residual_mix(*rest, coefficient_S2=leaves.get("a"), backend=backend)
        y.backward(dy)
        return {"y": y.detach()} | {f"d_{name}": t.grad for name, t in leaves.items()}

    return _both(run, dtype)


def _small(**changes: object) -> ModelConfig:
    """Return a small PR-MoE."""
    config = ModelConfig(
        4, 64, 2, experts=(0, 4, 0, 8), residual=True, vocab=320, context=64, init_std=0.1,
        routing=RoutingConfig(drop_tokens=False),
    )  # fmt: skip
    return replace(config, **changes)


def _model(device: str) -> Numbers:
    config, found = _small(), []
    tokens = torch.randint(config.vocab, (3, 33), generator=torch.Generator().manual_seed(0))
    for where in (device, "cpu"):
        model = build(config, 0, where).train()
        output = model(tokens[:, :-1].to(where), targets_BT=tokens[:, 1:].to(where))
        (output.loss + output.routing_loss()).backward()
        grads = {f"d {name}": p.grad.cpu() for name, p in model.named_parameters()}
        found.append({"loss": output.loss.detach().cpu(), **grads})
    return compare(*found, 2e-4)


def _graph(device: str) -> Numbers:
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(320, (n,), generator=generator).tolist() for n in (7, 1, 19)]
    sampling, tokens, graphs = Sampling(max_new_tokens=16, temperature=0), {}, {}
    for mode in ("optimised", "baseline"):
        for static in (True, False):
            made = Generator(set_mode(build(_small(init_std=0.3), 0, device), mode), batch=2, static=static)
            tokens[mode, static] = [done.tokens for done in made.generate(prompts, sampling)]
            graphs[mode, static] = made._step is not None and made._step.graph is not None
        if tokens[mode, True] != tokens[mode, False]:
            raise Mismatch(f"{mode}: tokens {tokens[mode, True]} from static steps, {tokens[mode, False]} without")
    captured = [mode for (mode, static), graph in graphs.items() if static and graph]
    if device == "cuda" and len(captured) < 2:
        raise Mismatch(f"only {captured or 'nothing'} was captured in a graph")
    return {"captured": captured, "finding": "equal tokens in both modes"}


def _collective(device: str) -> Numbers:
    backend = "nccl" if device == "cuda" else "gloo"
    began = not dist.is_initialized()
    if began:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        x = torch.arange(12.0, device=device)
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x)
        dist.all_reduce(x)
    finally:
        if began:
            dist.destroy_process_group()
    return {"backend": backend, **compare({"out": out}, {"out": torch.arange(12.0, device=device)}, 0.0)}
