"""`moelab plan` and `moelab simulate`, as users type them."""

import json
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from typer.testing import CliRunner

from moelab.cli import app
from moelab.notebook.execute import run
from moelab.simulate import public

ROOT = Path(__file__).resolve().parents[2]


def moelab(*arguments):
    return CliRunner().invoke(app, arguments)


def test_plan_says_what_and_why(tmp_path):
    figure = tmp_path / "front.png"
    done = moelab("plan", "350M+MoE-32", "--gpus", "16", "--objective", "throughput", "--figure", str(figure))
    assert done.exit_code == 0, done.output
    for part in ("350M+MoE-32 on a100-40gb", "bound by", "runner-up", "Pareto front", "GiB a GPU"):
        assert part in done.output
    assert figure.stat().st_size > 10_000


def test_decode_train_clusters_and_score(tmp_path):
    done = moelab("simulate", "decode", "1.3B+MoE-128", "--gpus", "64", "--system", "pytorch")
    assert "ms a token" in done.output and "launch" in done.output and "fits" in done.output
    assert "per million tokens" in done.output
    mine = tmp_path / "mine.yaml"
    gpu = "{name: X, memory_gib: 40, memory_gb_s: 1000, tflops: 100}"
    mine.write_text(f"name: mine\ngpu: {gpu}\ngpus_per_node: 4\nnear_gb_s: 50\nfar_gb_s: 5\n")
    decode = ("simulate", "decode", "350M+MoE-32", "--cluster", str(mine), "--dtype")
    one, two = (moelab(*decode, dtype) for dtype in ("fp16", "fp32"))
    assert "on 8 GPUs of mine" in one.output and "per million" not in one.output, "no price, no cost"
    assert one.output != two.output
    done = moelab("simulate", "train", "6.7B", "--tensor", "8", "--batch", "1024", "--micro-batch", "4")
    assert "samples/s" in done.output and "days for 300 billion tokens" in done.output
    layout = ("simulate", "train", "1.3B+MoE-128", "--tensor", "8", "--json", "--system")
    systems = ("pytorch", "deepspeed", "megatron")
    exchanges = [json.loads(moelab(*layout, name).output)["parallel"]["exchange"] for name in systems]
    assert exchanges == ["flat", "coordinated-hierarchical", "coordinated"], "the system's own"
    for tokens in ("nan", "-1", "inf"):
        done = moelab("simulate", "train", "6.7B", "--tokens", tokens)
        assert str(done.exception) == f"--tokens must be a positive number, got {tokens}"
    done = moelab("simulate", "decode", "1.3B", "--gpus", "0")
    assert str(done.exception) == "--gpus and --tensor must be at least 1, got 0 and 1"
    assert "a100-80gb" in moelab("simulate", "clusters").output
    assert "median absolute error, predicted" in moelab("simulate", "score").output


def test_a_program_of_today_has_a_range_and_a_nearest_measurement():
    today = ("--system", "engine", "--cluster", "h200", "--dtype", "fp8")
    done = moelab("simulate", "decode", "deepseek-v3", "--gpus", "16", "--batch", "64", *today)
    assert done.exit_code == 0, done.output
    assert "DeepSeek-V3 on 16 GPUs of h200" in done.output and "ranges like it held for 16 of 24" in done.output
    assert "nearest measurement: 34.6 ms a token, batch 64, SGLang on h200" in done.output
    done = moelab("simulate", "decode", "deepseek-v3", "--gpus", "64", "--system", "engine", "--cluster", "h100")
    assert "expert=72 batch=256" in done.output, "without --expert, all GPUs share the experts"
    assert "nearest measurement: 22,282 tokens/s a node, batch 256, SGLang on h100" in done.output
    done = moelab("plan", "qwen3-30b", "--gpus", "2", "--batch", "8", *today)
    assert "ms a token: ranges like it" in done.output and "nearest" not in done.output
    done = moelab("simulate", "decode", "1.3B+MoE-128")
    assert "ranges like it" not in done.output
    done = moelab("simulate", "decode", "qwen3-30b", "--system", "engine", "--tensor", "4", "--json")
    assert json.loads(done.output)["parallel"]["exchange"] == "coordinated", "a token goes to an expert once"
    done = moelab("simulate", "decode", "qwen3-30b", "--system", "engine-tp", "--expert", "8")
    assert str(done.exception).endswith("over the tensor group; leave out --expert, --slicing, --exchange")


