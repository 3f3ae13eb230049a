"""Score zero-shot tasks, minimal pairs and recall (paper Tables 2, 4 and 5).

Shows: for the trained twins the bits per byte of the right answers of six tasks, over those whose requests fit the
context, by which the claims on twins are judged; by how many bits the right answers are likelier than the wrong ones;
accuracy on minimal pairs of held-out text and in recalling facts, from the context and from the training text; and
accuracy on the six tasks beside chance, with the paper's table.

Fixed before the first run: 3 seeds, all arms on each; at `cpu` seeds 3 to 5, because of the seeds before only numbers
were kept (decided before any was scored). Expect: accuracy on the six tasks at chance, because twins of 0.2 to 17 M
parameters that read 16 M or 102 M tokens cannot answer. The pipeline is that of a run at `paper` scale. The tasks come
from a package, so no network is needed; other data sets replace RACE-h and WebQs, under their own names.

At `full` the larger models of `scaling` (Table 2), PR-MoE on the 1.3B base (Table 4) and the students of `distillation`
on both bases (Table 5) are scored as well, on all items of each task, in looks at 3, 6 and 9 seeds. The three claims on
bits, and the pairs of arms in `PAIRS`, were fixed before any run of the 1.3B base was scored so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from moelab import paper, paths
from moelab.design import comparison, settings
from moelab.design.experiment import Experiment, Scale
from moelab.design.judging import judge
from moelab.design.verdicts import Verdict
from moelab.experiments import distillation
from moelab.lazy import pd
from moelab.runs import evaluations
from moelab.runs.spec import RunSpec
from moelab.terminal import task_progress

if TYPE_CHECKING:
    from moelab.evaluation.zero_shot import OnProgress
    from moelab.runs.collection import Runs
    from moelab.runs.store import Run, RunStore

ARMS = {"Dense": "350M", "MoE-128": "350M+MoE-128", "PR-MoE-32/64": "350M+PR-MoE-32/64"}
LARGER = {name: name for name in ("1.3B", "1.3B+MoE-128", "6.7B", "1.3B+PR-MoE-64/128")}
"""Further arms of Tables 2 and 4, at `full`."""
STUDENTS = {
    f"{prefix}{student}": distillation.names(base)[student]
    for base, prefix in (("350M", ""), ("1.3B", "1.3B "))
    for student in ("L21 alone", "L21 + KD", "L21 + staged KD")
}
"""Arms of the experiment `distillation`, at `full`; their teachers are PR-MoE-32/64 and 1.3B+PR-MoE-64/128."""
NAMES = ARMS | LARGER | STUDENTS
"""Arm -> the paper's name of its run."""
PAIRS = (
    ("1.3B+MoE-128", "1.3B"),
    ("1.3B+MoE-128", "6.7B"),
    ("1.3B+PR-MoE-64/128", "1.3B+MoE-128"),
    ("1.3B L21 alone", "1.3B+PR-MoE-64/128"),
    ("1.3B L21 + staged KD", "1.3B+PR-MoE-64/128"),
    ("1.3B L21 + staged KD", "1.3B L21 alone"),
    ("1.3B L21 + staged KD", "1.3B L21 + KD"),
    ("MoE-128", "Dense"),
    ("MoE-128", "1.3B"),
    ("PR-MoE-32/64", "Dense"),
    ("PR-MoE-32/64", "MoE-128"),
    ("L21 alone", "PR-MoE-32/64"),
    ("L21 + staged KD", "PR-MoE-32/64"),
    ("L21 + staged KD", "L21 alone"),
    ("L21 + staged KD", "L21 + KD"),
)
"""Pairs of arms whose bits per byte are compared: those of Table 2, Table 4 and Table 5, the 1.3B base first."""
BITS = "bits per byte of the right answers"
"""What the claims on twins are judged by."""
LIMITS = {"smoke": 8, "quick": 50, "cpu": 200, "full": 0, "gpu": 1000, "paper": 0}
"""Items of each task by scale; 0 is all."""

COUNTS = {"smoke": 40}
"""Minimal pairs of each kind by scale, and items of recall; elsewhere `COUNT`."""
COUNT = 2000

MAX_CUT = 0.1
"""Largest share of a task's requests that may lose their beginning, if the task is to count in the average of bits."""


def arms(scale: str) -> list[str]:
    """Return the arms of a scale."""
    return [*ARMS, *((*LARGER, *STUDENTS) if scale == "full" else ())]


def drawn(scale: str) -> list[str]:
    """Return the arms that figures by task show: without the students, which are too many colours; tables have all."""
    return [arm for arm in arms(scale) if arm not in STUDENTS]


def build(scale: str, seed: int, overrides: Mapping[str, Any], *, rate: settings.Rate = "own") -> list[RunSpec]:
    """Return the runs of one seed: every arm of `arms`, the students as `distillation` has them."""
    given: dict[str, Any] = {"scale": scale, "seed": seed, "overrides": overrides, "rate": rate}
    specs = [settings.spec(name, **given, label=arm) for arm, name in ARMS.items()]
    if scale == "full":
        specs += [settings.spec(name, **given, label=name) for name in LARGER]
        for base in distillation.TEACHERS:
            for spec in distillation.build(**given, base=base):
                label = spec.label if base == "350M" else f"{base} {spec.label}"
                specs += [replace(spec, label=label)] if label in STUDENTS else []
    return specs


