"""Time decoding steps: settings, a model of random weights, turns, parts, bytes read, rows.

`moelab.bench.decode` measures with them in one process and on ranks.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch

from moelab.bench import harness, inputs
from moelab.bench.clock import PARTS, Clock
from moelab.bench.decoders import Turns
from moelab.bench.harness import Row, Timing
from moelab.config import ModelConfig
from moelab.inference.generate import Generator
from moelab.inference.packing import Packed
from moelab.inference.sampling import Sampling
from moelab.inference.text import DTYPES
from moelab.kernels.decode import PARTS as CALL_PARTS
from moelab.models import GPT, empty


@dataclass(frozen=True)
class DecodeSettings:
    """Tokens of a prompt, tokens generated for each, rounds; the device, and the dtype of weights and activations.

    `rough` is that of `Timing`.
    """

    prompt: int = 32
    output: int = 32
    rounds: int = 5
    device: str = "cpu"
    dtype: str = "fp32"
    rough: bool = False

    def __post_init__(self) -> None:
        if self.output < 2 or min(self.prompt, self.rounds) < 1:
            raise ValueError("bench decode: output must be at least 2 tokens; prompt and rounds at least 1")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's."""
        return DTYPES[self.dtype]

    @property
    def timing(self) -> Timing:
        """How a round is timed."""
        # On ranks no clock may decide when to end.
        return Timing(self.rounds, self.device, warm_up=1, budget_s=math.inf, rough=self.rough)


def filled(config: ModelConfig, device: str, dtype: torch.dtype = torch.float32) -> GPT:
    """Return a model of random weights, made quickly: values do not matter here, but routing must spread."""
    model = empty(config, device, dtype)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                parameter.normal_(0.0, config.init_std)
    return model


def steps(generator: Generator, prompts: list[list[int]], tokens: int) -> Iterator[None]:
    """Generate greedily and yield after each turn: one token for each prompt, on ranks of this rank's share."""
    share = len(prompts)
    if generator.mesh is not None:
        share = len(range(generator.mesh.data.index, len(prompts), generator.mesh.data.size))
    pieces = generator.stream(prompts, Sampling(max_new_tokens=tokens, temperature=0))
    for count, _ in enumerate(pieces, start=1):
        if count % share == 0:
            yield


def our_turns(generator: Generator, prompts: list[list[int]], tokens: int) -> Turns:
    """Generate with one of our generators and time it."""
    turns = Turns()
    for _ in steps(generator, prompts, tokens):
        turns.end()
    return turns


def weight_bytes(config: ModelConfig, distinct: float, itemsize: int = 4) -> float:
    """Return the bytes of weights that a step reads when each MoE layer's tokens meet `distinct` experts.

    Embeddings' rows are left out.
    """
    rows = (0 if config.decoder.tied else config.vocab) + (
        config.context if config.decoder.positions == "learned" else 0
    )
    used = config.active_parameters() - rows * config.hidden
    return itemsize * (used + config.moe_layers * (distinct - config.top_k) * config.expert_feed_forward.parameters)


def cache_bytes(config: ModelConfig, batch: int, settings: DecodeSettings) -> float:
    """Return the bytes of keys and values that a step reads, at the middle of the output."""
    tokens = batch * (settings.prompt + settings.output / 2)
    return settings.torch_dtype.itemsize * 2 * config.layers * config.kv_heads * config.head_size * tokens


@dataclass(frozen=True)
class Rates:
    """Hold what the machine does a second: bytes read from memory, FLOPs of large matrix products."""

    read: float
    products: float


def least_seconds(config: ModelConfig, distinct: float, batch: int, settings: DecodeSettings, rates: Rates) -> float:
    """Return the least time of a step on one rank.

    The shared weights, and those of the `distinct` experts of each MoE layer, are read once or multiplied by the rows,
    whichever takes longer; then the cache is read.
    """
    experts, itemsize = config.moe_layers * config.expert_feed_forward.parameters, settings.torch_dtype.itemsize
    shared_bytes = weight_bytes(config, 0, itemsize)
    shared_s = max(shared_bytes / rates.read, 2 * batch * shared_bytes / itemsize / rates.products)
    experts_s = max(distinct * experts * itemsize / rates.read, 2 * batch * config.top_k * experts / rates.products)
    return shared_s + experts_s + cache_bytes(config, batch, settings) / rates.read


