"""Specs, runs and their store, experiments, notebooks through papermill, results pages."""

from typing import Any

__all__ = ["Lab", "RunSpec"]


def __getattr__(name: str) -> Any:
    """`Lab` and `RunSpec`, loaded when asked for: the command line's help must not wait for them."""
    if name == "Lab":
        from moelab.workbench.lab import Lab

        return Lab
    if name == "RunSpec":
        from moelab.workbench.specs import RunSpec

        return RunSpec
    raise AttributeError(name)
