"""Describe an experiment: `Experiment`, and how its runs follow from a scale, seeds, arms and overrides."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from moelab.config import RoutingConfig
from moelab.config.overrides import check_overrides
from moelab.design import rates, settings
from moelab.runs.spec import RunSpec

Measure = Callable[..., Any]
"""`Lab.measure`: calls a function with arguments, or reads back what the same call returned earlier on this machine."""


class Plan(TypedDict):
    """Hold the plan of an experiment's comparisons at a scale, as arguments of those who judge them."""

    looks: tuple[int, ...]
    decides_from: int


@dataclass(frozen=True)
class Scale:
    """Describe a size at which an experiment runs.

    Attributes:
        what: one line: models, tokens, text.
        cost: one line: time and hardware, with the word whether they are measured or estimated.
    """

    what: str
    cost: str


def twin_scales(runs: int, paper: str | None = None, quick: int = 0, full: int = 0) -> dict[str, Scale]:
    """Return the scales of an experiment on twins of the 350M base.

    Args:
        runs: of a seed, for the cost of a seed at `quick` and `cpu`: 1 and 13 minutes a run on a quiet core (measured).
        paper: what the `paper` scale trains; None where there is no such scale.
        quick: runs of a seed at `quick` where it has fewer arms.
        full: runs of a seed at `full`, those of dense arms at two rates; 0 where there is no such scale.
    """
    scales = {
        "smoke": Scale("twins of 32 wide, 4 layers; 12 k tokens of sotu", "seconds (tests)"),
        "quick": Scale(
            "twins 32 wide, 8 layers; 1 M tokens of mix5", f"about {quick or runs} minutes a seed on one core"
        ),
        "cpu": Scale(
            "twins 32 wide, 8 layers; 16.4 M tokens of mix5", f"about {13 * runs / 60:.1f} hours a seed on one core"
        ),
    }
    if full:
        scales["full"] = Scale(
            "twins 32 wide (1.3B base: 64, twice the cost), 8 layers; 101.6 M tokens of mix15",
            full_cost(full * FULL_HOURS["350M"]),
        )
    scales["gpu"] = Scale("twins 128 wide, 12 layers; 400 M tokens of the Pile", "not yet run; one GPU")
    return scales | ({"paper": Scale(paper, "not run; see its dry run")} if paper else {})


LOOKS = {"full": (3, 6, 9)}
"""Scale -> the looks of experiments that name none; elsewhere there is one, at three seeds."""

FULL_HOURS = {"350M": 0.35, "1.3B": 0.65, "6.7B": 2.4}
"""Base -> hours of a run at `full` on a core of a Zen 5: measured, but for 6.7B, which is estimated."""


def full_cost(hours: float) -> str:
    """Return the cost of a seed at `full` in words."""
    return f"about {hours:.1f} hours a seed on one core of a Zen 5, up to four times as long on others"


