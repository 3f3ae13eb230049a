"""Runs each operation's tests on every implementation of it, one text for all of them.

An argument ``target`` of a test is (backend, device, instruction set): on CPU what "auto" is without a compiler, and the
C++ on every instruction set that the processor has; with a GPU also the Triton kernels. An argument ``instructions`` is
the instruction set alone, for what is about the C++. In a process started with TRITON_INTERPRET=1, ``target`` is the
Triton kernels in Triton's interpreter instead, on CPU tensors; ``test_interpreter.py`` starts such a process, because
the variable must be set before Triton is imported and changes every kernel of the process. Tests with an argument
``interpreted`` run in it alone.
"""

import contextlib
import dataclasses
import inspect

import pytest
import torch
from moelab.kernels import _cpp

from tests.kernels.helpers import INTERPRETING

if INTERPRETING:  # a third of its time is whether integers overflow, which nothing asserts without debugging
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    names = {}

    def patch_builtin(package, builder, scope, builtin=interpreter.tl.core.is_builtin):
        """Patch what Triton's own patches; it lists all members at each call of a function, another third of the time."""
        if package not in names:
            names[package] = [name for name, member in inspect.getmembers(package, builtin)]
        for name in names[package]:
            if not builtin(member := getattr(package, name)):
                return  # it was patched for the function that calls this one
            interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin

WHY_NOT = _cpp.why_not()
COMPILES = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
INSTRUCTIONS = [pytest.param(name, marks=COMPILES) for name in _cpp.supported()]
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TARGETS = (
    [pytest.param(("triton", "cpu", None), id="triton-interpreted")]
    if INTERPRETING
    else [
        pytest.param(("auto", "cpu", "none"), id="plain"),
        *(pytest.param(("cpp", "cpu", name), marks=COMPILES, id=name) for name in _cpp.supported()),
        pytest.param(("triton", "cuda", None), marks=GPU, id="triton-cuda"),
    ]
)


def pytest_generate_tests(metafunc):
    for name, values in (("target", TARGETS), ("instructions", INSTRUCTIONS)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, values)


def pytest_collection_modifyitems(config, items):
    if INTERPRETING:
        for item in items:
            if "tests/kernels" in item.path.as_posix() and not {"target", "interpreted"} & set(item.fixturenames):
                item.add_marker(pytest.mark.skip(reason="not about Triton's interpreter"))


@pytest.fixture
def interpreted():
    if not INTERPRETING:
        pytest.skip("for the process that test_interpreter.py starts")


@pytest.fixture(autouse=True)
def _prepared(request):
    """Seed PyTorch and use the instruction set of the test's target."""
    torch.manual_seed(0)
    given = getattr(getattr(request.node, "callspec", None), "params", {})
    name = given.get("instructions") or given.get("target", (None,))[-1]
    with _cpp.limited(name) if name else contextlib.nullcontext():
        assert not name or _cpp.available() == (name != "none")
        yield
