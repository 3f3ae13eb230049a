"""How fast is it? Every benchmark, on one harness: turns, medians with spread, a floor counted first."""
