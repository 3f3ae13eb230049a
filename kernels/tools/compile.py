"""Compile every kernel ahead of time, without a GPU, and tabulate the resources that each will use.

    moelab kernels compile --arch sm_80 --arch sm_90 --out results/kernels/compile.csv

The ops run on meta tensors of the shapes below, and their launches are recorded instead of executed, so that the
compiled configurations are those that a GPU would run. Occupancy is an estimate: the fraction of a multiprocessor's
warps that registers, shared memory and the limit of blocks allow to be resident.
"""

from __future__ import annotations

import contextlib
import csv
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import _common, gating, permute, residual, tuning
from ..activations import ACTIVATIONS
from ..experts import expert_ffn

DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"} | {
    torch.int32: "i32",
    torch.int64: "i64",
}


class Limits(NamedTuple):
    """Describe one multiprocessor (CUDA programming guide, technical specifications per compute capability)."""

    warps: int
    blocks: int
    registers: int
    shared: int
    """Shared memory in bytes; each block takes 1 KiB more than it requests."""


LIMITS = {"sm_80": Limits(64, 32, 65536, 164 << 10), "sm_90": Limits(64, 32, 65536, 228 << 10)}


class Launch(NamedTuple):
    """Describe one kernel as an op would launch it."""

    kernel: Any
    case: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    aligned: tuple[int, ...]
    """Positions of the arguments that are multiples of 16 (which allows 128-bit loads)."""
    num_warps: int
    num_stages: int


class Record(NamedTuple):
    """Hold a row of the table."""

    kernel: str
    case: str
    arch: str
    configuration: str
    num_warps: int
    registers: int
    shared_bytes: int
    spill_bytes: int
    """Local memory per thread; see ``_resources``."""
    blocks_per_sm: int
    occupancy: float


# --- compiled cases --------------------------------------------------------------------------------------------------


def _meta(*shape, dtype=torch.float32, grad=False) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def _gate_case(S, E, K, dtype=torch.float32, noisy=False, **options) -> Callable[[], None]:
    def run():
        choice = _meta(S, E, dtype=dtype) if noisy else None
        logits = _meta(S, E, dtype=dtype, grad=True)
        g = gating.gate(logits, K, choice_logits_SE=choice, backend="triton", **options)
        torch.autograd.backward([g.weight_SK, g.aux_loss, g.z_loss], [_meta(S, K), _meta(), _meta()])

    return run


def _permute_case(S, E, K, M, dtype) -> Callable[[], None]:
    def run():
        i32 = dict(dtype=torch.int32)
        scalar = _meta()
        load, kept = _meta(2, E, **i32)
        g = gating.Gate(_meta(S, K, **i32), _meta(S, K, **i32), _meta(S, K, grad=True), load, kept, scalar, scalar)
        table = permute.row_table(g, backend="triton")
        rows = permute.dispatch(_meta(S, M, dtype=dtype, grad=True), table, backend="triton")
        y = permute.combine(rows, table, g.weight_SK, backend="triton")
        y.backward(torch.empty_like(y))

    return run


def _ffn_case(R, E, M, F, dtype, activation="gelu_tanh", persistent=0) -> Callable[[], None]:
    def run():
        N = 2 * F if ACTIVATIONS[activation].gated else F
        x, w1, b1, w2, b2 = (
            _meta(*shape, dtype=dtype, grad=True) for shape in ((R, M), (E, M, N), (E, N), (E, F, M), (E, M))
        )
        offsets = _meta(E + 1, dtype=torch.int32)
        with tuning.persistent(persistent):
            y = expert_ffn(x, offsets, w1, b1, w2, b2, activation=activation, backend="triton")
            y.backward(torch.empty_like(y))

    return run


def _mix_case(S, M, dtype) -> Callable[[], None]:
    def run():
        shapes = (S, M), (S, M), (S, M), (2, M), (2,)
        y = residual.residual_mix(*(_meta(*s, dtype=dtype, grad=True) for s in shapes), backend="triton")
        y.backward(torch.empty_like(y))

    return run


FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