def test_a_published_model_is_simulated_as_it_is_served_today_unless_something_else_is_asked_for():
    named = ("simulate", "decode", "deepseek-v3", "--gpus", "64")
    said = moelab(*named).output
    assert "64 GPUs of h100, engine" in said
    assert said == moelab(*named, "--cluster", "h100", "--system", "engine", "--dtype", "fp8").output
    assert said == moelab("simulate", "decode", "DeepSeek-V3", "--gpus", "64").output
    on_a100 = moelab(*named, "--cluster", "a100").output  # which has no fp8
    assert on_a100 == moelab(*named, "--cluster", "a100", "--system", "engine", "--dtype", "bf16").output
    assert "a100-40gb, deepspeed" in moelab("simulate", "decode", "1.3B+MoE-128").output
    assert "h100, megatron" in moelab("simulate", "train", "qwen3-30b", "--gpus", "8").output
    done = moelab("plan", "deepseekv3", "--gpus", "8")
    assert str(done.exception).startswith("no model 'deepseekv3'; did you mean deepseek-v3?")


def test_a_measurement_outside_the_range_is_called_so(monkeypatch):
    near = public.nearest("decode", "deepseek-v3", "h200", batch=64, tensor=1, expert=16)
    named = ("simulate", "decode", "deepseek-v3", "--gpus", "16", "--batch", "64", "--cluster", "h200")
    for value, flagged in ((near.value, False), (20 * near.value, True)):
        monkeypatch.setattr(public, "nearest", lambda *_, v=value, **more: replace(near, value=v))
        assert ("outside this range" in moelab(*named).output) == flagged


def test_the_public_scoreboard_by_group():
    done = moelab("simulate", "score", "--public", "--group", "prefill")
    assert done.exit_code == 0 and "deepseek-v3-prefill-1" in done.output and "sealed" in done.output
    for which in (["--public"], []):
        done = moelab("simulate", "score", *which, "--group", "prefil")
        assert "no group 'prefil'; did you mean prefill?" in str(done.exception)


def test_fit_writes_what_it_found(tmp_path):
    file = tmp_path / "calibration.json"
    done = moelab("simulate", "fit", "--out", str(file))
    assert done.exit_code == 0, done.output
    stored = json.loads((ROOT / "moelab/simulate/calibration.json").read_text())
    found = json.loads(file.read_text())
    assert set(found) == set(stored) and found["constants"] == pytest.approx(stored["constants"], rel=2e-3)


SEARCHES = """
searches, plan = [], simulate.plan
simulate.plan = lambda *given, **more: (searches.append(given), plan(*given, **more))[1]
for value in (16, 32, 128):  # as a person that drags the slider
    gpus.value = value
await asyncio.sleep(0.2)
assert not searches, "nobody waits for what was passed on the way"
for _ in range(300):
    await asyncio.sleep(0.1)
    if searches:
        break
whole = all(control.style.description_width == "initial" for control in (*controls.values(), objective, limit))
print(len(searches), "search on", searches[0][1], "GPUs, labels", "whole" if whole else "cut")
"""


@pytest.mark.slow
@pytest.mark.notebook
def test_the_what_if_page_runs(tmp_path):
    notebook = nbformat.read(ROOT / "notebooks" / "16_what_if.ipynb", as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(SEARCHES))
    nbformat.write(notebook, tmp_path / "what_if.ipynb")
    run(tmp_path / "what_if.ipynb", tmp_path / "executed.ipynb", {"scale": "smoke"})
    notebook = nbformat.read(tmp_path / "executed.ipynb", as_version=4)
    outputs = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    widgets = sum("application/vnd.jupyter.widget-view+json" in data for data in outputs)
    assert widgets == 4, "two boxes of controls, two outputs"
    assert notebook.cells[-1].outputs[-1].text == "1 search on 128 GPUs, labels whole\n"
