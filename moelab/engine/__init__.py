"""What runs below training: the distributed expert-parallel engine and its checkpoints."""
