"""Every kernel compiles for the GPUs of the paper and the next, without spilling registers, on a machine without
one."""

import csv
import os
import re
from pathlib import Path

import pytest

pytest.importorskip("triton")

from moelab.kernels.tools import compile as aot

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreting process cannot compile"
)
TABLE = Path(__file__).parents[2] / "results/kernels/compile.csv"


@pytest.mark.slow
@pytest.mark.parametrize("arch", sorted(aot.LIMITS))
def test_compiles_without_spills(arch):
    records = aot.compile_all((arch,), aot.QUICK)
    assert [r for r in records if r.spill_bytes] == []
    assert all(r.registers > 0 and 0 < r.occupancy <= 1 and r.arch == arch for r in records)


@pytest.mark.slow
def test_a_persistent_product_is_one_pipelined_loop():
    """Its loop over places and its loop over K are flattened, and rows and weights are loaded asynchronously."""
    found = aot.launches(("ffn R65536 E128 M2048 F768 bf16 persistent",))
    launch = next(x for x in found if x.kernel.__name__ == "_product_kernel")
    code = aot.machine_code(launch, "sm_80").asm["ttgir"]
    loops = [m[2] for m in re.finditer(r"^( *)(?:%\S+ = )?scf\.for(.*?)^\1}", code, re.DOTALL | re.MULTILINE)]
    (body,) = (loop for loop in loops if "tt.dot" in loop)
    assert "scf.for" not in body and "tt.store" in body and body.count("ttg.async_copy_global_to_local") == 2


def test_the_quick_cases_cover_every_kernel():
    assert {x.kernel.__name__ for x in aot.launches(aot.QUICK)} == {x.kernel.__name__ for x in aot.launches()}


def test_launches_are_recorded_as_triton_would_specialise_them():
    launch = next(x for x in aot.launches(("gate S64 E128 K1 random",)) if x.kernel.__name__ == "_gate_small_kernel")
    signature = dict(launch.signature)
    assert signature["logits_p"] == "*fp32" and signature["expert_p"] == "*i32" and signature["BE"] == "constexpr"
    names = launch.kernel.arg_names
    assert names.index("E") in launch.aligned  # 128 experts
    assert names.index("low") not in launch.aligned  # a seed must not compile anew


def test_numbers_that_change_from_step_to_step_compile_nothing_anew():
    """Tokens, rows, capacity, blocks, tiles: a multiple of 16, any other number and 1 are one kernel."""
    changing = {"S", "R", "N", "CAP", "blocks", "tiles", "low", "high"}
    for launch in aot.launches():
        if "weight_kernel" in launch.kernel.__name__ or "product_kernel" in launch.kernel.__name__:
            changing_here = changing - {"N"}  # a width there
        else:
            changing_here = changing
        for i, parameter in enumerate(launch.kernel.params):
            if parameter.name in changing_here:
                assert parameter.do_not_specialize and i not in launch.aligned, launch.kernel.__name__


def test_occupancy_by_hand():
    assert aot.estimate_occupancy("sm_80", 4, 128, 0) == (4, 0.25)  # 65536 registers / (128 threads * 128)
    assert aot.estimate_occupancy("sm_80", 4, 32, 0) == (16, 1.0)
    assert aot.estimate_occupancy("sm_80", 8, 64, 80 << 10) == (2, 0.25)  # 164 KiB / 81 KiB
    assert aot.estimate_occupancy("sm_90", 1, 16, 0) == (32, 0.5)  # 32 blocks of one warp


@pytest.mark.parametrize(
    ("interprets", "words"), [(None, "needs the triton package"), (True, "without TRITON_INTERPRET")]
)
def test_what_cannot_compile_is_one_line(interprets, words, monkeypatch):
    """The command line prints a ValueError in a line, of others the traceback."""
    monkeypatch.setattr(aot._common, "triton_interprets", lambda: interprets)
    with pytest.raises(ValueError, match=words):
        aot.main(("sm_80",), None)


def test_unknown_architecture():
    with pytest.raises(ValueError, match="no limits known for 'sm_10'"):
        aot.compile_all(("sm_10",), ())


def test_the_kept_table_is_current():
    """Same kernels and configurations as the code launches today, none of them spilling."""
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {r["arch"] for r in rows} == set(aot.LIMITS)
    expected = sorted((x.kernel.__name__.strip("_"), x.case) for x in aot.launches())
    for arch in aot.LIMITS:
        assert sorted((r["kernel"], r["case"]) for r in rows if r["arch"] == arch) == expected
    assert all(r["spill_bytes"] == "0" for r in rows)
