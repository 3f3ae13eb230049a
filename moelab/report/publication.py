"""Publish what a notebook found as files: figures, the data behind them, claims, provenance.

<results>/<experiment>/<scale>/<date>-<time>/summary.json      what is here, how it came about
                                             <name>.svg, .jsonl                a figure and its data
                                             notebook.ipynb, notebook.html     the executed notebook
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moelab import environment, paths
from moelab.design.conclusion import Conclusion, conclude
from moelab.files import read_json, write_text
from moelab.lazy import pd
from moelab.report.summary import SUMMARY, FigureRow, TableRow, check_file_name, compared
from moelab.runs.provenance import provenance

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from moelab.design.verdicts import Verdict
    from moelab.runs.collection import Runs
    from moelab.runs.measurements import Measurement


@dataclass
class Publication:
    """Writes what one notebook publishes; `finish` writes the summary that makes it a result.

    Attributes:
        path: the folder to write to.
        interactive: whether this is a draft (JupyterLab), not a batch run.
        measurements: those that the lab made or read back, see `Lab.measure`.
    """

    experiment: str
    scale: str
    parameters: dict[str, Any]
    path: Path
    interactive: bool
    measurements: Sequence[Measurement] = ()
    figures: list[FigureRow] = field(default_factory=list)
    tables: list[TableRow] = field(default_factory=list)
    verdicts: list[Verdict] = field(default_factory=list)
    started: float = field(default_factory=time.time)

    @classmethod
    def open(
        cls, experiment: str, scale: str, parameters: dict[str, Any], measurements: Sequence[Measurement] = ()
    ) -> Publication:
        """Open the folder that the command gives to a batch run (`MOELAB_PUBLICATION`), else an empty draft.

        Raises:
            ValueError: one line: experiment or scale is not the plain name of a folder, parameters are no JSON, which
                the summary holds them as, or a link leads out of the drafts.
        """
        check_file_name("experiment", experiment)
        check_file_name("scale", scale)
        try:
            json.dumps(parameters)
        except (TypeError, ValueError) as error:
            raise ValueError(f"parameters of {experiment}: {error}") from None
        given = environment.PUBLICATION.get()
        drafts = paths.home() / "drafts"
        path = Path(given) if given else drafts / experiment / scale
        if not given and path.exists():
            if path.resolve() != drafts.resolve() / experiment / scale:
                raise ValueError(f"{path} is a link out of {drafts}; a draft's folder is emptied, so remove the link")
            shutil.rmtree(path)
        path.mkdir(parents=True, exist_ok=True)
        return cls(experiment, scale, parameters, path, interactive=given is None, measurements=measurements)

    def figure(
        self,
        figure: Figure,
        name: str,
        *,
        title: str,
        caption: str = "",
        data: pd.DataFrame | None = None,
        claims: Sequence[str] = (),
    ) -> None:
        """Write the title above a figure that has none, and save it as SVG and the numbers it shows as JSON lines.

        A figure of the same name, from an earlier execution of the cell, is replaced.

        Args:
            title: the finding, one sentence.
            claims: ids of the paper's claims that the figure shows; the ledger links them to it.

        Raises:
            ValueError: one line: a table of that name has other rows, in the same file.
        """
        from moelab.plotting import figures

        row = FigureRow(name, title, caption, tuple(claims), "" if data is None else f"{name}.jsonl")
        if not figure.get_suptitle():
            figures.title(figure, title)
        figures.save(figure, self.path / name, title=title)
        if data is not None:
            self._write(row.data, data, self.tables)
        self.figures = [*(other for other in self.figures if other.name != name), row]

    def table(self, data: pd.DataFrame, name: str, *, title: str, caption: str = "") -> None:
        """Save a table as JSON lines; otherwise as `figure`."""
        row = TableRow(name, f"{name}.jsonl", title, caption)
        self._write(row.data, data, self.figures)
        self.tables = [*(other for other in self.tables if other.name != name), row]

    def _write(self, file: str, data: pd.DataFrame, others: Sequence[FigureRow | TableRow]) -> None:
        text = lines(data)
        if any(other.data == file for other in others) and (self.path / file).read_text(encoding="utf-8") != text:
            raise ValueError(f"{file}: a figure and a table with other rows have this name; give one of them another")
        write_text(self.path / file, text)

    def claims(self, verdicts: Sequence[Verdict]) -> None:
        """Keep the verdicts on the paper's claims, with the values that they were judged by, for the summary."""
        self.verdicts = list(verdicts)

    def finish(self, runs: Runs | None = None, *, title: str) -> str:
        """Write the summary; return one line that says where everything is.

        Args:
            runs: the training runs behind it; none for an experiment that trains nothing.
            title: the main finding, one sentence.
        """
        finished = runs.finished if runs is not None else ()
        once = {run.spec.id: run for run in finished}.values()  # a run may stand for its own and for the shared rate
        hardware = [run.provenance.get("hardware") for run in finished]
        record = {
            "experiment": self.experiment,
            "scale": self.scale,
            "title": title,
            "parameters": self.parameters,
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "notebook_seconds": round(time.time() - self.started, 1),
            "training_seconds": round(sum(run.own_seconds for run in once), 1),
            "seeds": sorted({run.spec.train.seed for run in finished}),
            "hardware": hardware[0] if hardware else None,
            "figures": [asdict(row) for row in self.figures],
            "tables": [asdict(row) for row in self.tables],
            "claims": [asdict(verdict) for verdict in self.verdicts],
            "missing": list(dict.fromkeys(run.spec.id for run in runs.missing)) if runs is not None else [],
            "broken_down": runs.broken_down if runs is not None else [],
            "runs": [
                {
                    "id": run.spec.id,
                    "label": run.spec.title,
                    "spec": run.spec.to_json(),
                    "result": run.result,
                    "provenance": run.provenance,
                }
                for run in finished
            ],
            "measurements": [one.summary() for one in self.measurements],
            "provenance": provenance(),
        }
        write_text(self.path / SUMMARY, by_rows(record))
        if self.interactive:
            return f"draft written to {self.path}"
        return f"result handed over as {self.experiment}, scale {self.scale}"

    def conclude(self, runs: Runs | None = None, *, title: str, simulated: bool = False, sure: str = "") -> Conclusion:
        """Finish, print where everything is, and return the conclusion, which a notebook shows at the end of a cell.

        Of a draft it prints a published run's loss, too, next to that of the same run here.

        Args:
            runs, title: as of `finish`.
            simulated, sure: as of `moelab.design.conclusion.conclude`.
        """
        print(self.finish(runs, title=title))
        # `moelab run` ends with this line, too.
        if self.interactive and (line := compared(read_json(self.path / SUMMARY))):
            print(line)
        seeds = runs.seeds if runs is not None else 0
        return conclude(title, self.verdicts, seeds=seeds, simulated=simulated, sure=sure, scale=self.scale)


def lines(data: pd.DataFrame) -> str:
    """Return the rows of a frame as JSON lines, with an index that has a name as columns."""
    named = [name for name in data.index.names if name is not None and name not in data]
    return (data.reset_index(named) if named else data).to_json(orient="records", lines=True, double_precision=15)


def by_rows(record: dict[str, Any]) -> str:
    """Return a JSON object with a line for each value, and a line for each object of a list: of 180 runs, 180 lines."""

    def value(part: Any) -> str:
        if isinstance(part, list) and part and isinstance(part[0], dict):
            return "[\n    " + ",\n    ".join(json.dumps(row, separators=(",", ":")) for row in part) + "\n  ]"
        return json.dumps(part)

    return "{\n  " + ",\n  ".join(f"{json.dumps(key)}: {value(part)}" for key, part in record.items()) + "\n}\n"
