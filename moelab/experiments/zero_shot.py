"""Score zero-shot tasks (paper Tables 2, 4 and 5).

Shows: for the trained twins the right answers' bits per byte, over the tasks whose requests fit the context (the
headline: they change long before accuracy does); accuracy on six tasks beside chance, with n and standard errors; and
the paper's table.

Fixed before the first run: 3 seeds, all arms on each; at `cpu` seeds 3 to 5, because of the seeds before only numbers
were kept (decided before any was scored). Expect: accuracy at chance, because twins of 0.2 to 17 M parameters that
read 16 M or 102 M tokens cannot answer. The pipeline is that of a run at `paper` scale. The tasks come from a package,
so no network is needed; other data sets replace RACE-h and WebQs, under their own names.

At `full` the larger models of `scaling` (Table 2) and the students of `distillation` (Table 5) are scored as well.
Fixed before any run of an arm was scored: its pairs in `PAIRS`, 200 items of each task, seeds 0 to 2.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moelab import paper, paths
from moelab.design import comparison, settings
from moelab.design.experiment import Experiment, Scale
from moelab.design.judging import judge
from moelab.design.verdicts import Verdict
from moelab.experiments import distillation
from moelab.files import write_json, write_text
from moelab.lazy import pd
from moelab.runs import evaluations
from moelab.runs.provenance import provenance
from moelab.runs.spec import RunSpec
from moelab.terminal import task_progress

if TYPE_CHECKING:
    from moelab.evaluation.zero_shot import OnProgress, Score
    from moelab.runs.collection import Runs
    from moelab.runs.store import Run, RunStore

ARMS = {"Dense": "350M", "MoE-128": "350M+MoE-128", "PR-MoE-32/64": "350M+PR-MoE-32/64"}
LARGER = {name: name for name in ("1.3B", "1.3B+MoE-128", "6.7B")}
"""Further arms of Table 2, at `full`."""
STUDENTS = ("L21 alone", "L21 + KD", "L21 + staged KD")
"""Arms of the experiment `distillation` that are scored at `full`; their teacher is PR-MoE-32/64."""
PAIRS = (
    ("MoE-128", "Dense"),
    ("PR-MoE-32/64", "Dense"),
    ("PR-MoE-32/64", "MoE-128"),
    ("MoE-128", "1.3B"),
    ("1.3B+MoE-128", "1.3B"),
    ("1.3B+MoE-128", "6.7B"),
    ("L21 alone", "PR-MoE-32/64"),
    ("L21 + staged KD", "PR-MoE-32/64"),
    ("L21 + KD", "L21 alone"),
    ("L21 + staged KD", "L21 alone"),
    ("L21 + staged KD", "L21 + KD"),
)
"""Pairs of arms whose bits per byte are compared: those of Table 2, Table 4 and Table 5."""
REFERENCE = "smollm2"
"""What `moelab eval` calls the real model that checks the pipeline, see `moelab.evaluation.models`."""
LIMITS = {"smoke": 8, "quick": 50, "cpu": 200, "full": 200, "gpu": 1000, "paper": 0}
"""Items of each task by scale; 0 is all."""

MAX_CUT = 0.1
"""Largest share of a task's requests that may lose their beginning, if the task is to count in the average of bits."""


def arms(scale: str) -> list[str]:
    """Return the arms of a scale."""
    return [*ARMS, *((*LARGER, *STUDENTS) if scale == "full" else ())]


def build(scale: str, seed: int, overrides: Mapping[str, Any], *, rate: settings.Rate = "own") -> list[RunSpec]:
    """Return the runs of one seed: every arm of `arms`, the students as `distillation` has them."""
    given: dict[str, Any] = {"scale": scale, "seed": seed, "overrides": overrides, "rate": rate}
    specs = [settings.spec(name, **given, label=arm) for arm, name in ARMS.items()]
    if scale == "full":
        specs += [settings.spec(name, **given, label=name) for name in LARGER]
        specs += [spec for spec in distillation.build(**given) if spec.label in STUDENTS]
    return specs


