"""Import numpy and pandas when they are first used: they take half a second, which most commands do without.

from moelab.lazy import np, pd

`whole_imports` keeps Ctrl-C from cutting an import short.
"""

from __future__ import annotations

import contextlib
import importlib
import signal
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

__all__ = ["np", "pd", "whole_imports"]

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
else:

    class _Module:
        """Stands for a module, and imports it when an attribute is asked for."""

        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            return getattr(importlib.import_module(self._name), attribute)

    np, pd = _Module("numpy"), _Module("pandas")


@contextlib.contextmanager
def whole_imports() -> Iterator[None]:
    """Hold Ctrl-C back until the block, which imports modules, has ended.

    An import of torch that is cut short cannot be made up for in the same process: some of its modules stay behind, and
    "partially initialized module" is all that a notebook would hear until its kernel is restarted.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield  # no interrupt ends this thread's imports
        return
    held: list[Any] = []
    signal.signal(signal.SIGINT, lambda *arguments: held.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if held:
        before(*held[0])