MAX_SEEDS = 1000
"""More seeds are refused as a typing error: a plan of so many runs takes minutes to print."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Describe one experiment of the paper, or beyond it.

    Attributes:
        name: on the command line and in the results: the name of the module, with hyphens.
        number: position in lists; the two digits that the notebook's file name begins with.
        title: one line.
        paper: figure, table or section.
        question: what it asks, one line.
        paper_answer: what the paper found, one line.
        scales: scale name -> Scale.
        arms: the compared models: label -> name of the paper's model, or arguments of `settings.spec`, whose
            `overrides` yield to those that a user gives. None where `build` makes the runs, or where nothing is
            trained.
        build: ``build(scale, seed, overrides, *, options)`` returns the runs of one seed, for an experiment whose runs
            are more than arms times seeds, or fewer at some scale; its keyword-only options are parameters of the
            notebook, but for ``rate``: with it the runs of `full` are built at both rates (`rates`).
        check: raises a one-line ValueError for values of the notebook's parameters that it could not use after the
            runs have been trained; called before. Parameters that are left out are not there.
        trains: the notebook asks for these runs to be trained; False if it only measures their steps.
        measures: the notebook measures time, so nothing else should run beside it.
        measures_on_gpu: scales at which the notebook's own process works on a GPU: it measures time, or asks a model
            with its weights.
        looks: scale -> numbers of seeds at which its comparisons are judged, increasing, see
            `moelab.design.sequential`; other scales as `LOOKS` says. It is set before the first run, by what
            `moelab power` says, so that no verdict comes from adding seeds until it turns.
    """

    name: str
    number: int
    title: str
    paper: str
    question: str
    paper_answer: str
    scales: Mapping[str, Scale]
    arms: Mapping[str, str | Mapping[str, Any]] | None = None
    build: Callable[..., list[RunSpec]] | None = None
    check: Callable[[Mapping[str, Any]], None] | None = None
    trains: bool = True
    measures: bool = False
    measures_on_gpu: tuple[str, ...] = ()
    looks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for scale, looks in self.looks.items():
            self.scale(scale)
            if not isinstance(looks, tuple) or not looks or looks[0] < 1 or list(looks) != sorted(set(looks)):
                raise ValueError(
                    f"experiment {self.name}: looks of {scale} must be increasing numbers of seeds, such as (3, 6, 9), "
                    f"got {looks!r}"
                )

    @property
    def module(self) -> str:
        """Name of its module."""
        return self.name.replace("-", "_")

    @property
    def notebook(self) -> str:
        """File name of its notebook."""
        return f"{self.number:02d}_{self.module}.ipynb"

    def scale(self, name: str) -> Scale:
        """Return a scale by its name; raise a one-line ValueError if this experiment does not have it."""
        if name not in self.scales:
            raise ValueError(f"experiment {self.name}: no scale {name!r}; allowed: {', '.join(self.scales)}")
        return self.scales[name]

    def looks_at(self, scale: str) -> tuple[int, ...]:
        """Return the numbers of seeds at which comparisons are judged at a scale."""
        return self.looks.get(scale) or LOOKS.get(scale) or (3,)

    def plan(self, scale: str, base: str = settings.BASES[0]) -> Plan:
        """Return what judges and headlines of a scale take: its looks, and the first seed that decides.

        Args:
            base: one of `settings.BASES`; that of the larger was chosen after some seeds of it had been seen.
        """
        return {"looks": self.looks_at(scale), "decides_from": settings.FIRST_DECIDING.get((scale, base), 0)}

    def specs(
        self,
        scale: str = "cpu",
        seeds: int = 1,
        *,
        first_seed: int = 0,
        arms: Sequence[str] | None = None,
        overrides: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> list[RunSpec]:
        """Return the runs, seed by seed, so that a batch that is stopped early has whole seeds.

        There are none where nothing is trained.

        Args:
            seeds: how many, at most `MAX_SEEDS`; they are first_seed .. first_seed + seeds - 1.
            first_seed: 0, or that of runs whose weights are at hand where an experiment measures weights.
            arms: labels of the arms that are wanted, with the runs that branch off theirs; by default all of them.
            overrides: dotted name -> value, see `moelab.config.overrides`, in place of the scale's own settings in
                every run.
            options: of `build`.

        Raises:
            ValueError: one line that begins with the experiment's name.
        """
        self.scale(scale)
        try:
            for name, value in {"seeds": seeds, "first_seed": first_seed, "arms": arms, "overrides": overrides}.items():
                if isinstance(value, str):
                    raise ValueError(
                        f"{name} cannot be the text {value!r}; papermill takes lists and objects by -y, not -p"
                    )
            if not 1 <= seeds <= MAX_SEEDS:
                raise ValueError(f"seeds must be 1 to {MAX_SEEDS}, got {seeds}")
            if not 0 <= first_seed < 2**32:
                raise ValueError(f"first_seed must be 0 to {2**32 - 1}, got {first_seed}")
            given = check_overrides(overrides or {})
            made = [
                spec
                for seed in range(first_seed, first_seed + seeds)
                for spec in self._of_seed(scale, seed, given, options)
            ]
            labels = dict.fromkeys(label for spec in made for label in (_arm(spec), rates.arm(spec.label)))
            if unknown := [arm for arm in arms or () if arm not in labels]:
                raise ValueError(f"unknown arm {unknown[0]!r}; allowed: {', '.join(labels)}")
            if any(name.startswith("distill.") for name in given) and not any(spec.distill for spec in made):
                raise ValueError("settings of distill.… need a run that has a teacher, and there is none")
            chosen = [spec for spec in made if not arms or _arm(spec) in arms or rates.arm(spec.label) in arms]
            by_id: dict[str, str] = {}
            for spec in chosen if given else ():
                arm = rates.arm(spec.label)
                if (other := by_id.setdefault(spec.id, arm)) != arm:
                    raise ValueError(f"with {', '.join(given)} the arms {other!r} and {arm!r} are one and the same run")
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        return chosen

    def specs_of(self, parameters: Mapping[str, Any]) -> list[RunSpec]:
        """Return the runs that the notebook asks for; parameters that do not concern the runs are ignored."""
        options = inspect.signature(self.build).parameters.values() if self.build else ()
        taken = {"scale", "seeds", "first_seed", "arms", "overrides"} | {
            o.name for o in options if o.kind is o.KEYWORD_ONLY and o.name != "rate"
        }
        return self.specs(**{name: value for name, value in parameters.items() if name in taken and value is not None})

    def _of_seed(
        self, scale: str, seed: int, overrides: Mapping[str, Any], options: Mapping[str, Any]
    ) -> list[RunSpec]:
        if options and not self.build:
            raise ValueError(f"no option {next(iter(options))!r}; allowed: scale, seeds, arms, overrides")
        build = self.build or self._from_arms
        if scale == "full" and "rate" in inspect.signature(build).parameters:
            return rates.at_both(lambda rate: build(scale, seed, overrides, **options, rate=rate))
        return build(scale, seed, overrides, **options)

    def _from_arms(
        self, scale: str, seed: int, overrides: Mapping[str, Any], *, rate: settings.Rate = "own"
    ) -> list[RunSpec]:
        made = []
        for label, arm in (self.arms or {}).items():
            arguments = _arguments(label, arm)
            arguments["overrides"] |= overrides
            made.append(settings.spec(**arguments, scale=scale, seed=seed, label=label, rate=rate))
        return made


def at_least_one(experiment: str, names: Sequence[str], parameters: Mapping[str, Any]) -> None:
    """Refuse numbers below 1, as an experiment's `check` or a part of it; ValueError, one line.

    Args:
        names: of the parameters that are such numbers, where they are given.
    """
    for name in names:
        if (value := parameters.get(name)) is not None and value < 1:
            raise ValueError(f"{experiment}: {name} must be at least 1, got {value}")


def _arguments(label: str, arm: str | Mapping[str, Any]) -> dict[str, Any]:
    """Return an arm's arguments of `settings.spec`, its overrides checked.

    Raises:
        ValueError: one line that names the arm: no model's name, an unknown key, or a value of another type.
    """
    where = f"arm {label!r}"
    given: Mapping[str, Any] = {"name": arm} if isinstance(arm, str) else arm
    if not isinstance(given, Mapping):
        raise ValueError(f"{where}: expected a model's name or a mapping with name, got {type(arm).__name__}")
    # The scale, the seed and the rate are the experiment's.
    taken = ("scale", "seed", "label", "rate")
    allowed = [name for name in inspect.signature(settings.spec).parameters if name not in taken]
    if unknown := [key for key in given if key not in allowed]:
        raise ValueError(f"{where}: no field {unknown[0]!r}; allowed: {', '.join(allowed)}")
    for key, kind in (("name", str), ("overrides", Mapping), ("routing", RoutingConfig)):
        value = given.get(key)
        if not isinstance(value, kind) and (value is not None or key == "name"):
            got = "nothing" if value is None else type(value).__name__
            raise ValueError(f"{where}: {key} must be a {kind.__name__}, got {got}; allowed: {', '.join(allowed)}")
    try:
        own = check_overrides(given.get("overrides") or {})
        if not given.get("distill") and any(name.startswith("distill.") for name in own):
            raise ValueError("settings of distill.… need a teacher, and it has none")
        return {**given, "overrides": own}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _arm(spec: RunSpec) -> str:
    """Return the label of the run that a branch belongs to, of others their own; without the rate."""
    return rates.arm(spec.start.run.label if spec.start else spec.label)
