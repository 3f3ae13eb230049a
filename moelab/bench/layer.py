"""`moelab bench layer`: one MoE layer, forward and backward, against the dense layer of equal active FLOPs.

Top-1 (or K); S tokens through experts M -> F -> M with GELU; gradients to input, gate and weights, freed at the end of
each step as a training loop does. Every round has new tokens and so new routing (`moelab.bench.inputs.HiddenStates`),
the same for all candidates, whose gates have equal weights. Candidates: ours at capacity factor 1.0 (random token
selection; as the paper trains) and drop-free; a loop over experts and
`torch.nn.functional.grouped_mm`, both as plain PyTorch, drop-free; the baseline with masks and einsum at capacity
factor 1.0; and, where installed, DeepSpeed's layer and transformers' expert functions. What does not run on this
device or at this size is left out, ours excepted. At capacity factor 1.0 dropped tokens cost nothing: the share that is
kept stands in the rows.

moelab's own candidates and plain PyTorch multiply by the library that training uses (`fastest_products`), others by the
one that their users have.

Floor of each candidate: the FLOPs of the tokens that it keeps, at the measured rate of a large product or that of the
dense layer's fastest round, if this is higher, or the weights of the experts that have tokens, read twice, and their
gradient, written once, at the copy rate; whichever takes longer.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moelab import terminal
from moelab.bench import harness, inputs, peers
from moelab.bench.gate import slots
from moelab.bench.harness import Row, Timing
from moelab.config import FeedForward
from moelab.engine.launch import process
from moelab.inference.text import DTYPES
from moelab.kernels import combine, dispatch, expert_ffn, gate, row_table
from moelab.models import baseline
from moelab.models.products import fastest_products
from moelab.plotting import benchmarks

Output = tuple[Tensor, Tensor | None]
"""y_SM and the load-balancing loss, if there is one."""


class Weights(nn.Module):
    """The parameters that our candidates share: a gate and E experts."""

    def __init__(self, hidden: int, ffn: int, gate_EM: Tensor) -> None:
        super().__init__()
        E = len(gate_EM)
        self.gate = nn.Parameter(gate_EM.clone())
        with gate_EM.device:
            up, down = torch.randn(E, hidden, ffn) * hidden**-0.5, torch.randn(E, ffn, hidden) * ffn**-0.5
            self.w1, self.b1 = nn.Parameter(up), nn.Parameter(torch.zeros(E, ffn))
            self.w2, self.b2 = nn.Parameter(down), nn.Parameter(torch.zeros(E, hidden))

    def logits(self, x_SM: Tensor) -> Tensor:
        """Return the gate's logits in fp32."""
        return F.linear(x_SM.float(), self.gate.float())


def ours(w: Weights, x_SM: Tensor, capacity: int | None, top_k: int = 1) -> Output:
    """Compute the layer with moelab's kernels."""
    routing = gate(w.logits(x_SM), top_k, capacity, seed=1, normalize=top_k > 1)
    table = row_table(routing)
    rows_RM = dispatch(x_SM, table)
    rows_RM = expert_ffn(rows_RM, table.offsets_E1, w.w1, w.b1, w.w2, w.b2)
    return combine(rows_RM, table, routing.weight_SK), routing.aux_loss


def einsum(w: Weights, x_SM: Tensor, capacity: int, top_k: int = 1) -> Output:
    """Compute the layer as the paper's PyTorch baseline."""
    routing = baseline.mask_gate(w.logits(x_SM), top_k, capacity, seed=1, normalize=top_k > 1)
    dispatch_SEC, combine_SEC = baseline.one_hot_masks(routing, capacity, x_SM.dtype)
    rows_ECM = baseline.einsum_dispatch(x_SM, dispatch_SEC)
    hidden_ECF = F.gelu(torch.baddbmm(w.b1[:, None], rows_ECM, w.w1), approximate="tanh")
    rows_ECM = torch.baddbmm(w.b2[:, None], hidden_ECF, w.w2)
    return baseline.einsum_combine(rows_ECM, combine_SEC), routing.aux_loss


