"""The training loop: schedules, metrics, resume, distillation."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moelab.training.distill import Teacher
    from moelab.training.loop import Progress, TrainingDiverged, TrainingStopped, evaluate, train

__all__ = ["Progress", "Teacher", "TrainingDiverged", "TrainingStopped", "evaluate", "train"]


def __getattr__(name: str) -> Any:
    """Loaded when asked for: whoever only reads metrics must not wait for torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from moelab.training import distill, loop

    return getattr(distill if name == "Teacher" else loop, name)
