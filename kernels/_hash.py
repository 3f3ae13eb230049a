"""Draw the priorities of random token selection: a counter hash, the same bits in torch, Triton and C++."""

from __future__ import annotations

from typing import TypeVar

import torch

_M32 = 0xFFFFFFFF
Words = TypeVar("Words", int, torch.Tensor)


def _mix32(x: Words) -> Words:
    """Apply Murmur3's 32-bit finaliser: a bijection on 32 bits in which every input bit reaches every output bit."""
    x = x ^ x >> 16
    x = x * 0x85EBCA6B & _M32
    x = x ^ x >> 13
    x = x * 0xC2B2AE35 & _M32
    return x ^ x >> 16


def hash_keys(seed: int) -> tuple[int, int]:
    """Return the two words of the priority hash that the 64-bit seed gives, each in [0, 2^32)."""
    low = _mix32((seed & _M32) ^ 0x9E3779B9)
    return low, _mix32((seed >> 32 & _M32) ^ low ^ 0x7F4A7C15)


def priorities(seed: int, tokens: int, top_k: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return the priority of every entry, int64 [S, K] in [0, 2^32); for one k, all tokens have different ones."""
    low, high = hash_keys(seed)
    token_S1 = torch.arange(tokens, device=device)[:, None]
    k_1K = torch.arange(top_k, device=device)[None, :] * 0x9E3779B9
    return _mix32(_mix32(token_S1 ^ low) + k_1K & _M32 ^ high)
