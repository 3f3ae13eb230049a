"""Each op's tests run against its *targets*, one text for all of them.

A test with an argument ``target`` gets (backend, device): the tuned torch path on CPU and, with a GPU, the Triton
kernels on it. In a process started with TRITON_INTERPRET=1 it gets the Triton kernels in Triton's interpreter
instead, on CPU tensors; ``test_interpreter.py`` starts such processes, because the variable must be set before Triton
is imported and changes every kernel of the process.
"""

import os

import pytest
import torch
from moelab.kernels._compiled import why_not

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
GPU = pytest.param(
    ("triton", "cuda"),
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    id="triton-cuda",
)
TARGETS = (
    [pytest.param(("triton", "cpu"), id="triton-interpreted")]
    if INTERPRETING
    else [
        pytest.param(("torch", "cpu"), id="torch-cpu"),
        GPU,
        pytest.param(
            ("compiled", "cpu"),
            marks=pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
            id="compiled-cpu",
        ),
    ]
)


def pytest_generate_tests(metafunc):
    if "target" in metafunc.fixturenames:
        metafunc.parametrize("target", TARGETS)


def pytest_collection_modifyitems(config, items):
    if INTERPRETING:
        for item in items:
            if "tests/kernels" in item.path.as_posix() and "target" not in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.skip(reason="not about Triton's interpreter"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
