"""Score a trained model on the paper's zero-shot tasks with lm-eval and on minimal pairs; count how it routes text."""
