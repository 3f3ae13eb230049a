"""Memory of a GPU in inference and training, in bytes; arrays of n layouts."""

from __future__ import annotations

from collections import Counter

import numpy as np

from moelab.config import ModelConfig
from moelab.simulate.attention import cache_slices, cached_numbers
from moelab.simulate.constants import Constants
from moelab.simulate.exchange import rows_to_send
from moelab.simulate.layouts import Array, Layouts
from moelab.simulate.systems import System, slots


def rank_parameters(model: ModelConfig, layouts: Layouts, *, sliced: bool = False) -> tuple[Array, Array]:
    """Return the parameters on a rank, as (outside experts, experts).

    Every rank holds the gates as a whole; all else outside experts is sliced, and with `sliced` the experts, too.
    """
    one = model.expert_feed_forward.parameters
    gates = sum(model.hidden * e for e in model.experts)
    outside = model.parameters() - sum(model.experts) * one - gates
    experts = np.zeros(len(layouts))
    for count, layers in Counter(e for e in model.experts if e).items():
        spread = layouts.experts(count)
        experts += layers * count * one / (layouts.tensor if sliced else spread.parallel * spread.slices)
    return outside / layouts.tensor + gates, experts


def inference_memory(
    model: ModelConfig,
    layouts: Layouts,
    system: System,
    *,
    batch: int,
    context: int,
    width: int,
    weight: int,
    constants: Constants,
) -> dict[str, Array]:
    """Return the bytes on a GPU while decoding, by use, in each layout.

    weights: everything outside experts, sliced over the tensor group (section 5.2).
    experts: its experts, or slices of them.
    cache: keys and values of its heads for all sequences of its tensor group.
    buffers: what the exchange and the experts hold at once, in the largest layer.
    reserved: `Constants.reserved_gib`.

    Args:
        width, weight: bytes of a number, and of a weight. Other arguments are those of `decode_sweep`.
    """
    n, M, expert = len(layouts), model.hidden, model.expert_feed_forward
    outside, experts = rank_parameters(model, layouts, sliced=system.sliced)
    buffers = batch * model.vocab * 4 / layouts.tensor + batch * (2 * M + model.dense_feed_forward.inner) * width
    largest = np.zeros(n)
    for count in {e for e in model.experts if e}:
        spread = layouts.experts(count)
        sent = rows_to_send(spread, np.full(n, batch), model.top_k, slots(system, model, batch, count))
        arrived = sent * spread.slices
        at_once = 1 if system.grouped else spread.experts / spread.parallel
        hidden = arrived * expert.inner / spread.slices / at_once
        largest = np.maximum(
            largest, (2 * sent * M + 2 * arrived * M + hidden) * width
        )  # out, in, results, intermediate
    numbers = batch * context * model.layers * cached_numbers(model)
    return {
        "weights": outside * weight,
        "experts": experts * weight,
        "cache": numbers * width / cache_slices(model, layouts.tensor),
        "buffers": buffers + largest,
        "reserved": np.full(n, constants.reserved_gib * 2**30),
    }
