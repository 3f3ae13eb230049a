"""Collect what an interactive chart draws: a figure's curves, and the paper's Fig 1 at the same share of training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from moelab import paper
from moelab.design import comparison
from moelab.plotting import interactive
from moelab.report.site.results import ODD, Result
from moelab.report.summary import FigureRow


def charts(result: Result) -> dict[str, dict[str, Any]]:
    """Return the charts of a result's figures by name; figures without curves have none."""
    return {f.name: chart for f in result.figures if f.data and (chart := _chart(result, f))}


def _chart(result: Result, figure: FigureRow) -> dict[str, Any] | None:
    models = models_of(result)
    try:
        rows = result.rows(figure.data)
        found = interactive.pack(rows, list(models))
    except (*ODD, OSError, RecursionError):
        return None  # the picture is shown
    if found is None:
        return None
    drawn = {arm: models[arm] for arm in (*found.arms, found.against) if arm in models}
    whole = {arm: tokens for arm, model in drawn.items() if (tokens := whole_training(model, result.summary.scale))}
    return {
        **asdict(found),
        "whole": whole,
        "paper": {arm: fig_1(model) for arm, model in drawn.items() if arm in whole},
    }


def models_of(result: Result) -> dict[str, str]:
    """Return arm -> the paper's name of its model, of the runs that are no budget of another."""
    runs = (run for run in result.summary.runs if not run.is_budget)
    return {run.label: str(run.spec.get("model", {}).get("name", "")).removesuffix(" twin") for run in runs}


def whole_training(model: str, scale: str) -> float:
    """Return the tokens with which a twin has seen as many for each parameter as the paper's model; 0 if unknown."""
    try:
        return comparison.tokens_a_parameter(model) / comparison.tokens_a_parameter(model, scale, 1.0)
    except (ValueError, KeyError):
        return 0.0


def fig_1(model: str) -> list[tuple[float, float, float]]:
    """Return the paper's Fig 1 for a model: share of its training, loss, uncertainty; none if unknown."""
    if model not in {point.model for point in paper.loss_points()}:
        return []
    curve, whole = paper.loss_curve(model), paper.training_settings(model).train_tokens / 1e9
    return [(b / whole, loss, u) for b, loss, u in zip(curve.tokens_B, curve.loss, curve.uncertainty, strict=True)]


def gap_of_fig_1(model: str, base: str) -> list[tuple[float, float, float]]:
    """Return the paper's loss of a model minus a base's: share of the training, difference, its uncertainty."""
    theirs: Mapping[float, tuple[float, float]] = {share: (loss, wide) for share, loss, wide in fig_1(base)}
    return [
        (share, loss - theirs[share][0], wide + theirs[share][1])
        for share, loss, wide in fig_1(model)
        if share in theirs
    ]
