"""Prefill, whole requests and full load on a cluster, for programs of today; decoding steps are `decode_sweep`'s.

prefill     a forward pass over prompts; it takes at least the reading of a GPU's weights
two halves  a batch computed as two half batches, each of whose exchanges hides behind the other's computation
            (DeepSeek-V3/R1 Inference System Overview, 2025; two-batch overlap of SGLang)
full load   as many sequences as memory holds; their prefills and their decoding steps take turns
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from moelab.config import ModelConfig
from moelab.simulate import constants as _constants
from moelab.simulate.constants import Constants
from moelab.simulate.decoding import WEIGHT_BYTES, DecodeSweep, decode_sweep
from moelab.simulate.exchange import transfer_us
from moelab.simulate.hardware import Cluster
from moelab.simulate.layouts import Layouts
from moelab.simulate.memory import rank_parameters
from moelab.simulate.step import forward_us
from moelab.simulate.systems import System


def prefill_s(
    model: ModelConfig,
    layouts: Layouts,
    where: Cluster,
    code: System,
    *,
    tokens: int,
    prompt: int,
    dtype: str,
    halves: bool = False,
    constants: Constants | None = None,
) -> float:
    """Return the seconds in which each tensor group of one layout computes `tokens` tokens of prompts of `prompt`."""
    known = constants or _constants.modern()
    asked = replace(model, context=prompt)
    parts = forward_us(
        asked, layouts, where, code, known, tokens, dtype=dtype, heads_of=max(1, math.ceil(tokens / prompt))
    )
    outside, experts = (float(p[0]) for p in rank_parameters(asked, layouts, sliced=code.sliced))
    size = (outside + experts) * WEIGHT_BYTES[dtype]
    read = transfer_us(size, where.gpu.memory_gb_s * known.memory_share)
    parts["products"] = max(parts["products"], read)
    exchange = parts["all_to_all"]
    other = sum(parts.values()) - exchange
    return (max(exchange, other) if halves else exchange + other) / 1e6


def two_halves_ms(halved: DecodeSweep) -> np.ndarray:
    """Return the time of two half batches from the sweep of one: the exchange or all else, whichever takes longer."""
    exchange = halved.parts_ms["all_to_all"]
    return 2 * np.maximum(exchange, halved.latency_ms - exchange)


def request_s(
    model: ModelConfig,
    layouts: Layouts,
    where: Cluster,
    code: System,
    *,
    batch: int,
    prompt: int,
    output: int,
    **options: Any,
) -> float:
    """Return the seconds from a batch of prompts to their last token: a prefill, and a step for each token but one."""
    first = prefill_s(model, layouts, where, code, tokens=batch * prompt, prompt=prompt, **options)
    sweep = decode_sweep(model, layouts, where, program=code, batch=batch, context=prompt + output // 2, **options)
    return first + (output - 1) * float(sweep.latency_ms[0]) / 1e3


def full_load(
    model: ModelConfig, layouts: Layouts, where: Cluster, code: System, *, prompt: int, output: int, **options: Any
) -> tuple[int, float]:
    """Return the sequences of a tensor group, and output tokens a second of the layout, at full load.

    A sequence is half through its output on average. In the time in which a group's `batch` sequences get all their
    tokens, the first of them from its prefill as in `request_s`, it computes as many prompts.

    Raises:
        ValueError: one line: the memory does not hold a single sequence.
    """
    context = prompt + output // 2

    def step(batch: int) -> DecodeSweep:
        return decode_sweep(model, layouts, where, program=code, batch=batch, context=context, **options)

    batch = 1
    if not step(batch).fits[0]:
        raise ValueError(f"simulate: {model} does not fit {where.name} with one sequence of {context} tokens")
    while step(2 * batch).fits[0]:
        batch *= 2
    jump = batch
    while jump > 1:
        jump //= 2
        batch += jump if step(batch + jump).fits[0] else 0
    groups = int(layouts.data[0])
    first = batch * prefill_s(model, layouts, where, code, tokens=prompt, prompt=prompt, **options)
    return batch, groups * batch * output / (first + (output - 1) * float(step(batch).latency_ms[0]) / 1e3)
