"""What an experiment is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moelab.runs.spec import RunSpec

Measure = Callable[..., Any]
"""`Lab.measure`: calls a function with arguments, or reads back what the same call returned earlier on this machine."""


@dataclass(frozen=True)
class Scale:
    """A size at which an experiment runs.

    Attributes:
        what: one line: models, tokens, text.
        cost: one line: time and hardware, measured or estimated (it says which).
    """

    what: str
    cost: str


@dataclass(frozen=True)
class Experiment:
    """One experiment of the paper.

    Attributes:
        name: how the command line calls it.
        title: one line.
        paper: figure, table or section.
        question: what it asks, one line.
        paper_answer: what the paper found, one line.
        notebook: file name in `notebooks/`.
        scales: scale name -> Scale.
        specs: the runs, from scale, seeds and whatever else the notebook's parameters say; `no_runs` where nothing is trained.
        trains: the notebook asks for these runs to be trained; False if it only measures their steps.
        measures: the notebook measures time, so nothing else should run beside it.
    """

    name: str
    title: str
    paper: str
    question: str
    paper_answer: str
    notebook: str
    scales: Mapping[str, Scale]
    specs: Callable[..., Sequence[RunSpec]]
    trains: bool = True
    measures: bool = False

    def scale(self, name: str) -> Scale:
        """ValueError, one line, for a scale this experiment does not have."""
        if name not in self.scales:
            raise ValueError(f"experiment {self.name}: no scale {name!r}; allowed: {', '.join(self.scales)}")
        return self.scales[name]


def no_runs(scale: str = "cpu", seeds: int = 1, **_: object) -> list[RunSpec]:
    """The specs of an experiment that trains nothing: a simulation, or a measurement that the notebook makes itself."""
    return []
