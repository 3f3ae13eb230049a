"""The processor's description tells generations apart where the name does not."""

import io

import pytest

from moelab import machine
from moelab.runs.provenance import hardware

AMD = """processor	: 0
vendor_id	: AuthenticAMD
cpu family	: 25
model		: {model}
model name	: AMD EPYC
flags		: fpu avx2 {flags}

processor	: 1
model name	: another
"""


def test_equal_names_of_two_generations_differ():
    zen3 = machine.describe_cpu(AMD.format(model=1, flags=""))
    zen4 = machine.describe_cpu(AMD.format(model=17, flags="avx512f avx512_bf16"))
    assert zen3 == "AMD EPYC (family 25, model 1; avx2)"
    assert zen4 == "AMD EPYC (family 25, model 17; avx2, avx512f, avx512_bf16)"


def test_amx_is_named():
    text = "model name\t: Intel\ncpu family\t: 6\nmodel\t: 143\nflags\t: avx512f amx_bf16 amx_tile\n"
    assert machine.describe_cpu(text) == "Intel (family 6, model 143; avx512f, amx_tile, amx_bf16)"


def test_other_systems_name_what_they_know():
    assert machine.describe_cpu("Features\t: fp asimd bf16\n").endswith("(asimd, bf16)")
    assert hardware()["cpu"] == machine.cpu() != ""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vendor_id\t: AuthenticAMD\ncpu family\t: 26\n\nvendor_id\t: another\n", ("AuthenticAMD", 26)),
        ("Features\t: asimd\n", ("", 0)),
        (None, ("GenuineIntel", 0)),  # a system without the file
    ],
)
def test_the_maker_of_the_processor(text, expected, monkeypatch):
    def cpuinfo(*_, **__):
        if text is None:
            raise FileNotFoundError("/proc/cpuinfo")
        return io.StringIO(text)

    monkeypatch.setattr("builtins.open", cpuinfo)
    monkeypatch.setattr(machine.platform, "processor", lambda: "Intel64 Family 6")
    found = machine.vendor()
    monkeypatch.undo()
    assert found == expected