def require(specs: Sequence[RunSpec], store: RunStore, limit: int, count: int) -> None:
    """Check that finished runs have weights or scores; ValueError, one line. Called before the others are trained."""
    evaluations.require_of_finished(specs, store, score, limit, _versions())
    evaluations.require_of_finished(specs, store, score_pairs, count, _pairs_version())


def _versions() -> dict[str, str]:
    """Return the packaged tasks and the versions of their definitions and of the code that scores them."""
    from moelab.evaluation.zero_shot import PACKAGED, SCORING, definition

    return {task: f"{definition(task)['metadata']['version']}, scoring {SCORING}" for task in PACKAGED}


def _pairs_version() -> int:
    from moelab.evaluation.likelihood import VERSION

    return VERSION


def measure(runs: Runs, limit: int) -> list[dict]:
    """Score every finished run on the packaged tasks, a row per run and task; scores that are stored are read back.

    Args:
        limit: as of `moelab.evaluation.zero_shot.evaluate`.

    Returns:
        Rows of arm, seed, and the fields of `Score`.
    """
    return _of_each(runs, score, limit, _versions())


def measure_pairs(runs: Runs, count: int) -> list[dict]:
    """Score every finished run on minimal pairs and recall, a row per run and kind; stored scores are read back.

    Args:
        count: items of each kind.

    Returns:
        Rows of arm, seed, and the fields of `moelab.evaluation.likelihood.PairScore`.
    """
    return _of_each(runs, score_pairs, count, _pairs_version())


def _of_each(runs: Runs, function: Callable[..., list[dict]], *arguments: Any) -> list[dict]:
    for run in runs.finished:  # before the first takes its time
        evaluations.require(run, function, *arguments)
    rows = []
    with task_progress() as show:
        for run in runs.finished:
            about = {"arm": run.spec.title, "seed": run.spec.train.seed}

            def progress(what: str, done: int, total: int, run: str = "{arm}, seed {seed}".format(**about)) -> None:
                show(f"{run}: {what}", done, total)

            rows += [about | one for one in evaluations.measure(run, function, *arguments, on_progress=progress)]
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
            batch=64,
            device=train.device,
            on_progress=on_progress,
        )
    return [asdict(s) for s in scores]


def score_pairs(run: Run, count: int, version: int, on_progress: OnProgress) -> list[dict[str, Any]]:
    """Return the fields of a run's `PairScore` in each kind of minimal pairs and recall.

    Args:
        count: items of each kind.
        version: of items and scores; stored ones of another are not read back.
        on_progress: called with (kind, continuations done, all continuations).
    """
    from moelab.bench.harness import torch_threads
    from moelab.evaluation import likelihood
    from moelab.evaluation.lm import RunLM
    from moelab.evaluation.models import open_evaluated

    cache, train = paths.home() / "data", run.spec.train
    with torch_threads(train.threads):
        lm = RunLM(open_evaluated(run.path, cache=cache, device=train.device), batch=64)
        scores = likelihood.score(lm, likelihood.pairs_of(run.spec.data, cache, count), on_progress)
    return [asdict(s) for s in scores]


