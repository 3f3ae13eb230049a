"""Train models: the loop, learning-rate schedules, metrics, resume and distillation."""
