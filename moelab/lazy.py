"""Import numpy and pandas when they are first used: they take half a second, which most commands do without.

from moelab.lazy import np, pd
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__all__ = ["np", "pd"]

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