def scored(rows: Sequence[dict]) -> pd.DataFrame:
    """Return the rows that `measure` found as a frame, with the column paper: the paper's column, or empty."""
    from moelab.evaluation.zero_shot import PAPER_TASKS, Score

    columns = {name: column for column, names in PAPER_TASKS.items() for name in names}
    rows = [{**row, "paper": columns.get(row["task"], "")} for row in rows]
    frame = pd.DataFrame(rows, columns=["arm", "seed", "paper", *Score.__dataclass_fields__])
    return frame.astype({"majority": float, "margin": float, "margin_error": float})  # also where all are None


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

    Columns: accuracy, standard_error, chance, reference, sigmas, n, bits_per_byte, margin, margin_error. reference is
    the accuracy without knowledge: chance, or that of always choosing the commonest answer's place, whichever is
    higher. sigmas is the distance of accuracy from it in standard errors. The standard errors are those of one model's
    items: seeds answer the same questions, so more seeds do not make them smaller.
    """
    groups = scores.groupby(["arm", "task"], sort=False)
    means = ["accuracy", "standard_error", "chance", "majority", "n", "bits_per_byte", "margin", "margin_error"]
    table = groups[means].mean().reset_index()
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


def answer_bits(scores: pd.DataFrame, value: str = "bits_per_byte") -> pd.DataFrame:
    """Return one arm's bits per byte of the right answers minus another's, for the pairs of `PAIRS` that are there.

    Columns as of `comparison.pairs`.

    Args:
        value: bits_per_byte, or margin: how much likelier the right answers are than the wrong ones.
    """
    return comparison.pairs(_means_of_fitting(scores, value), PAIRS, value)


def _means_of_fitting(scores: pd.DataFrame, value: str = "bits_per_byte") -> pd.DataFrame:
    """Return, by arm and seed, the mean over the tasks of which at most `MAX_CUT` of the requests were cut."""
    fitting = [task for task, share in tasks_that_fit(scores).items() if share <= MAX_CUT]
    part = scores[scores["task"].isin(fitting)]
    return part.groupby(["arm", "seed"], sort=False)[value].mean().reset_index()


def bits_headline(scores: pd.DataFrame, looks: Sequence[int] = ()) -> str:
    """Return the result in one line: how many bits fewer MoE-128 needs for the right answers than its dense base.

    Args:
        looks: the plan, see `moelab.design.sequential`.
    """
    pairs = answer_bits(scores) if len(scores) else pd.DataFrame(columns=["left", "right", "gap"])
    for moe, dense in (("1.3B+MoE-128", "1.3B"), ("MoE-128", "Dense")):
        if gaps := list(pairs.loc[(pairs["left"] == moe) & (pairs["right"] == dense), "gap"]):
            break
    else:
        return "MoE-128 and Dense have no task in common whose requests fit the context"
    left_out = [task.removeprefix("packaged_") for task, share in tasks_that_fit(scores).items() if share > MAX_CUT]
    without = f"; without {', '.join(left_out)}" if left_out else ""
    return (
        f"{moe}'s bits per byte of the right answers, minus {dense}'s: {sum(gaps) / len(gaps):+.3f} "
        f"({comparison.interval_text(gaps, looks)}{without})"
    )


def headline(table: pd.DataFrame) -> str:
    """Return in one line who is above guessing, from `over_chance`."""
    if not len(table):
        return "no run has finished"
    above = int((table["sigmas"] > 3).sum())
    if not above:
        return "None is 3 standard errors above a guess without knowledge"
    return f"{above} of {len(table)} scores are 3 standard errors above a guess"


def pairs_table(rows: Sequence[dict]) -> pd.DataFrame:
    """Return means over seeds of what `measure_pairs` found: a row per kind and arm, and the fields of a `PairScore`.

    The standard errors are those of one model's items, as in `over_chance`.
    """
    from moelab.evaluation.likelihood import PairScore

    fields = [name for name in PairScore.__dataclass_fields__ if name not in ("kind", "items")]
    frame = pd.DataFrame(rows, columns=["arm", "seed", "kind", *fields])
    return frame.groupby(["kind", "arm"], sort=False)[fields].mean().reset_index()


def pairs_headline(table: pd.DataFrame) -> str:
    """Return, from `pairs_table`, who recalls what from memory and by copying, in one line."""
    shares = table.set_index(["kind", "arm"])["accuracy"]
    arms = [arm for arm in ("1.3B", "1.3B+MoE-128", "Dense", "MoE-128") if ("memory", arm) in shares][:2]
    if len(arms) < 2 or any(("copying", arm) not in shares for arm in arms):
        return "No two arms have scores in both kinds of recall"
    said = [
        f"{where} {', '.join(f'{arm} {shares[kind, arm]:.0%}' for arm in arms)}"
        for kind, where in (("memory", "from memory:"), ("copying", "from context:"))
    ]
    return f"Facts recalled {'; '.join(said)}"


def verdicts(scores: pd.DataFrame, scale: str) -> list[Verdict]:
    """Judge the claims on Tables 2, 4 and 5, paired by seed.

    Those on the average of six tasks are in percentage points; twins cannot test them. Those on `BITS` are judged like
    losses. An equality needs the arms of the gain that it is about: for PR-MoE on the 350M base that is MoE-32, which
    is not among these.
    """
    part = scores[scores["paper"] != ""]
    whole = part.groupby(["arm", "seed"]).filter(lambda g: set(g["paper"]) == set(paper.TASKS))
    points = whole.groupby(["arm", "seed"])["accuracy"].mean().mul(100).rename("points").reset_index()
    bits = _means_of_fitting(scores)
    stand_in = " Stand-ins for RACE-h and WebQs." if len(scores) and scores["stand_in"].any() else ""
    judged = []
    for claim in paper.claims("zero-shot"):
        if claim.quantity == BITS:
            arms = comparison.samples(claim, bits, NAMES, "bits_per_byte") if len(bits) else {}
            note = f"{comparison.TWINS} Mean over the tasks whose requests fit the context."
            judged.append(judge(claim, arms=arms, note=note, scale=scale, **EXPERIMENT.plan(scale)))
        else:
            arms = comparison.samples(claim, points, NAMES, "points") if len(points) else {}
            judged.append(judge(claim, arms=arms, note=f"{comparison.TWINS}{stand_in}", scale=scale))
    return judged


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
            "the twins of `scaling`, PR-MoE and the students of `distillation` on both bases; all items",
            "about five minutes of a core a run beyond the training, 15 for 6.7B (estimated)",
        ),
        "gpu": Scale("the 350M twins at `gpu` scale; 1000 items of each task", "not yet run; one GPU"),
    },
    arms=ARMS,
    build=build,
    check=check,
    measures_on_gpu=("gpu",),
)
