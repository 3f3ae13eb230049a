"""What runs below training: checkpoints today, the distributed expert-parallel engine next."""
