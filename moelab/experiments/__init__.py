"""Find the experiments: each says which runs it asks for, and what their numbers mean.

Each experiment is a module that ends in an `EXPERIMENT`, by which this package finds it; there is no list of them. The
name of the module, with hyphens, is the name of the experiment on the command line and of its folder in the results;
its notebook is NN_module.ipynb. Importing this package loads no torch. It may import everything below `moelab.report`.
"""

from __future__ import annotations

import importlib
import pkgutil

from moelab.config import unknown
from moelab.design.experiment import Experiment, Scale


def _discover() -> dict[str, Experiment]:
    """Return the `EXPERIMENT` of every module of this package by name, in the order of their numbers."""
    declarations = []
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        if declared := getattr(module, "EXPERIMENT", None):
            if declared.module != info.name:
                raise ValueError(
                    f"experiment {declared.name!r} belongs in {declared.module}.py, found in {info.name}.py"
                )
            declarations.append(declared)
    return {e.name: e for e in sorted(declarations, key=lambda e: e.number)}


EXPERIMENTS: dict[str, Experiment] = _discover()


def experiment(name: str) -> Experiment:
    """Return the experiment of that name, or of that number of its notebook.

    Raises:
        ValueError: one line, with the names that are allowed.
    """
    numbers = {str(e.number): e for e in EXPERIMENTS.values()}
    known = EXPERIMENTS.get(name) or numbers.get(name.lstrip("0") or name[:1])
    if known is None:
        raise ValueError(unknown(f"no experiment {name!r}", name, EXPERIMENTS))
    return known


__all__ = ["EXPERIMENTS", "Experiment", "Scale", "experiment"]
