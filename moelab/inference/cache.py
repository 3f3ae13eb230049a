"""Keys and values of earlier tokens: allocated once, filled by prefill, read and extended by decode.

Shapes: L layers, H heads (this rank's), T the longest sequence, D head size; a *slot* is one sequence's place, B of them.

Prefill takes whole prompts of any lengths behind one another, [1, N] tokens and not one of padding: everything in the model but attention
works token by token, and attention goes prompt by prompt. Decode takes one token a sequence, [B, 1], in one of two ways:

- dynamic (CPU): slots 0 to B - 1 of the sequences that are alive, attention over exactly the tokens there are, equal lengths together.
  A sequence's attention is then computed alike whatever its neighbours are.
- static (CUDA): all slots, attention over all T places under a mask made from the positions, which live on the device: equal shapes and no
  word from the host at any step, so a step can be captured in a CUDA graph and replayed.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from moelab.models import GPT


class KVCache:
    """The `moelab.models.gpt.Cache` of a model.

    Attributes:
        keys, values: [L, B, H, T, D].
        positions_BT: int64, of the tokens of the next forward pass.
        layers: what each attention layer is given.
        slots, length: B and T.
    """

    def __init__(self, model: GPT, slots: int, length: int, dtype: torch.dtype, device: str | torch.device) -> None:
        """
        Args:
            slots: sequences at a time.
            length: longest sequence in tokens, prompt and output; at most the model's context.
        """
        config = model.config
        heads = model.blocks[0].attention.heads  # a tensor-sliced model has fewer than its config
        shape = (config.layers, slots, heads, length, config.head_size)
        self.keys, self.values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self.slots, self.length, self.device = slots, length, torch.device(device)
        self.positions_BT = torch.zeros(1, 0, dtype=torch.long, device=device)
        self.layers = [_Layer(self, i) for i in range(config.layers)]
        self._spans: list[tuple[int, int, int]] | None = None  # prefill: (slot, first, past the last packed token)
        self._runs: list[tuple[int, int, int]] | None = (
            None  # dynamic decode: (first slot, past the last, tokens to see)
        )
        self._mask_B11T: Tensor | None = None  # static decode
        self._rows = torch.arange(slots, device=device)
        self._places = torch.arange(length, device=device)

    @property
    def bytes(self) -> int:
        """Memory of keys and values."""
        return 2 * self.keys.numel() * self.keys.element_size()

    def prefill(self, slots: Sequence[int], lengths: Sequence[int]) -> None:
        """The next forward pass takes prompts of these lengths, one behind the other, into these slots."""
        ends = list(itertools.accumulate(lengths))
        self._spans = [(slot, end - n, end) for slot, n, end in zip(slots, lengths, ends, strict=True)]
        self._runs = self._mask_B11T = None
        positions = [torch.arange(n) for n in lengths]
        self.positions_BT = torch.cat([*positions, torch.arange(0)])[None].to(self.device)

    def decode(self, lengths: Sequence[int]) -> None:
        """The next forward pass takes one token for each of the slots 0, 1, ..., which hold `lengths` tokens."""
        self._spans = self._mask_B11T = None
        self.positions_BT = torch.tensor(lengths, dtype=torch.long, device=self.device)[:, None]
        self._runs, first = [], 0
        for n, same in itertools.groupby(lengths):
            past = first + len(list(same))
            self._runs.append((first, past, n + 1))
            first = past

    def decode_static(self, positions_B: Tensor) -> None:
        """The next forward pass takes one token for every slot, at `positions_B` (int64, on the device)."""
        self._spans = self._runs = None
        self.positions_BT = positions_B[:, None]
        self._mask_B11T = (self._places <= self.positions_BT)[:, None, None]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the `length` first tokens of one slot to another."""
        for cached in (self.keys, self.values):
            cached[:, target, :, :length] = cached[:, source, :, :length]


class _Layer:
    """One layer's keys and values; see `moelab.models.gpt.Past`."""

    def __init__(self, cache: KVCache, layer: int) -> None:
        self._cache = cache
        self._keys, self._values = cache.keys[layer], cache.values[layer]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache, keys, values = self._cache, self._keys, self._values
        if cache._spans is not None:
            y = torch.empty_like(q)
            for slot, a, b in cache._spans:
                keys[slot, :, : b - a], values[slot, :, : b - a] = k[0, :, a:b], v[0, :, a:b]
                part = (t[:, :, a:b] for t in (q, k, v))
                y[:, :, a:b] = F.scaled_dot_product_attention(*part, is_causal=True)
            return y
        B = len(q)
        at = (cache._rows[:B], slice(None), cache.positions_BT[:, 0])
        keys[at], values[at] = k[:, :, 0], v[:, :, 0]
        if cache._mask_B11T is not None:
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=cache._mask_B11T)
        parts = [
            F.scaled_dot_product_attention(q[a:b], keys[a:b, :, :n], values[a:b, :, :n]) for a, b, n in cache._runs
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else q