CASES: dict[str, Callable[[], None]] = {
    "gate S1 E128 K1": _gate_case(1, 128, 1),
    "gate S64 E128 K1 random": _gate_case(64, 128, 1, capacity=4, seed=1),
    "gate S512 E16 K2": _gate_case(512, 16, 2, capacity=64, normalize=True),
    "gate S1024 E8 K2": _gate_case(1024, 8, 2, capacity=128, normalize=True),
    "gate S8192 E128 K1 random": _gate_case(8192, 128, 1, capacity=64, seed=1),
    "gate S8192 E64 K2 noisy": _gate_case(8192, 64, 2, capacity=256, normalize=True, noisy=True),
    "gate S8192 E32 K2 random": _gate_case(8192, 32, 2, capacity=512, seed=1, normalize=True),
    "gate S16384 E128 K8 bf16": _gate_case(16384, 128, 8, BF16, normalize=True),
    "gate S16384 E512 K1": _gate_case(16384, 512, 1, capacity=32),
    "permute S8192 E128 K1 M1024 bf16": _permute_case(8192, 128, 1, 1024, BF16),
    "permute S8192 E32 K2 M2048 fp16": _permute_case(8192, 32, 2, 2048, FP16),
    "permute S4096 E8 K1 M512 fp32": _permute_case(4096, 8, 1, 512, FP32),
    "permute S333 E64 K2 M100 fp32": _permute_case(333, 64, 2, 100, FP32),
    "ffn R8192 E128 M1024 F4096 bf16": _ffn_case(8192, 128, 1024, 4096, BF16),
    "ffn R8192 E32 M1024 F4096 fp16 gelu": _ffn_case(8192, 32, 1024, 4096, FP16, "gelu"),
    "ffn R65536 E128 M2048 F768 bf16": _ffn_case(65536, 128, 2048, 768, BF16),
    "ffn R4096 E128 M1024 F4096 bf16": _ffn_case(4096, 128, 1024, 4096, BF16),
    "ffn R64 E64 M2048 F8192 fp16": _ffn_case(64, 64, 2048, 8192, FP16),
    "ffn R4096 E8 M512 F2048 fp32": _ffn_case(4096, 8, 512, 2048, FP32),
    "ffn R512 E16 M64 F256 fp32": _ffn_case(512, 16, 64, 256, FP32),
    "ffn R600 E5 M100 F401 bf16": _ffn_case(600, 5, 100, 401, BF16, "none"),
    "ffn R65536 E64 M2048 F1024 bf16 swiglu": _ffn_case(65536, 64, 2048, 1024, BF16, "swiglu"),
    "ffn R65536 E128 M2048 F768 bf16 persistent": _ffn_case(65536, 128, 2048, 768, BF16, persistent=1),
    "ffn R64 E64 M2048 F8192 fp16 persistent": _ffn_case(64, 64, 2048, 8192, FP16, persistent=2),
    "ffn R4096 E8 M512 F2048 fp32 persistent": _ffn_case(4096, 8, 512, 2048, FP32, persistent=1),
    "ffn R600 E5 M100 F401 bf16 persistent": _ffn_case(600, 5, 100, 401, BF16, "none", persistent=1),
    "residual S8192 M1024 bf16": _mix_case(8192, 1024, BF16),
    "residual S333 M100 fp32": _mix_case(333, 100, FP32),
}
QUICK = (
    "gate S64 E128 K1 random",
    "gate S8192 E32 K2 random",
    "permute S8192 E128 K1 M1024 bf16",
    "ffn R8192 E128 M1024 F4096 bf16",
    "ffn R65536 E64 M2048 F1024 bf16 swiglu",
    "ffn R65536 E128 M2048 F768 bf16 persistent",
    "residual S8192 M1024 bf16",
)
"""A subset with every kernel, for tests."""


def _launch(kernel, case: str, args: tuple, kwargs: dict) -> Launch:
    """Return one launch with Triton's specialisation: which arguments are constant, which are multiples of 16."""
    options = {name: kwargs.pop(name, default) for name, default in (("num_warps", 4), ("num_stages", 3))}
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, aligned = [], [], []
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize):
            signature.append((parameter.name, "constexpr"))
            constants.append((parameter.name, value))
            continue
        if isinstance(value, torch.Tensor):
            signature.append((parameter.name, "*" + DTYPES[value.dtype]))
            aligned.append(i)  # as the allocator returns them; a less aligned view would be compiled separately
        elif isinstance(value, int):
            signature.append((parameter.name, "i32" if -(2**31) <= value < 2**31 else "i64"))
            if value % 16 == 0 and not parameter.do_not_specialize:
                aligned.append(i)
        else:
            raise TypeError(f"{kernel.__name__}: argument {parameter.name} is a {type(value).__name__}")
    return Launch(kernel, case, tuple(signature), tuple(constants), tuple(aligned), *options.values())


