"""How many cores a process may use, and what tells processors of one name apart."""

import io
import platform
from types import SimpleNamespace

import pytest

from moelab import machine
from moelab.runs.provenance import hardware


@pytest.mark.parametrize(("quota", "cores"), [("200000 100000", 2), ("50000 100000", 1), ("max 100000", 8), ("", 8)])
def test_a_containers_share_of_the_cores_counts(quota, cores, monkeypatch):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(machine, "Path", lambda path: SimpleNamespace(read_text=lambda: quota))
    assert machine.cores() == cores


AMD = """processor	: 0
vendor_id	: AuthenticAMD
cpu family	: 25
model		: {model}
model name	: AMD EPYC
flags		: fpu avx2 {flags}

processor	: 1
model name	: another
"""


INTEL = "model name\t: Intel\ncpu family\t: 6\nmodel\t: 143\nflags\t: avx512f amx_bf16 amx_tile\n"


@pytest.mark.parametrize(
    ("text", "described"),
    [
        (AMD.format(model=1, flags=""), "AMD EPYC (family 25, model 1; avx2)"),
        (
            AMD.format(model=17, flags="avx512f avx512_bf16"),
            "AMD EPYC (family 25, model 17; avx2, avx512f, avx512_bf16)",
        ),
        (INTEL, "Intel (family 6, model 143; avx512f, amx_tile, amx_bf16)"),
        ("Features\t: fp asimd bf16\n", f"{platform.processor() or platform.machine()} (asimd, bf16)"),
    ],
)
def test_generations_and_instructions_are_named(text, described):
    assert machine.describe_cpu(text) == described
    assert hardware()["cpu"] == machine.cpu() != ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 26\n\nvendor_id\t: another\n", "AuthenticAMD"),
        ("Features\t: asimd\n", ""),
        (None, ""),  # a system without the file
    ],
)
def test_the_maker_of_the_processor(text, expected, monkeypatch):
    def cpuinfo(*_, **__):
        if text is None:
            raise FileNotFoundError("/proc/cpuinfo")
        return io.StringIO(text)

    monkeypatch.setattr("builtins.open", cpuinfo)
    found = machine.vendor()
    monkeypatch.undo()
    assert found == expected