def round_prompts(config: ModelConfig, batch: int, settings: DecodeSettings) -> Callable[[int], list[list[int]]]:
    """Return what makes the prompts of a round."""
    return lambda i: inputs.prompts(i, batch, settings.prompt, config.vocab)


def breakdown(generator: Generator, prompts: list[list[int]], settings: DecodeSettings) -> dict[str, Any]:
    """Return milliseconds a step by part, collectives a step, and distinct experts a layer, from one more generation.

    Args:
        generator: not captured: the clock waits for the device inside the step, which a CUDA graph does not allow.
    """
    if generator.packed is not None:
        return _breakdown_of_call(generator, generator.packed, prompts, settings)
    clock = Clock(generator.cache.device.type)
    with clock.attached(generator.model):
        for turn, _ in enumerate(steps(generator, prompts, settings.output)):
            if turn == 0:
                clock.reset()  # the prompts are not a step, and what comes after the last one is none
            clock.stop()
            spent, collectives = clock.seconds.copy(), clock.collectives
    n = settings.output - 1
    return {
        "parts_ms": {part: spent[part] / n * 1e3 for part in PARTS if spent[part]},
        "collectives": collectives / n,
        "distinct_experts": statistics.mean(clock.distinct) if clock.distinct else None,
    }


def _breakdown_of_call(
    generator: Generator, packed: Packed, prompts: list[list[int]], settings: DecodeSettings
) -> dict[str, Any]:
    """Return the same where one call computes a step and books its parts itself; what is outside it is "rest"."""
    seconds, whole, began = packed.time(), 0.0, 0.0
    for turn, _ in enumerate(steps(generator, prompts, settings.output)):
        if turn == 0:
            seconds.zero_()
            began = perf_counter()
        whole = perf_counter() - began
    packed.seconds = None
    *parts, distinct, layers = seconds.tolist()
    spent = dict(zip(CALL_PARTS, parts, strict=True))
    spent["rest"] += whole - sum(parts)
    n = settings.output - 1
    return {
        "parts_ms": {part: spent[part] / n * 1e3 for part in PARTS if spent.get(part)},
        "collectives": 0.0,
        "distinct_experts": distinct / layers if layers else None,
    }


def decode_rows(
    case: dict[str, Any],
    turns: Mapping[str, Sequence[Sequence[float]]],
    numbers: Mapping[str, dict[str, Any]],
    floor_s: float | Mapping[str, float],
    settings: DecodeSettings,
    name: str = "",
) -> list[Row]:
    """Return the rows of a case: a round's time is its median step.

    Args:
        turns: candidate -> the turns of each round.
        numbers: candidate -> what was measured beside them.
        name: of the machine; empty is what `harness.device_name` says.
    """
    extra = {}
    for candidate, rounds in turns.items():
        sample = sorted(t for times in rounds for t in times[1:])
        extra[candidate] = {
            "p95_ms": sample[math.ceil(0.95 * len(sample)) - 1] * 1e3,
            "first_ms": statistics.median(times[0] for times in rounds) * 1e3,
            "tokens_per_s": case["batch"] * len(sample) / sum(sample),
            **numbers[candidate],
        }
    return harness.rows(
        {**case, "prompt": settings.prompt, "output": settings.output},
        {candidate: [statistics.median(times[1:]) for times in rounds] for candidate, rounds in turns.items()},
        against="optimised",
        floor_s=floor_s,
        timing=settings.timing,
        inputs=inputs.described(f"prompts of {settings.prompt} tokens of {inputs.TEXT}"),
        device=name,
        numbers=extra,
    )
