"""What a model was asked, and answered: one JSON line an answer, so that a killed evaluation goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Requests:
    """Answers by request, in memory and, with a file, on disk.

    The file is appended to and flushed at each `put`; a line torn by a kill is dropped when it is opened next. It belongs to one set of
    weights: the caller's file name says whose.
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
                except ValueError:
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
        """The name of a request: a hash of all that decides its answer."""
        return hashlib.sha256(json.dumps([kind, *parts]).encode()).hexdigest()[:24]

    def get(self, key: str) -> Any:
        """The answer, or None."""
        return self._known.get(key)

    def put(self, answers: Mapping[str, Any]) -> None:
        """Keep answers, none of them None."""
        self._known.update(answers)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.writelines(json.dumps([key, value]) + "\n" for key, value in answers.items())