def require(specs: Sequence[RunSpec], store: RunStore, limit: int) -> None:
    """Check that finished runs have weights or scores; ValueError, one line. Called before the others are trained."""
    evaluations.require_of_finished(specs, store, score, limit, _versions())


def _versions() -> dict[str, str]:
    """Return the packaged tasks and the versions of their definitions."""
    from moelab.evaluation.zero_shot import PACKAGED, definition

    return {task: str(definition(task)["metadata"]["version"]) for task in PACKAGED}


def measure(runs: Runs, limit: int) -> list[dict]:
    """Score every finished run on the packaged tasks, a row per run and task; scores that are stored are read back.

    Args:
        limit: as of `moelab.evaluation.zero_shot.evaluate`.

    Returns:
        Rows of arm, seed, paper (the paper's column, or empty), and the fields of `Score`.
    """
    from moelab.evaluation.zero_shot import PAPER_TASKS

    columns = {name: column for column, names in PAPER_TASKS.items() for name in names}
    versions = _versions()
    for run in runs.finished:  # before the first takes its time
        evaluations.require(run, score, limit, versions)
    rows = []
    with task_progress() as show:
        for run in runs.finished:
            arm, seed = run.spec.title, run.spec.train.seed
            scores = evaluations.measure(
                run,
                score,
                limit,
                versions,
                on_progress=lambda task, done, total, arm=arm, seed=seed: show(
                    f"{arm}, seed {seed}: {task}", done, total
                ),
            )
            rows += [{"arm": arm, "seed": seed, "paper": columns.get(s["task"], ""), **s} for s in scores]
    return rows


def check(parameters: Mapping[str, Any]) -> None:
    """Refuse a number of items that gives no standard error; ValueError, one line."""
    limit = parameters.get("limit")
    if limit is not None and (limit < 0 or limit == 1):
        raise ValueError(f"zero-shot: limit must be 0 (all items) or at least 2, got {limit}")


def score(run: Run, limit: int, versions: Mapping[str, str], on_progress: OnProgress) -> list[dict[str, Any]]:
    """Return the fields of a run's `Score` in each of the tasks.

    Args:
        limit, on_progress: as of `moelab.evaluation.zero_shot.evaluate`.
        versions: the tasks' names and the versions of their definitions.
    """
    from moelab.bench.harness import torch_threads
    from moelab.evaluation.zero_shot import evaluate

    train = run.spec.train
    with torch_threads(train.threads):  # more threads slow small models down
        scores = evaluate(
            run.path,
            list(versions),
            cache=paths.home() / "data",
            limit=limit,
            device=train.device,
            on_progress=on_progress,
        )
    return [asdict(s) for s in scores]


def scored(rows: Sequence[dict]) -> pd.DataFrame:
    """Return the rows that `measure` found as a frame."""
    from moelab.evaluation.zero_shot import Score

    return pd.DataFrame(rows, columns=["arm", "seed", "paper", *Score.__dataclass_fields__])


def save(scores: Sequence[Score], folder: Path, name: str, options: Mapping[str, Any]) -> Path:
    """Write `zero-shot-<name>.jsonl`, one line per task, and its provenance beside it; return the former's path.

    Args:
        name: the model's: `REFERENCE`, a run's id or a directory's name.
        options: the evaluation's: limit, batch, dtype, device.
    """
    from moelab.evaluation.models import SMOLLM2

    about = {"model": name, "source": ""}
    if name == REFERENCE:
        about = {"model": "SmolLM2-135M-Instruct", "source": str(SMOLLM2)}
    about |= {key: options[key] for key in ("limit", "dtype", "device")}
    file = folder / f"zero-shot-{name}.jsonl"
    write_text(file, "".join(json.dumps({**about, **asdict(score)}) + "\n" for score in scores))
    write_json(folder / f"zero-shot-{name}.provenance.json", {"title": _title(about["model"], scores), **provenance()})
    return file


def _title(model: str, scores: Sequence[Score]) -> str:
    """Return the scores in one line, those furthest above chance first."""
    parts = [
        f"{s.task.removeprefix('packaged_')} {100 * s.accuracy:.1f} ± {100 * s.standard_error:.1f}"
        for s in sorted(scores, key=lambda s: max(s.chance, s.majority or 0) - s.accuracy)
    ]
    return f"{model} through our zero-shot pipeline, percent: {', '.join(parts)}"


