"""How fast is it? Every benchmark, on one harness: candidates take turns, medians with their spread, a floor counted first."""
