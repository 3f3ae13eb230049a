"""Describe, store and execute runs: specs, the store, executors, measurements, provenance."""
