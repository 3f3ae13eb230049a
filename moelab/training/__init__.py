"""The training loop: schedules, metrics, resume."""
