"""Cache keys and values of earlier tokens: prefill writes them, decode reads and extends them.

Shapes: L layers, N heads of keys and values (this rank's), T the longest sequence, D head size. A *slot* is the memory
of one sequence; there are B slots.

Prefill takes whole prompts of any lengths concatenated, [1, N] tokens without padding: all of the model except
attention treats tokens independently, and attention is computed prompt by prompt. Decode takes one token per sequence,
[B, 1], in one of two ways:

- dynamic (CPU): the unfinished sequences occupy the first slots. Attention covers exactly the existing tokens, one call
  for each length, so that a sequence's attention does not depend on the others. With packed weights (`packing.py`) the
  C++ reads and writes `keys`, `values` and `last` itself.
- static (CUDA): all slots, attention over all T positions under a mask computed from the positions, which are on the
  device. Shapes are the same at each step and nothing comes from the host, so that a CUDA graph can capture the step.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moelab.models import GPT


class KVCache:
    """Hold the keys and values of a model's sequences; a `moelab.models.gpt.Cache`.

    Attributes:
        keys, values: [L, B, N, T, D].
        last: with smeared keys, the last key of each sequence, not mixed with the one before it, [L, B, N, D].
        positions_BT: int64, positions of the tokens of the next forward pass.
        layers: one `moelab.models.gpt.Past` per attention layer.
        slots, length: B and T.
    """

    def __init__(self, model: GPT, slots: int, length: int, dtype: torch.dtype, device: str | torch.device) -> None:
        """Allocate the cache.

        Args:
            model: the model, or this rank's part of it.
            slots: number of sequences at a time.
            length: longest sequence in tokens, prompt and output; at most the model's context.
        """
        if torch.device(device).type == "cuda":
            # cuDNN's attention makes a plan, which takes a fraction of a second, for each new length of keys.
            torch.backends.cuda.enable_cudnn_sdp(False)
        config = model.config
        sliced = config.heads // model.blocks[0].attention.heads  # a tensor-sliced model has fewer than its config
        heads = config.kv_heads // sliced
        self._gqa = config.kv_heads < config.heads
        shape = (config.layers, slots, heads, length, config.head_size)
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        last = (*shape[:3], config.head_size)
        self.last = torch.zeros(last, dtype=dtype, device=device) if config.decoder.smeared_keys else None
        self.slots, self.length, self.device = slots, length, torch.device(device)
        self.positions_BT = torch.zeros(1, 0, dtype=torch.long, device=device)
        self.layers = [_Layer(self, i) for i in range(config.layers)]
        self._spans: list[tuple[int, int, int]] | None = None  # prefill: (slot, first, past the last packed token)
        # Dynamic decode: (first slot, past the last slot, visible tokens) of each run of equal lengths.
        self._runs: list[tuple[int, int, int]] = []
        self._mask_B11T: Tensor | None = None  # static decode
        self._rows = torch.arange(slots, device=device)
        self._places = torch.arange(length, device=device)

    def prefill(self, slots: Sequence[int], lengths: Sequence[int]) -> None:
        """Prepare a forward pass over concatenated prompts of these lengths, one per given slot."""
        ends = list(itertools.accumulate(lengths))
        self._spans = [(slot, end - n, end) for slot, n, end in zip(slots, lengths, ends, strict=True)]
        self._mask_B11T = None
        positions = [torch.arange(n) for n in lengths]
        self.positions_BT = torch.cat([*positions, torch.arange(0)])[None].to(self.device)

    def decode(self, lengths: Sequence[int]) -> None:
        """Prepare a forward pass over one token for each of the slots 0, 1, ..., which hold `lengths` tokens."""
        self._spans = self._mask_B11T = None
        self.positions_BT = torch.tensor(lengths, dtype=torch.long, device=self.device)[:, None]
        self._runs, first = [], 0
        for n, same in itertools.groupby(lengths):
            past = first + len(list(same))
            self._runs.append((first, past, n + 1))
            first = past

    def decode_static(self, positions_B: Tensor) -> None:
        """Prepare a forward pass over one token for every slot, at `positions_B` (int64, on the device)."""
        self._spans = None
        self.positions_BT = positions_B[:, None]
        self._mask_B11T = (self._places <= self.positions_BT)[:, None, None]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the keys and values of the first `length` tokens of one slot to another."""
        for cached in (self.keys, self.values):
            cached[:, target, :, :length] = cached[:, source, :, :length]
        if self.last is not None:
            self.last[:, target] = self.last[:, source]


class _Layer:
    """Hold one layer's keys and values; a `moelab.models.gpt.Past`."""

    def __init__(self, cache: KVCache, layer: int) -> None:
        self._cache = cache
        self._keys, self._values = cache.keys[layer], cache.values[layer]
        self._last = None if cache.last is None else cache.last[layer]

    def before(self, k_BTND: Tensor) -> Tensor:
        """Return the unmixed key of the token before each new one (of a first token its own), and store the new."""
        last_BND = self._last
        assert last_BND is not None
        if self._cache._spans is None:
            before_BTND = last_BND[: len(k_BTND)].to(k_BTND.dtype)[:, None].clone()
            last_BND[: len(k_BTND)] = k_BTND[:, 0].to(last_BND.dtype)
            return before_BTND
        before_BTND = torch.cat((k_BTND[:, :1], k_BTND[:, :-1]), 1)
        for slot, a, b in self._cache._spans:
            before_BTND[:, a : a + 1] = k_BTND[:, a : a + 1]
            last_BND[slot] = k_BTND[0, b - 1].to(last_BND.dtype)
        return before_BTND

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the new tokens' keys and values; return their attention over all visible tokens, [B, H, T, D]."""
        cache, keys, values = self._cache, self._keys, self._values
        attention = F.scaled_dot_product_attention
        if cache._spans is not None:
            y = torch.empty_like(q)
            for slot, a, b in cache._spans:
                keys[slot, :, : b - a], values[slot, :, : b - a] = k[0, :, a:b], v[0, :, a:b]
                part = q[:, :, a:b], k[:, :, a:b], v[:, :, a:b]
                y[:, :, a:b] = attention(*part, is_causal=True, enable_gqa=cache._gqa)
            return y
        B = len(q)
        at = (cache._rows[:B], slice(None), cache.positions_BT[:, 0])
        keys[at], values[at] = k[:, :, 0], v[:, :, 0]
        # Of one token, the query heads that share keys are rows of one product. With `enable_gqa` and a mask CUDA has
        # no fused kernel, and PyTorch would repeat the cache in fp32.
        q_BNGD = q.reshape(B, keys.shape[1], q.shape[1] // keys.shape[1], q.shape[-1])
        if cache._mask_B11T is not None:
            return attention(q_BNGD, keys, values, attn_mask=cache._mask_B11T).reshape(q.shape)
        parts = [attention(q_BNGD[a:b], keys[a:b, :, :n], values[a:b, :, :n]) for a, b, n in cache._runs]
        return (parts[0] if len(parts) == 1 else torch.cat(parts) if parts else q).reshape(q.shape)