def loop(w: Weights, x_SM: Tensor, top_k: int = 1) -> Output:
    """Compute the layer as one writes it in ten minutes: sort the tokens, loop over the experts."""
    rows_NM, counts, finish = _sorted(w, x_SM, top_k)
    experts = zip(w.w1.unbind(), w.b1.unbind(), w.w2.unbind(), w.b2.unbind(), strict=True)
    outputs = [
        torch.addmm(b2, F.gelu(torch.addmm(b1, rows, w1), approximate="tanh"), w2)
        for rows, (w1, b1, w2, b2) in zip(rows_NM.split(counts.tolist()), experts, strict=True)
    ]
    return finish(torch.cat(outputs))


def grouped(w: Weights, x_SM: Tensor, top_k: int = 1) -> Output:
    """Compute the layer with torch's own grouped product."""
    rows_NM, counts, finish = _sorted(w, x_SM, top_k)
    ends = counts.cumsum(0).int()
    expert_N = torch.repeat_interleave(counts)
    hidden_NF = F.gelu(F.grouped_mm(rows_NM, w.w1, offs=ends) + w.b1[expert_N], approximate="tanh")
    return finish(F.grouped_mm(hidden_NF, w.w2, offs=ends) + w.b2[expert_N])


def _sorted(w: Weights, x_SM: Tensor, top_k: int) -> tuple[Tensor, Tensor, Callable[[Tensor], Output]]:
    """Return N = S * K rows in expert order, rows of each expert, and what makes the output of the experts' results."""
    (S, M), E = x_SM.shape, len(w.gate)
    probs_SE = F.softmax(w.logits(x_SM), -1)
    weight_SK, expert_SK = probs_SE.topk(top_k, -1) if top_k > 1 else probs_SE.max(-1, keepdim=True)
    if top_k > 1:
        weight_SK = weight_SK / weight_SK.sum(1, keepdim=True)
    order_N = expert_SK.flatten().argsort(stable=True)
    counts_E = torch.bincount(expert_SK.flatten(), minlength=E)
    first_E = counts_E if top_k == 1 else torch.bincount(expert_SK[:, 0], minlength=E)

    def finish(rows_NM: Tensor) -> Output:
        y_SKM = torch.empty_like(rows_NM).index_copy(0, order_N, rows_NM).view(S, top_k, M)
        y_SKM = y_SKM * weight_SK[:, :, None].to(x_SM.dtype)
        return y_SKM[:, 0] if top_k == 1 else y_SKM.sum(1), E * (probs_SE.mean(0) * first_E / S).sum()

    return x_SM[order_N if top_k == 1 else order_N // top_k], counts_E, finish


class Dense(nn.Module):
    """The layer that does the same FLOPs without choosing."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden, ffn), nn.Linear(ffn, hidden)

    def forward(self, x_SM: Tensor) -> Output:
        """Return the output and no loss."""
        return self.down(F.gelu(self.up(x_SM), approximate="tanh")), None


@dataclass(frozen=True)
class LayerSize:
    """S tokens, hidden size M, feed-forward size F, E experts, dtype of weights and tokens, K experts of a token."""

    tokens: int
    hidden: int
    ffn: int
    experts: int
    dtype: str = "fp32"
    top_k: int = 1

    def __post_init__(self) -> None:
        if self.ffn < 1:
            raise ValueError(f"bench layer: ffn must be at least 1, got {self.ffn}")
        if not 1 <= self.top_k <= self.experts:
            raise ValueError(f"bench layer: top_k must be 1 to the {self.experts} experts, got {self.top_k}")
        if self.dtype not in DTYPES:
            raise ValueError(f"bench layer: dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")


DENSE, OURS, DROP_FREE, EINSUM = "dense", "ours, capacity 1.0", "ours, drop-free", "einsum (baseline)"
LOOP, GROUPED = "sort and loop, drop-free", "torch grouped_mm, drop-free"
DEEPSPEED, EAGER, MIXTRAL = "deepspeed, capacity 1.0", "transformers eager", "transformers grouped_mm"
CANDIDATES = (DENSE, OURS, DROP_FREE, LOOP, GROUPED, EINSUM, DEEPSPEED, EAGER, MIXTRAL)
LIMITED, PEERS = (OURS, EINSUM, DEEPSPEED), (DEEPSPEED, EAGER, MIXTRAL)
"""Candidates with a capacity limit, and those of other libraries."""
MAY_FAIL = tuple(name for name in CANDIDATES if name not in (DENSE, OURS, DROP_FREE))
"""Candidates that are left out where they raise, unless they were asked for by name."""
Candidate = tuple[nn.Module, Callable[[Tensor], Output]]
"""The module with the parameters, and the call."""


Placed = TypeVar("Placed", bound=nn.Module)


def candidates(size: LayerSize, gate_EM: Tensor, only: Sequence[str] = ()) -> dict[str, Candidate]:
    """Return the candidates by name; without those that are not installed, or cannot be made though nobody named them.

    Args:
        only: some of `CANDIDATES` beside "dense"; empty is all.
    """
    if unknown := [name for name in only if name not in CANDIDATES]:
        raise ValueError(f"bench layer: unknown candidate {unknown[0]!r}; allowed: {', '.join(CANDIDATES)}")
    wanted = [name for name in CANDIDATES if not only or name in (DENSE, *only)]
    shape, K = (size.hidden, size.ffn), size.top_k
    capacity = slots(size.tokens * K, size.experts)

    def placed(module: Placed) -> Placed:
        return module.to(gate_EM.device, DTYPES[size.dtype])

    shared, dense = placed(Weights(*shape, gate_EM)), placed(Dense(size.hidden, size.ffn * K))
    made: dict[str, Candidate] = {
        DENSE: (dense, dense),
        OURS: (shared, lambda x: ours(shared, x, capacity, K)),
        DROP_FREE: (shared, lambda x: ours(shared, x, None, K)),
        LOOP: (shared, lambda x: loop(shared, x, K)),
        GROUPED: (shared, lambda x: grouped(shared, x, K)),
        EINSUM: (shared, lambda x: einsum(shared, x, capacity, K)),
    }

    def add(name: str, make: Callable[[], nn.Module]) -> nn.Module | None:
        try:
            module = placed(make())
        except Exception as error:
            if only:
                raise
            harness.left_out(f"{name} raises {type(error).__name__}: {terminal.one_line(error)}")
            return None
        made[name] = (module, module)
        return module

    if DEEPSPEED in wanted and peers.has("deepspeed"):
        add(DEEPSPEED, lambda: peers.DeepSpeedLayer(*shape, gate_EM, K))
    if (EAGER in wanted or MIXTRAL in wanted) and peers.has("transformers"):
        mixtral = add(MIXTRAL, lambda: peers.MixtralLayer(*shape, gate_EM, K))
        if mixtral is not None:
            made[EAGER] = (mixtral, lambda x: mixtral(x, "eager"))
            made[MIXTRAL] = (mixtral, lambda x: mixtral(x, "grouped_mm"))
    return {name: made[name] for name in wanted if name in made}


def measure(
    size: LayerSize,
    timing: Timing,
    *,
    backward: bool = True,
    only: Sequence[str] = (),
    slow: dict[str, int] | None = None,
) -> list[Row]:
    """Return the rows of one case.

    Args:
        backward: False times the forward pass alone, without gradients, as at inference; the floor is then the
            products once and the weights read once.
        only: see `candidates`.
        slow: the candidates that an earlier case left out as too slow, and its number of experts; they are not tried
            with as many or more. What this case leaves out is added.
    """
    torch.manual_seed(0)
    S, M, K, dtype = size.tokens, size.hidden, size.top_k, DTYPES[size.dtype]
    states = inputs.HiddenStates(S, M, size.experts, timing.device, K)
    kept: list[float] = []

    def new_round(i: int) -> tuple[Tensor, Tensor]:
        made = states(i)
        kept.append(float(made.load_E.clamp(max=slots(S * K, size.experts)).sum()) / (S * K))
        x_SM = made.x_SM.to(dtype)
        return x_SM.requires_grad_(backward), torch.randn_like(x_SM)

    def turn(name: str, module: nn.Module, call: Callable[[Tensor], Output]) -> Callable[[tuple[Tensor, Tensor]], None]:
        parameters = list(module.parameters())

        def run(given: tuple[Tensor, Tensor]) -> None:
            x_SM, dy_SM = given
            with torch.set_grad_enabled(backward), fastest_products(name not in PEERS):
                y_SM, aux_loss = call(x_SM)
                if backward:
                    pairs = [(y_SM, dy_SM)] + ([] if aux_loss is None else [(aux_loss, torch.ones_like(aux_loss))])
                    torch.autograd.backward([y for y, _ in pairs], [dy for _, dy in pairs])
            x_SM.grad = None
            for parameter in parameters:
                parameter.grad = None

        return run

    made = {name: turn(name, *pair) for name, pair in candidates(size, states.gate_EM, only).items()}
    slow = {} if slow is None else slow
    made = {name: call for name, call in made.items() if slow.get(name, size.experts + 1) > size.experts}
    times = harness.in_turns(made, new_round, timing, may_fail=() if only else MAY_FAIL)
    slow |= dict.fromkeys(made.keys() - times.keys(), size.experts)
    measured = states.measured()
    passes = 3 if backward else 1
    expert = FeedForward(M, size.ffn)
    # The large product is timed after the rounds; on a shared machine the dense layer may have met a better minute.
    products_s = min(passes * S * K * expert.flops / harness.product_rate(dtype, timing), *times[DENSE])
    expert_s = passes * expert.weights * dtype.itemsize / harness.copy_rate(timing)
    floor_s = {
        name: max(
            products_s * (statistics.median(kept) if name in LIMITED else 1.0),
            expert_s * (K if name == DENSE else measured["used_experts"]),
        )
        for name in times
    }
    case = {"tokens": S, "hidden": M, "ffn": size.ffn, "experts": size.experts, "dtype": size.dtype}
    case |= {"top_k": K} if K > 1 else {}
    case |= {"threads": torch.get_num_threads(), "passes": "forward + backward" if backward else "forward"}
    case |= {**measured, "kept_share": statistics.median(kept)}
    return harness.rows(
        case, times, against=DENSE, floor_s=floor_s, timing=timing, inputs=inputs.described(inputs.HIDDEN)
    )


def show(measured: list[Row]) -> None:
    """Print the rows of one case."""
    c = measured[0].case
    harness.show(
        f"layer, {c['passes']}: S={c['tokens']} M={c['hidden']} F={c['ffn']} E={c['experts']} {c['dtype']}; "
        f"busiest expert {c['busiest_expert']:.1f} x mean, capacity 1.0 keeps {c['kept_share']:.0%}",
        measured,
    )


def main(
    *,
    sizes: Sequence[LayerSize],
    threads: Sequence[int],
    timing: Timing,
    only: Sequence[str],
    out: Path | None,
    backward: bool = True,
) -> None:
    """Measure each size at each number of threads and print.

    With `out` (a folder), write `layer.jsonl` there, after each case, and its figure. `backward`: see `measure`.
    """
    for count in threads:
        timing.check_threads(count)
    process.keep_freed_memory()  # as runs do: a step's gradients lie where the last step's lay
    measured: list[Row] = []
    slow: dict[tuple[int, str], dict[str, int]] = {}
    cases = [(count, size) for count in threads for size in sizes]
    for count, size in terminal.announced(
        cases, lambda one: f"a layer of {one[1].experts} experts, {one[1].dtype}, {_threads(one[0])}"
    ):
        torch.set_num_threads(count)
        known = slow.setdefault((count, size.dtype), {})
        case = measure(size, timing, backward=backward, only=only, slow=known)
        show(case)
        measured += case
        if out is not None:
            objects = harness.write(measured, out / "layer.jsonl")
    if out is not None and benchmarks.possible():
        draw(objects, out / "layer")


def draw(objects: list[dict[str, Any]], path: Path) -> None:
    """Draw the rows of a `layer.jsonl`, a panel for each dtype and number of threads; `path` has no suffix."""
    names = {row["candidate"] for row in objects}
    said = [(DROP_FREE, "our drop-free layer"), (EINSUM, "the einsum baseline")]
    ratios = [f"{text} {harness.span(objects, name)} times" for name, text in said if name in names]
    title = f"Time over the dense layer of equal FLOPs: {', '.join(ratios)}"
    shown = [row | {"panel": f"{row['dtype']}, {_threads(row['threads'])}"} for row in objects]
    benchmarks.save(benchmarks.ratios(shown, title=title, panel="panel"), path)


def _threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"