def reference() -> pd.DataFrame:
    """Return scores of a real model, the user's or published ones, computed by the same code, in the form of `scored`.

    The command is `moelab eval smollm2 --limit 200 --out .moelab/results/benchmarks`. The arm is the model's name, the
    seed -1. The frame is empty where there are no such scores, or where the tasks have changed since.
    """
    from moelab.evaluation.zero_shot import PACKAGED, PAPER_TASKS, definition, version

    def unchanged(task: str, stored: str) -> bool:
        """Return whether a packaged task has its stored definition, for which lm-eval need not be installed."""
        own = f"{task} {definition(task)['metadata']['version']}" if task in PACKAGED else version(task)
        return stored.partition(",")[0] == own

    columns = {name: column for column, names in PAPER_TASKS.items() for name in names}
    files = [root / "benchmarks" / f"zero-shot-{REFERENCE}.jsonl" for root in reversed(paths.all_results())]
    file = next((file for file in files if file.exists()), None)
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file else []
    current = [row for row in rows if unchanged(row["task"], row["version"])]
    made = [{**row, "arm": row["model"], "seed": -1, "paper": columns.get(row["task"], "")} for row in current]
    return scored(made)


def reference_headline(rows: pd.DataFrame) -> str:
    """Return a real model's scores in one line, from `reference`."""
    if not len(rows):
        return (
            "No scores of a real model at hand: "
            "`moelab eval smollm2 --limit 200 --out .moelab/results/benchmarks` makes them"
        )
    table = over_chance(rows)
    best = [
        f"{row.task.removeprefix('packaged_')} {100 * row.accuracy:.1f} ± {100 * row.standard_error:.1f} %"
        for row in table[table["sigmas"] > 3].itertuples()
    ]
    return f"{table['arm'].iloc[0]}, a real model, is above knowing nothing on {', '.join(best) or 'no task'}"


def paper_table() -> pd.DataFrame:
    """Return the paper's own models: zero-shot percentages by run (internal corpus) and task, with their average."""
    rows = [row for row in paper.zero_shot() if row.group == "paper" and row.corpus == "internal"]
    return pd.DataFrame([{**row.scores, "average": row.average} for row in rows], index=[row.run for row in rows])


def our_table(scores: pd.DataFrame) -> pd.DataFrame:
    """Return percent by arm and paper column, mean over seeds, with the average where all six columns exist."""
    part = scores[scores["paper"] != ""]
    table = (100 * part.pivot_table(index="arm", columns="paper", values="accuracy", sort=False)).reindex(
        columns=list(paper.TASKS)
    )
    return table.assign(average=table.mean(axis=1, skipna=False))


def over_chance(scores: pd.DataFrame) -> pd.DataFrame:
    """Return, a row per arm and task, the mean over seeds of accuracy and its distance from what no knowledge gives.

    Columns: accuracy, standard_error, chance, reference, sigmas, n, bits_per_byte. reference is the accuracy without
    knowledge: chance, or that of always choosing the commonest answer's place, whichever is higher. sigmas is the
    distance of accuracy from it in standard errors. The standard error is that of one model's items: seeds answer the
    same questions, so more seeds do not make it smaller.
    """
    groups = scores.groupby(["arm", "task"], sort=False)
    table = groups[["accuracy", "standard_error", "chance", "majority", "n", "bits_per_byte"]].mean().reset_index()
    table["reference"] = table[["chance", "majority"]].max(axis=1)
    distance = table["accuracy"] - table["reference"]
    table["sigmas"] = [
        0.0 if d == 0 else d / e if e else math.copysign(math.inf, d)
        for d, e in zip(distance, table["standard_error"], strict=True)
    ]
    return table


def tasks_that_fit(scores: pd.DataFrame) -> dict[str, float]:
    """Return, by task, the share of its requests that lost their beginning because the context is too short."""
    parts = scores.groupby("task", sort=False)[["cut", "requests"]].sum()
    return (parts["cut"] / parts["requests"]).fillna(0.0).to_dict()


