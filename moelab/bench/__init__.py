"""Measure how fast this machine computes: every benchmark on one harness, in turns, beside a floor that is counted."""
