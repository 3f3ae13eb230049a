"""Where a branch starts: the trunk's checkpoint, or, where the trunk has none, one that is trained again.

With the same code on the same kind of processor, numbers depend on the spec alone: a trunk that is trained again up to
the branch point then gives the same checkpoint bit for bit and costs only time. On another kind of processor sums are
rounded differently, and the checkpoint differs a little. A trunk is trained again when it was taken over without
weights, or has removed the checkpoint because the branch was asked for later: in `<branch>/prefix/`, from the trunk's
nearest checkpoint before.

`token_budgets` makes the branches that differ only in their tokens, `shorter` one of them or its equal from scratch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moelab.config.parallel import ParallelConfig
from moelab.runs.spec import RunSpec, Start

if TYPE_CHECKING:
    from moelab.engine.checkpoint import Checkpoint

TrainUntil = Callable[[RunSpec, Path, "Checkpoint | None", int], None]
"""Trains a spec in a folder, from a checkpoint or from initial weights, until so many steps are done."""


def starting_point(
    spec: RunSpec, folder: Path, runs: Path, train_until: TrainUntil, say: Callable[[str], None]
) -> Checkpoint | None:
    """Return the checkpoint that a run begins with; None for initial weights, and when the run has one of its own.

    Every rank calls this.

    Args:
        folder: where the run is trained.
        runs: the folder of all runs.
        train_until: called where the trunk has no checkpoint of that point.
        say: gets one line that says so.

    Raises:
        ValueError: one line: the branch's layout does not fit the trunk, or its training has left no checkpoint.
    """
    from moelab.engine import checkpoint
    from moelab.engine.launch import process

    if spec.start is None:
        return None
    trunk, step, prefix = spec.start.run, spec.first_step, folder / "prefix"
    with process.unwatched():  # large files are read
        if checkpoint.latest(folder / "checkpoints") is not None:
            return None
        kept = checkpoint.latest(runs / trunk.id / "checkpoints", up_to=step)
        if kept is not None and kept.step == step:
            return kept
        begun = checkpoint.latest(prefix / "checkpoints", up_to=step)
    again = _trained_again(trunk, spec.parallel)
    begin = None if begun else kept or starting_point(again, prefix, runs, train_until, say)
    at = begun or begin
    say(
        f"the trunk {trunk.id} has kept no checkpoint after {spec.start.tokens} tokens; it is trained again up to "
        f"there, from {f'its step {at.step}' if at else 'initial weights'}; on the kind of processor that "
        "trained it first, this changes no number"
    )
    train_until(again, prefix, begin, step)
    with process.unwatched():
        restored = checkpoint.latest(prefix / "checkpoints", up_to=step)
    if restored is None or restored.step != step:
        raise ValueError(
            f"the trunk {trunk.id}, trained again, has left no whole checkpoint of step {step} in {prefix}; "
            "remove that folder and run again"
        )
    return restored


def _trained_again(trunk: RunSpec, wanted: ParallelConfig) -> RunSpec:
    """Return a trunk as it is trained again for a branch: in the branch's layout, without rows and checkpoints of it.

    Raises:
        ValueError: one line: that layout does not fit the trunk, whose model may be another.
    """
    quiet = replace(trunk.train, eval_every=trunk.train.steps(trunk.data.context) + 1, keep_at=(), tensorboard=False)
    try:
        return replace(trunk, train=quiet, parallel=wanted)
    except ValueError as error:
        raise ValueError(
            f"the trunk {trunk.id} must be trained again, which the layout of its branch does not fit: {error}; remove "
            "the trunk's folder and ask for both, which trains it in its own layout"
        ) from None


def token_budgets(trunk: RunSpec, budgets: Sequence[int]) -> list[RunSpec]:
    """Return a run for each budget of tokens that differs from the trunk only in where its cooldown begins and ends.

    Each starts from the trunk at its own cooldown, which takes the same share of its tokens, and equals the run of that
    budget trained from initial weights: together they cost the trunk and their cooldowns.

    Args:
        trunk: a run with `train.cooldown_tokens`.
        budgets: tokens, rounded to whole steps, as is where the decay begins. The trunk's own tokens give the trunk.

    Raises:
        ValueError: one line: the trunk has no such decay, or a budget is no budget of this trunk.
    """
    train = trunk.train
    if not train.cooldown_tokens:
        raise ValueError("token budgets: the trunk needs train.cooldown_tokens, a decay over its last tokens alone")
    a_step = train.batch_size * trunk.data.context
    runs = []
    for budget in budgets:
        if budget == train.tokens:
            runs.append(trunk)
            continue
        tokens = round(budget / a_step) * a_step
        start = round(tokens * (1 - train.cooldown_tokens / train.tokens) / a_step) * a_step
        start = min(start, tokens - a_step)  # the decay is a step at least
        least, most = max(a_step, train.warmup_tokens), train.tokens - train.cooldown_tokens
        if not least <= start <= most:
            raise ValueError(
                f"token budgets: a run of {budget} tokens decays from {start} on; the trunk of {train.tokens} "
                f"tokens has a rate that is constant from {least} to {most}"
            )
        own = replace(train, tokens=tokens, cooldown_tokens=tokens - start, keep_at=())
        runs.append(replace(trunk, train=own, start=Start(trunk, start)))
    return runs


def shorter(trunk: RunSpec, tokens: int) -> RunSpec:
    """Return the run of fewer tokens: a budget of the trunk, or a run from initial weights where that is not possible.

    That is where the rate is nowhere constant, or not yet where the decay would begin. Then warm-up and decay keep
    their shares of the tokens.
    """
    train = trunk.train
    share = train.cooldown_tokens / train.tokens
    if share and train.warmup_tokens <= tokens * (1 - share):
        with contextlib.suppress(ValueError):  # rounded to steps, the decay begins in the warm-up
            return token_budgets(trunk, [tokens])[0]
    warmup = round(train.warmup_tokens * tokens / train.tokens)
    own: dict[str, Any] = {
        "tokens": tokens,
        "warmup_tokens": warmup,
        "decay_tokens": round(train.decay_tokens * tokens / train.tokens),
        "cooldown_tokens": round(share * tokens),
        "keep_at": (),
    }
    return replace(trunk, train=replace(train, **own))
