"""Train models: the loop, learning-rate schedules, metrics, resume and distillation."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moelab.training.distill import Teacher
    from moelab.training.loop import Branch, Progress, TrainingDiverged, TrainingStopped, evaluate, train

__all__ = ["Branch", "Progress", "Teacher", "TrainingDiverged", "TrainingStopped", "evaluate", "train"]


def __getattr__(name: str) -> Any:
    """Import the loop on first use, so that reading metrics does not import torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from moelab.training import distill, loop

    return getattr(distill if name == "Teacher" else loop, name)
