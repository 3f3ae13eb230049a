"""Choose the next token: greedy, temperature, top-k, top-p.

Each sequence has its own stream of uniform numbers, a function of (seed, prompt, number of equal prompts before it)
alone, and uses exactly one number per token. So a sequence's draws do not depend on the rest of the batch or on the
order in which sequences start, and all numbers are known before the first step, which needs no generator on the device.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_COLDEST = 1e-30
"""Lower temperatures are taken as this one, which fp32 can divide by; scores below the largest are -inf there too."""


@dataclass(frozen=True)
class Sampling:
    """Describe how prompts are continued.

    Attributes:
        max_new_tokens: bound on the new tokens; a sequence also ends when the context is full.
        temperature: divisor of the logits; 0 chooses the likeliest token (ties to the lower id).
        top_k: draw from the k likeliest tokens only (ties at the boundary are broken arbitrarily); 0 means all.
        top_p: draw from the fewest likeliest tokens whose probabilities (after top_k) sum to at least this; 1 means
            all.
        seed: see the module's docstring.
        stop_tokens: a sequence ends with the first of these ids, which is kept.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for condition, message in (
            (self.max_new_tokens >= 1, f"max_new_tokens must be at least 1, got {self.max_new_tokens}"),
            (0 <= self.temperature < float("inf"), f"temperature must be 0 (greedy) or more, got {self.temperature}"),
            (self.top_k >= 0, f"top_k must be 0 (all) or more, got {self.top_k}"),
            (0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, got {self.top_p}"),
            (self.seed >= 0, f"seed must not be negative, got {self.seed}"),
        ):
            if not condition:
                raise ValueError(f"sampling: {message}")

    @property
    def greedy(self) -> bool:
        """Return whether the likeliest token is chosen, without draws."""
        return self.temperature == 0


def uniforms(seed: int, prompts: Sequence[Sequence[int]], count: int) -> np.ndarray:
    """Return each prompt's uniform numbers in [0, 1), float64 [prompts, count]."""
    seen: Counter[tuple[int, ...]] = Counter()
    rows = np.empty((len(prompts), count))
    for row, prompt in zip(rows, map(tuple, prompts), strict=True):
        key = hashlib.sha256(f"{seed}/{seen[prompt]}/{','.join(map(str, prompt))}".encode()).digest()
        row[:] = np.random.Generator(np.random.Philox(int.from_bytes(key[:16], "big"))).random(count)
        seen[prompt] += 1
    return rows


def choose(logits_BV: Tensor, uniform_B: Tensor | None, sampling: Sampling) -> Tensor:
    """Return the next token of each sequence, int64 [B]: the inverse cumulative distribution at `uniform_B`.

    The greedy choice does not use `uniform_B`. Each sequence needs a largest logit that is finite.
    """
    if sampling.greedy or uniform_B is None:
        return logits_BV.argmax(1)
    scores = logits_BV.float()
    scores = (scores - scores.amax(1, keepdim=True)) / max(sampling.temperature, _COLDEST)
    ids = None
    if 0 < sampling.top_k < scores.shape[1]:
        scores, ids = scores.topk(sampling.top_k)
    elif sampling.top_p < 1:
        scores, ids = scores.sort(descending=True, stable=True)
    p = scores.softmax(1, dtype=torch.float64)
    if sampling.top_p < 1:
        p = torch.where(p.cumsum(1) - p < sampling.top_p, p, 0.0)
    below = p.cumsum(1)
    # The last token with a probability above 0: rounding may place the index beyond it.
    last = (p > 0).long().mul(torch.arange(p.shape[1], device=p.device)).amax(1, keepdim=True)
    index = torch.searchsorted(below, uniform_B[:, None] * below[:, -1:], right=True).minimum(last)
    return (index if ids is None else ids.gather(1, index))[:, 0]
