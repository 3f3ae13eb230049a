"""Store a model's answers to requests, one JSON line per answer, so that an interrupted evaluation can continue."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Requests:
    """Hold answers by request, in memory and, if a path is given, in a file.

    Each `put` appends to the file in one write, as another process may append, too. What follows the last whole line
    is removed when the file is opened again. A file belongs to one set of weights, which its name identifies.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._known: dict[str, Any] = {}
        if path is None or not path.exists():
            return
        whole = 0
        with path.open("rb") as lines:
            for line in lines:
                try:
                    key, value = json.loads(line)
                except (ValueError, TypeError):  # no JSON, or no pair
                    break
                if not line.endswith(b"\n"):
                    break
                self._known[key] = value
                whole += len(line)
        if whole < path.stat().st_size:
            with path.open("r+b") as file:
                file.truncate(whole)

    def __len__(self) -> int:
        return len(self._known)

    @staticmethod
    def key(kind: str, *parts: Any) -> str:
        """Return the key of a request: a hash of everything that determines its answer."""
        return hashlib.sha256(json.dumps([kind, *parts]).encode()).hexdigest()[:24]

    def get(self, key: str) -> Any:
        """Return the answer, or None if there is none."""
        return self._known.get(key)

    def put(self, answers: Mapping[str, Any]) -> None:
        """Store answers by key; no answer may be None."""
        self._known.update(answers)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write("".join(json.dumps([key, value]) + "\n" for key, value in answers.items()).encode())
