"""Load one part of a model from a user's file, and put it in place of ours while models are trained (`moelab try`).

The file defines exactly one of `FUNCTIONS`, or one class that inherits from one of `CLASSES`. `docs/extend.md`
describes the parts. Loading executes the file, so it happens only where a user names it. Runs with a part have a store
of their own, which keeps the file's text; reading them executes nothing.

part = load(Path("my_layer.py"))
with installed(part):
    runs = Lab(RunStore(part.folder())).run(specs, executor="inline")
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from moelab import paths
from moelab.files import write_text
from moelab.terminal import one_line

FUNCTIONS: Mapping[str, Mapping[str, Any]] = {
    "scores": {"model.routing.scores": "sigmoid"},
    "loss": {"model.routing.z_loss": 0.01},
    "noise": {"model.routing.choice_noise": "gumbel"},
    "activation": {},
}
"""Name of a function -> the settings with which a model uses it; a user's own settings come before these.

scores(logits_SE) returns the router's scores [S, E], loss(logits_SE, routing) a term of the loss, whose weight is
`model.routing.z_loss`, noise(logits_SE) the logits that choose experts, and activation(p) the activation of every
feed-forward, element by element.
"""

CLASSES = ("Router", "Experts", "MoE")
"""Classes of `moelab.models.moe` that a class may inherit from and then replaces."""


@dataclass(frozen=True)
class Part:
    """Hold a part of a model.

    Attributes:
        kind: key of `FUNCTIONS`, or one of `CLASSES`.
        name: its name in the file.
        value: the function or the class.
        text: the file's content.
    """

    kind: str
    name: str
    value: Callable[..., Any]
    text: str

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings with which a model uses the part."""
        return dict(FUNCTIONS.get(self.kind, {}))

    def folder(self) -> Path:
        """Return the folder of the runs with this part; a file with other text has another folder."""
        digest = hashlib.sha256(self.text.encode()).hexdigest()[:10]
        return paths.home() / "tries" / f"{self.kind.lower()}-{digest}"

    def keep(self) -> None:
        """Write the file's text next to the runs, for people; nothing executes it."""
        write_text(self.folder() / "part.py.txt", self.text)


def load(file: Path) -> Part:
    """Execute a user's file and return the part that it defines.

    Raises:
        ValueError: one line: there is no such file, it fails, or it defines no part or several.
    """
    from moelab.models import moe

    module = execute(file)
    own = {n: v for n, v in vars(module).items() if getattr(v, "__module__", "") == module.__name__}
    found: list[tuple[str, str, Any]]
    found = [(name, name, value) for name, value in own.items() if name in FUNCTIONS and inspect.isfunction(value)]
    for kind in CLASSES:
        base = getattr(moe, kind)
        found += [(kind, n, v) for n, v in own.items() if inspect.isclass(v) and issubclass(v, base)]
    if len(found) != 1:
        raise ValueError(
            f"{file}: expected one part, found {', '.join(name for _, name, _ in found) or 'none'}; a part is a "
            f"function called {', '.join(FUNCTIONS)}, or a class that inherits from {', '.join(CLASSES)} of "
            "moelab.models.moe"
        )
    return Part(*found[0], file.read_text(encoding="utf-8"))


def execute(file: Path) -> Any:
    """Execute a user's file and return the module; ValueError, one line, where there is none or it fails."""
    if not file.is_file():
        raise ValueError(f"--file: {file} does not exist")
    name = f"moelab_user_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"--file: {file} is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # as dataclasses in the file need
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{file}: {type(error).__name__}: {one_line(error)}") from None
    return module


@contextlib.contextmanager
def installed(part: Part) -> Iterator[None]:
    """Let models that are built in this process, in this block, have the part."""
    from moelab import kernels
    from moelab.config import feed_forward
    from moelab.models import gpt, moe, routing

    with contextlib.ExitStack() as stack:
        if part.kind == "MoE":
            stack.enter_context(mock.patch.object(gpt, "MoE", part.value))
        elif part.kind in CLASSES:
            stack.enter_context(mock.patch.object(moe, part.kind, part.value))
        elif part.kind == "activation":
            own = kernels.Activation(_OWN, part.value, _slope_of(part.value))
            stack.enter_context(mock.patch.dict(kernels.ACTIVATIONS, {_OWN: own}))
            function = feed_forward.Function(_OWN, gated=False)
            stack.enter_context(mock.patch.dict(feed_forward.FUNCTIONS, {"gelu": function}))
        else:
            table, key = {
                "scores": (routing.SCORES, "sigmoid"),
                "loss": (routing.LOSSES, "z_loss"),
                "noise": (routing.NOISE, "gumbel"),
            }[part.kind]
            stack.enter_context(mock.patch.dict(table, {key: part.value}))
        yield


_OWN = "own"
"""Name of a user's activation while it is installed."""


def _slope_of(activation: Callable[..., Any]) -> Callable[..., Any]:
    """Return the derivative of a function of each element alone, by autograd."""
    import torch

    def slope(p: Any) -> Any:
        with torch.enable_grad():
            at = p.detach().requires_grad_()
            return torch.autograd.grad(activation(at).sum(), at)[0]

    return slope
