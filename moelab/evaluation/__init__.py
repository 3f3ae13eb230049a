"""Score a trained model on the paper's zero-shot tasks with lm-eval, and count how it routes text."""
