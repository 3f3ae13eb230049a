"""The training loop: schedules, metrics, resume, distillation."""

from moelab.training.distill import Teacher
from moelab.training.loop import Progress, TrainingDiverged, TrainingStopped, evaluate, train

__all__ = ["Progress", "Teacher", "TrainingDiverged", "TrainingStopped", "evaluate", "train"]