@contextlib.contextmanager
def _recorded(case: str, launches: list[Launch]) -> Iterator[None]:
    """Append the kernels launched within to ``launches`` instead of running them."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def record(self, *args, grid, warmup, **kwargs):
        launches.append(_launch(self, case, args, kwargs))

    JITFunction.run, _common.recording = record, True
    try:
        yield
    finally:
        JITFunction.run, _common.recording = run, False


def launches(cases: tuple[str, ...] | None = None) -> list[Launch]:
    """Return the distinct launches of the cases (all by default), each under the first case that makes it.

    Raises ``ValueError`` where there is no Triton, or it interprets kernels.
    """
    interprets = _common.triton_interprets()
    if interprets is None:
        raise ValueError("compiling kernels needs the triton package, which this platform lacks")
    if interprets:
        raise ValueError("this process interprets Triton kernels; compile in one without TRITON_INTERPRET")
    recorded: list[Launch] = []
    for case in cases or tuple(CASES):
        with _recorded(case, recorded):
            CASES[case]()
    distinct = {(id(f.kernel), *f[2:]): f for f in reversed(recorded)}
    return list(reversed(distinct.values()))


# --- compiling -------------------------------------------------------------------------------------------------------


def _resources(cubin: bytes) -> tuple[int, int]:
    """Return (registers, bytes of local memory) of a compiled kernel's thread, read from the machine code itself.

    The kernels have no local arrays, so that local memory, including the stack, holds spilled registers only.
    """
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        report = subprocess.run(command, capture_output=True, text=True)
    text = report.stdout + report.stderr
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    if usage is None:
        raise RuntimeError(f"cuobjdump told no resources: {text.strip()[-500:]}")
    registers, stack, local = (int(v) for v in usage.groups())
    return registers, stack + local


def machine_code(launch: Launch, arch: str):
    """Return one launch compiled by Triton for ``arch``: its ``asm`` and ``metadata``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        fn=launch.kernel,
        signature=dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={(i,): [["tt.divisibility", 16]] for i in launch.aligned},
    )
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    options = dict(num_warps=launch.num_warps, num_stages=launch.num_stages, enable_fp_fusion=True)
    return triton.compile(source, target=target, options=options)


def compile_launch(launch: Launch, arch: str) -> Record:
    """Compile one launch to machine code for ``arch`` and read its resources back."""
    compiled = machine_code(launch, arch)
    registers, local = _resources(compiled.asm["cubin"])
    warps = compiled.metadata.num_warps
    blocks, occupancy = estimate_occupancy(arch, warps, registers, compiled.metadata.shared)
    shown = [f"{k}={v}" for k, v in launch.constants if isinstance(v, int | str) and k.isupper()]
    pointers = "/".join(dict.fromkeys(t[1:] for _, t in launch.signature if t.startswith("*") and t != "*i32"))
    configuration = " ".join([pointers, *shown, f"stages={launch.num_stages}"])
    return Record(
        launch.kernel.__name__.strip("_"), launch.case, arch, configuration, warps,
        registers, compiled.metadata.shared, local, blocks, round(occupancy, 3),
    )  # fmt: skip


def estimate_occupancy(arch: str, warps: int, registers: int, shared: int) -> tuple[int, float]:
    """Return (blocks per multiprocessor, fraction of its warps in use); warps get registers in units of 256."""
    limit = LIMITS[arch]
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = limit.registers // per_warp // warps if registers else limit.blocks
    by_shared = limit.shared // (shared + 1024)
    blocks = min(limit.blocks, limit.warps // warps, by_registers, by_shared)
    return blocks, blocks * warps / limit.warps


def compile_all(
    archs: tuple[str, ...] = ("sm_80", "sm_90"),
    cases: tuple[str, ...] | None = None,
    report: Callable[[Record], None] = lambda record: None,
) -> list[Record]:
    """Compile the launches of the cases for every architecture, calling ``report`` after each.

    Raises ``ValueError`` for an architecture without known limits, ``RuntimeError`` where Triton cannot compile.
    """
    for arch in archs:
        if arch not in LIMITS:
            raise ValueError(f"no limits known for {arch!r}; know {', '.join(LIMITS)}")
    records = []
    for launch in launches(cases):
        for arch in archs:
            records.append(compile_launch(launch, arch))
            report(records[-1])
    return records


def write_csv(records: list[Record], path: Path) -> None:
    """Write the table, sorted, so that the files of two runs differ only where a kernel differs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Record._fields)
        writer.writerows(sorted(records))
    part.replace(path)


def main(archs: tuple[str, ...], out: Path | None) -> bool:
    """Print one line per kernel and write the table if asked; return whether none spills."""

    def show(r: Record) -> None:
        print(
            f"{r.arch} {r.kernel:22s} {r.registers:4d} regs {r.shared_bytes:7d} B shared {r.spill_bytes:4d} B spilled "
            f"{r.occupancy:4.0%} occupancy  {r.case}: {r.configuration}",
            flush=True,
        )

    records = compile_all(archs, report=show)
    if out:
        write_csv(records, out)
    spilling = sum(r.spill_bytes > 0 for r in records)
    print(f"{len(records)} kernels compiled, {spilling} with spills")
    return not spilling
