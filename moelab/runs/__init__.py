"""What is a run, and where is it in its life? Specs, the store, executing, executors, measurements, provenance."""
