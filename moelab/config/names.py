"""Hold the paper's names for models: the bases' shapes, and the grammar that `ModelConfig.parse` reads."""

from __future__ import annotations

import re

# The paper's dense bases: layers L, hidden M, heads H. Heads of 2.4B, 8B, 24B and 47B are not stated; size 128 is our
# assumption (1.3B has head size 128 in its training script, 6.7B and 175B too). Sources: `moelab.paper`, data file
# models.csv.
BASES: dict[str, tuple[int, int, int]] = {
    "125M": (12, 768, 12),
    "350M": (24, 1024, 16),
    "1.3B": (24, 2048, 16),
    "2.4B": (16, 3584, 28),
    "6.7B": (32, 4096, 32),
    "8B": (40, 4096, 32),
    "24B": (30, 8192, 64),
    "47B": (58, 8192, 64),
    "175B": (96, 12288, 96),
}

NAME = re.compile(
    r"""(?P<base>[\d.]+[MB])
        (\+(?P<half>FirstHalf-|SecondHalf-)?
           (Top(?P<top_k>\d+)-)?
           (?P<kind>Residual-|Pyramid-|PR-)?
           MoE-(?P<experts>\d+)(/(?P<last>\d+))?)?
        (\+L(?P<layers>\d+))?
        (?P<twin>twin)?""",
    re.IGNORECASE | re.VERBOSE,
)
GRAMMAR = (
    "BASE[+[FirstHalf-|SecondHalf-][TopK-][Residual-|Pyramid-|PR-]MoE-N[/2N]][+L<layers>][ twin], "
    "for example 350M, 1.3B+MoE-128, 350M+PR-MoE-32/64, 350M+PR-MoE-32/64+L21"
)
PAPER_NAMES = [
    *BASES,
    "350M+MoE-32",
    "350M+MoE-128",
    "1.3B+MoE-128",
    "350M+FirstHalf-MoE-32",
    "350M+SecondHalf-MoE-32",
    "350M+Top2-MoE-32",
    "350M+Residual-MoE-32",
    "350M+Pyramid-MoE-32/64",
    "350M+PR-MoE-32/64",
    "1.3B+PR-MoE-64/128",
    "350M+PR-MoE-32/64+L21",
    "1.3B+PR-MoE-64/128+L21",
]
