"""Specs, runs and their store, experiments, notebooks through papermill, results pages."""