def answer_bits(scores: pd.DataFrame) -> pd.DataFrame:
    """Return one arm's bits per byte of the right answers minus another's, for the pairs of `PAIRS` that are there.

    The mean over the tasks of which at most `MAX_CUT` of the requests lost their beginning. Columns as of
    `comparison.pairs`.
    """
    fitting = [task for task, share in tasks_that_fit(scores).items() if share <= MAX_CUT]
    part = scores[scores["task"].isin(fitting)]
    means = part.groupby(["arm", "seed"], sort=False)["bits_per_byte"].mean().reset_index()
    return comparison.pairs(means, PAIRS, "bits_per_byte")


def bits_headline(scores: pd.DataFrame) -> str:
    """Return the result in one line: how many bits fewer MoE-128 needs for the right answers than the dense base."""
    gaps = answer_bits(scores).query("left == 'MoE-128' and right == 'Dense'")["gap"] if len(scores) else []
    left_out = [task for task, share in tasks_that_fit(scores).items() if share > MAX_CUT] if len(scores) else []
    if not len(gaps):
        return "MoE-128 and Dense have no task in common whose requests fit the context"
    without = (
        f"; without {', '.join(task.removeprefix('packaged_') for task in left_out)}, which do not fit the context"
    )
    return (
        f"MoE-128's bits per byte of the right answers, minus Dense's: {sum(gaps) / len(gaps):+.3f} "
        f"({comparison.interval_text(list(gaps))}{without if left_out else ''})"
    )


def headline(table: pd.DataFrame) -> str:
    """Return in one line who is above guessing, from `over_chance`."""
    if not len(table):
        return "no run has finished"
    above = [f"{r.arm} on {r.task}" for r in table.itertuples() if r.sigmas > 3]
    models = (
        f"{table['arm'].nunique()} twins on {table['task'].nunique()} tasks, up to {table['n'].max():.0f} items each"
    )
    if not above:
        return f"None is 3 standard errors above a guess without knowledge, as expected at this size ({models})"
    return f"Above a guess without knowledge by 3 standard errors: {', '.join(above)} ({models})"


def verdicts(scores: pd.DataFrame, scale: str) -> list[Verdict]:
    """Judge the claims on Tables 2 and 4: percentage points of the six tasks' average.

    An equality needs the arms of the gain that it is about: for PR-MoE that is MoE-32, which is not among these.
    """
    part = scores[scores["paper"] != ""]
    whole = part.groupby(["arm", "seed"]).filter(lambda g: set(g["paper"]) == set(paper.TASKS))
    note = f"{comparison.TWINS} Stand-ins for RACE-h and WebQs." if scores["stand_in"].any() else comparison.TWINS
    if not len(whole):
        return [judge(claim, scale=scale) for claim in paper.claims("zero-shot")]
    rows = whole.groupby(["arm", "seed"])["accuracy"].mean().mul(100).reset_index()
    return [
        judge(claim, arms=comparison.samples(claim, rows, ARMS | LARGER, "accuracy"), note=note, scale=scale)
        for claim in paper.claims("zero-shot")
    ]


EXPERIMENT = Experiment(
    name="zero-shot",
    number=7,
    title="Zero-shot tasks",
    paper="Tables 2, 4 and 5",
    question="Does an MoE answer like a dense model several times its base?",
    paper_answer="Yes: 350M+MoE-128 scores like dense 1.3B, 1.3B+MoE-128 like 6.7B.",
    scales={
        "smoke": Scale(
            "twins of 32 wide, 4 layers; 8 items of each task", "a minute, and 86 MB the first time (tests)"
        ),
        "cpu": Scale(
            "the 350M twins of `scaling` and `pr-moe`; 200 items of each task",
            "half a minute a run beyond the training",
        ),
        "full": Scale(
            "the twins of `scaling`, PR-MoE and the students of `distillation`; 200 items of each task",
            "seven seconds of processor time a run beyond the training",
        ),
        "gpu": Scale("the 350M twins at `gpu` scale; 1000 items of each task", "not yet run; one GPU"),
    },
    arms=ARMS,
    build=build,
    check=check,
    measures_on_gpu=("gpu",),
)
