"""The training loop: schedules, metrics, resume."""

from moelab.training.loop import Progress, TrainingDiverged, TrainingStopped, evaluate, train

__all__ = ["Progress", "TrainingDiverged", "TrainingStopped", "evaluate", "train"]
