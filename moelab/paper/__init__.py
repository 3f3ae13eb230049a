"""The DeepSpeed-MoE paper as data: models, settings, reported numbers and claims, each with its source."""
