"""What the benchmarks share: timing in turns, ceilings measured in the same run, one table and one file of numbers."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Candidate = Callable[[], Any]


def device_name(device: str) -> str:
    """The card's or the processor's name."""
    if device == "cuda":
        return torch.cuda.get_device_name(0)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"


def seconds(call: Candidate, device: str) -> float:
    """One timed call, waiting for the device."""
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def in_turns(
    candidates: dict[str, Candidate], rounds: int, device: str, budget_s: float = 60.0
) -> dict[str, list[float]]:
    """Seconds of each candidate, `rounds` times (at least 3, fewer than asked when `budget_s` is spent), after a warm-up of two calls.

    The candidates take turns, so that a machine that slows down slows them alike.
    """
    for call in candidates.values():
        call()
        call()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    started = time.monotonic()
    for i in range(rounds):
        for name, call in candidates.items():
            times[name].append(seconds(call, device))
        if i >= 2 and time.monotonic() - started > budget_s:
            break
    return times


def gemm_rate(dtype: torch.dtype, device: str, largest: int = 2048) -> float:
    """FLOP/s of an n x n x n product, median of five; n is `largest`, or less where that would take long (bf16 on a CPU that has none)."""
    n = min(256, largest)
    while True:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        a @ b
        if n == largest or seconds(lambda a=a, b=b: a @ b, device) > 0.1:
            break
        n = min(2 * n, largest)
    return 2 * n**3 / statistics.median(seconds(lambda: a @ b, device) for _ in range(5))


def copy_rate(device: str, size: int = 1 << 28) -> float:
    """Bytes/s, read plus written, of copying memory larger than the caches, median of five."""
    a = torch.empty(size, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    b.copy_(a)
    return 2 * size / statistics.median(seconds(lambda: b.copy_(a), device) for _ in range(5))


def rows(case: dict[str, Any], times: dict[str, list[float]], against: str, floor_s: float) -> list[dict[str, Any]]:
    """Tidy rows of one case. `ratio` is a candidate's time over `against`'s, round by round; `floor_ratio` its time over the floor."""
    found = []
    for name, measured in times.items():
        ratios = [a / b for a, b in zip(measured, times[against], strict=True)]
        median = statistics.median(measured)
        found.append(
            {
                **case,
                "candidate": name,
                "median_ms": median * 1e3,
                "min_ms": min(measured) * 1e3,
                "max_ms": max(measured) * 1e3,
                "rounds": len(measured),
                "against": against,
                "ratio": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "floor_ms": floor_s * 1e3,
                "floor_ratio": median / floor_s,
            }
        )
    return found


def show(title: str, found: list[dict[str, Any]]) -> None:
    """Print the rows of one case."""
    from rich.console import Console
    from rich.table import Table

    against = found[0]["against"]
    view = Table(
        "candidate",
        "median ms",
        "min to max",
        f"time / {against}",
        "min to max",
        "time / floor",
        title=title,
        title_justify="left",
    )
    for row in found:
        view.add_row(
            row["candidate"],
            f"{row['median_ms']:.3g}",
            f"{row['min_ms']:.3g} to {row['max_ms']:.3g}",
            f"{row['ratio']:.2f}",
            f"{row['ratio_min']:.2f} to {row['ratio_max']:.2f}",
            f"{row['floor_ratio']:.2f}",
        )
    Console().print(view)


def write(found: list[dict[str, Any]], path: Path) -> None:
    """JSON lines, replaced in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in found))
    part.replace(path)
    print(f"written to {path}")


def figure(found: list[dict[str, Any]], *, title: str, panel: str | None = None) -> Figure:
    """Times relative to `against` over the number of experts: medians of the rounds, bars from least to greatest.

    Args:
        panel: a column, one panel for each of its values.
    """
    import matplotlib.pyplot as plt

    colors = ("#D55E00", "#E69F00", "#0072B2", "#009E73", "#6E6E6E", "#CC79A7", "#56B4E9")
    panels = list(dict.fromkeys(row[panel] for row in found)) if panel else [None]
    names = list(dict.fromkeys(row["candidate"] for row in found if row["candidate"] != row["against"]))
    fig, axes = plt.subplots(1, len(panels), figsize=(3.2 + 4 * len(panels), 4.4), sharey=True, squeeze=False)
    for ax, value in zip(axes[0], panels, strict=True):
        shown = [row for row in found if panel is None or row[panel] == value]
        experts = list(dict.fromkeys(row["experts"] for row in shown))
        for i, name in enumerate(names):
            rows_ = [row for row in shown if row["candidate"] == name]
            at = [experts.index(row["experts"]) + (i - (len(names) - 1) / 2) * 0.11 for row in rows_]
            ratio = [row["ratio"] for row in rows_]
            spread = [[r["ratio"] - r["ratio_min"] for r in rows_], [r["ratio_max"] - r["ratio"] for r in rows_]]
            ax.errorbar(at, ratio, yerr=spread, fmt="o", capsize=3, color=colors[i % len(colors)], label=name)
        ax.axhline(1, color="#888888", linewidth=1)
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter(lambda v, _: f"{v:g}")
        ax.yaxis.set_minor_formatter(lambda v, _: f"{v:g}" if f"{v:e}"[0] in "25" else "")
        ax.set_xticks(range(len(experts)), [str(e) for e in experts])
        ax.set_xlabel("experts")
        ax.set_title("" if value is None else str(value), loc="left", fontsize=10)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", alpha=0.35)
    axes[0][0].set_ylabel(f"time / {found[0]['against']} (median, least to greatest)")
    axes[0][-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    fig.suptitle(f"{title}\n{found[0]['device']}", x=0.01, ha="left", fontsize=11)
    fig.tight_layout()
    return fig


def draw(found: list[dict[str, Any]], path: Path, *, title: str, panel: str | None = None) -> None:
    """PNG and SVG of `figure`; `path` without suffix."""
    import matplotlib

    matplotlib.use("Agg")
    save(figure(found, title=title, panel=panel), path)


def save(fig: Figure, path: Path) -> None:
    """PNG and SVG; `path` without suffix."""
    import matplotlib.pyplot as plt

    for suffix in ("png", "svg"):
        fig.savefig(path.with_suffix(f".{suffix}"), dpi=160, bbox_inches="tight")
    plt.close(fig)
    print(f"drawn to {path.with_suffix('.png')}")


def span(found: list[dict[str, Any]], candidate: str) -> str:
    """ "1.0 to 2.4": the least and greatest median ratio of a candidate."""
    ratios = [row["ratio"] for row in found if row["candidate"] == candidate]
    return f"{min(ratios):.1f} to {max(ratios):.1f}"
