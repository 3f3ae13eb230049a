"""Compare the points of a sweep: one table and one figure over all of them, published as a result of its own.

    <results>/<experiment>/<scale>-sweep/<date>-<time>/    points.jsonl, points.svg, ..., summary.json

Where the experiment trains, the value of a point is the final loss of each arm, from the run store; else that of each
claim, from the results of the points. So it is the same wherever the points' notebooks were executed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelab import paths, terminal
from moelab.design import budgets, comparison
from moelab.experiments import Experiment
from moelab.files import new_directory, read_json
from moelab.lazy import pd
from moelab.report.publication import Publication, lines
from moelab.report.summary import SUMMARY, parse
from moelab.runs.collection import Runs
from moelab.runs.store import Run, RunStore
from moelab.statistics import interval

NAME = "points"
"""Name of the figure and of the table."""


@dataclass(frozen=True)
class Sweep:
    """Describe a sweep.

    Attributes:
        varied: names of what varies, as on the command line: parameters of the notebook, or settings of its runs.
        points: all parameters of the notebook at each point.
    """

    varied: tuple[str, ...]
    points: tuple[dict[str, Any], ...]

    def at(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """Return what varies at a point: numbers and texts."""
        from moelab.plotting.sweeps import text

        settings = {name: _value(point, name) for name in self.varied}
        return {k: v if isinstance(v, str | int | float) else text(v) for k, v in settings.items()}

    def parameters(self) -> dict[str, Any]:
        """Return the parameters that do not vary, and the values of those that do in "sweep"."""
        first, overrides = self.points[0], self.points[0].get("overrides") or {}
        kept = {name: value for name, value in first.items() if name not in (*self.varied, "overrides")}
        kept |= {"overrides": fixed} if (fixed := {k: v for k, v in overrides.items() if k not in self.varied}) else {}
        return kept | {"sweep": {name: self._values(name) for name in self.varied}}

    def _values(self, name: str) -> list[Any]:
        values: list[Any] = []
        for point in self.points:
            values += [value] if (value := _value(point, name)) not in values else []
        return values


def _value(point: Mapping[str, Any], name: str) -> Any:
    return point[name] if name in point else (point.get("overrides") or {}).get(name)


@dataclass(frozen=True)
class Comparison:
    """Hold the values of a sweep's points.

    Attributes:
        table: a row for each point and arm: what varies; arm; runs, how many seeds have finished; loss, the mean of
            their final losses in nats per token; difference, that loss minus the loss of the point's first arm, paired
            by seed. Of an experiment that trains nothing a row for each point and claim: what varies; claim; value;
            unit; verdict. Loss, difference and value have their 95 % intervals in loss_low, loss_high and so on.
        runs: all runs of the points.
        lacking: points without a value, as texts.
    """

    table: pd.DataFrame
    runs: Runs
    lacking: tuple[str, ...]

    @property
    def series(self) -> str:
        """The column that names what is compared: "arm", "claim", or empty where no point has a value."""
        return next((name for name in ("arm", "claim") if name in self.table), "")

    @property
    def value(self) -> str:
        """The column of the values."""
        return "loss" if self.series == "arm" else "value"


def compare(experiment: Experiment, sweep: Sweep, results: Sequence[Path | None], store: RunStore) -> Comparison:
    """Return the values of all points that have one.

    Args:
        results: the folder of each point's result, None where there is none.
    """
    rows: list[dict[str, Any]] = []
    runs: dict[str, Run] = {}
    lacking: list[str] = []
    for point, folder in zip(sweep.points, results, strict=True):
        at, specs = sweep.at(point), experiment.specs_of(point) if experiment.trains else []
        own = Runs([store.run(spec, write=False) for spec in specs])
        runs |= {run.spec.id: run for run in own}
        values_there = _losses(budgets.trunks(own)) if specs else _claims(folder)
        rows += [at | row for row in values_there]
        lacking += [] if values_there else [" ".join(f"{name}={value}" for name, value in at.items())]
    return Comparison(pd.DataFrame(rows), Runs(list(runs.values())), tuple(lacking))


def _losses(runs: Runs) -> list[dict[str, Any]]:
    of = [(run.spec.title, run.spec.train.lr) for run in runs.finished]
    if not of:
        return []
    final = comparison.by_peak_rate(runs.final(), [rate for _, rate in of])
    # Where the point's first arm has no result, nothing takes its place, nor where it has none on the first seed.
    first = dict(zip(of, final["arm"], strict=True)).get((runs[0].spec.title, runs[0].spec.train.lr), "")
    rows = []
    for arm in dict.fromkeys(final["arm"]):
        losses = list(final.loc[final["arm"] == arm, "validation_loss"])
        paired = comparison.paired(final, arm, first) if arm != first else []
        row = {"arm": arm, "runs": len(losses)} | _interval("loss", losses)
        rows.append(row | _interval("difference", paired))
    return rows


def _interval(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """Return a mean and its 95 % interval; None for what the number of values does not give."""
    mean, low, high = interval(values) if values else (None, None, None)
    if len(values) < 2:
        low = high = None
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


def _claims(folder: Path | None) -> list[dict[str, Any]]:
    if folder is None:
        return []
    return [
        dict(claim=v.claim, value=v.ours, value_low=v.low, value_high=v.high, unit=v.unit, verdict=v.verdict)
        for v in parse(read_json(folder / SUMMARY)).claims
        if v.ours is not None
    ]


def headline(experiment: Experiment, sweep: Sweep, comparison: Comparison) -> str:
    """Return the main finding, one sentence."""
    over = " and ".join(sweep.varied)
    if comparison.series != "arm":
        return f"{experiment.title} over {over}"
    best = comparison.table.loc[comparison.table["loss"].idxmin()]
    where, runs = ", ".join(f"{name}={best[name]}" for name in sweep.varied), comparison.table["runs"]
    few = f"; points have {runs.min()} to {runs.max()} seeds" if runs.nunique() > 1 else ""
    return f"Over {over}, the lowest mean loss is {best['loss']:.3f} nats, of {best['arm']} at {where}{few}"


def publish(
    experiment: Experiment, sweep: Sweep, comparison: Comparison, *, publish: bool = False, name: str = ""
) -> Path | None:
    """Publish the table and the figure of a sweep, unless its newest result has the same; return the result's folder.

    None where no point has a value.

    Args:
        publish: into the published results instead of the user's own.
        name: of the folder; by default the time.
    """
    if not comparison.series:
        return None
    parameters = sweep.parameters()
    scale = f"{sweep.points[0]['scale']}-sweep"
    place = paths.results_for(publish) / experiment.name / scale
    before = sorted(place.glob(f"[!.]*/{NAME}.jsonl"), reverse=True)
    if before and before[0].read_text(encoding="utf-8") == lines(comparison.table):
        return before[0].parent
    moment = int(time.time())
    while (target := place / (name or time.strftime("%Y%m%d-%H%M%S", time.gmtime(moment)))).exists() and not name:
        moment += 1  # another result has this second
    try:
        with new_directory(target) as staging:
            publication = Publication(experiment.name, scale, parameters, staging, interactive=False)
            _write(publication, experiment, sweep, comparison)
    except OSError:  # two jobs that ended together both write it
        if not (target / SUMMARY).exists():
            raise
    return target


def _write(publication: Publication, experiment: Experiment, sweep: Sweep, comparison: Comparison) -> None:
    from matplotlib import pyplot as plt

    from moelab.plotting import sweeps

    losses, title = comparison.series == "arm", headline(experiment, sweep, comparison)
    lacking = f" Without a value: {'; '.join(comparison.lacking)}." if comparison.lacking else ""
    values = {"value": ""}
    if losses:
        nats = "(nats per token)"
        values = {"loss": f"final validation loss {nats}", "difference": f"minus the first arm's {nats}"}
    figure = sweeps.draw(comparison.table, sweep.varied, series=comparison.series, values=values)
    what = "Final validation loss of each arm, nats per token" if losses else "Value of each claim, in its unit"
    spread = "mean over seeds with its 95 % interval" if losses else "with its 95 % interval where there is one"
    paired = " Differences are to the first arm of the point, paired by seed." if losses else ""
    caption = f"{what}, at each point of the sweep; {spread}.{paired}{lacking}"
    publication.figure(figure, NAME, title=title, caption=caption, data=comparison.table)
    plt.close(figure)
    publication.table(comparison.table, NAME, title="all points of the sweep", caption=caption)
    publication.finish(comparison.runs if losses else None, title=title)


def show(sweep: Sweep, comparison: Comparison) -> None:
    """Print the table of a sweep."""

    def number(value: float | None) -> str:
        return "" if value is None or pd.isna(value) else f"{value:.4g}"

    def spread(row: Mapping[str, Any], name: str) -> str:
        low, high = row[f"{name}_low"], row[f"{name}_high"]
        return "" if low is None or pd.isna(low) else f"{number(low)} to {number(high)}"

    losses, console = comparison.series == "arm", terminal.console()
    if comparison.series:
        more = ("seeds", "minus the first arm's", "95 % interval") if losses else ("verdict",)
        view = terminal.table(*sweep.varied, comparison.series, comparison.value, "95 % interval", *more)
        for row in comparison.table.astype(object).to_dict("records"):
            cells = [*(str(row[name]) for name in (*sweep.varied, comparison.series)), number(row[comparison.value])]
            cells.append(spread(row, comparison.value))
            if losses:
                cells += [str(row["runs"]), number(row["difference"]), spread(row, "difference")]
            view.add_row(*cells, *([] if losses else [row["verdict"]]))
        console.print(view)
    for point in comparison.lacking:
        console.print(f"no value at {point}", markup=False, highlight=False)
