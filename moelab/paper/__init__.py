"""The DeepSpeed-MoE paper as data: models, settings, reported numbers and claims, each with its source.

    from moelab import paper

    paper.model("350M+PR-MoE-32/64").computed_B        # 4.116793 billion (stated: 4)
    paper.training_settings("350M+MoE-128").lr         # 2e-4
    paper.loss_curve("350M+MoE-128").final             # 2.286 nats per token
    paper.claim("pr-moe-matches-moe128").statement
    paper.claims("pr-moe").frame()                     # pandas, imported only now

The numbers live in the CSV files beside this module; every row carries `source`, `how`, `conflict` and `note` (see
`Provenance`), and `conflicts()` lists what contradicts what. `routed_models()` and `reported()` are of other papers and
projects. Read-only: rows are frozen, tables are tuples. Loads without torch or pandas.
"""

from moelab.paper._table import HOW, Provenance, Table
from moelab.paper.claims import (
    DIRECTIONS,
    KINDS,
    PRIMARY,
    SCALES,
    SECONDARY,
    TESTABLE_AT,
    Claim,
    claim,
    claims,
    experiments,
)
from moelab.paper.clark import RoutedCurve, RoutedModel, routed_curves, routed_models
from moelab.paper.configs import GPUS, published_configs, settings_for
from moelab.paper.conflicts import Conflict, conflict, conflicts
from moelab.paper.inference import InferenceResult, inference_results
from moelab.paper.models import PaperModel, model, models, size_table
from moelab.paper.quality import TASKS, LossCurve, LossPoint, ZeroShot, loss_curve, loss_points, zero_shot
from moelab.paper.reported import Reported, reported
from moelab.paper.training import (
    TrainingSettings,
    TrainingThroughput,
    all_training_settings,
    training_settings,
    training_throughput,
)

__all__ = [
    "DIRECTIONS",
    "GPUS",
    "HOW",
    "KINDS",
    "PRIMARY",
    "SCALES",
    "SECONDARY",
    "TASKS",
    "TESTABLE_AT",
    "Claim",
    "Conflict",
    "InferenceResult",
    "LossCurve",
    "LossPoint",
    "PaperModel",
    "Provenance",
    "Reported",
    "RoutedCurve",
    "RoutedModel",
    "Table",
    "TrainingSettings",
    "TrainingThroughput",
    "ZeroShot",
    "all_training_settings",
    "claim",
    "claims",
    "conflict",
    "conflicts",
    "experiments",
    "inference_results",
    "loss_curve",
    "loss_points",
    "model",
    "models",
    "published_configs",
    "reported",
    "routed_curves",
    "routed_models",
    "settings_for",
    "size_table",
    "training_settings",
    "training_throughput",
    "zero_shot",
]
