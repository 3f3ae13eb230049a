"""`moelab bench train`: the paper's numbers of experts, uneven batches, a dtype for each family."""

import functools
import json
import signal

import pytest

from moelab.bench import harness, train
from moelab.bench.harness import Timing
from moelab.config import ModelConfig, TrainConfig

QUICK = Timing(2, clock="cpu", warm_up=1)
GIVEN = dict(families=["dense"], dtypes=["fp32"], steps=1, threads=1, sequences=2, timing=QUICK)


@pytest.fixture(autouse=True)
def known_machine(monkeypatch):
    """Measuring takes longer than all the rest; PyTorch's own products are the fastest."""
    monkeypatch.setattr(train, "onednn_is_faster", lambda: False)
    monkeypatch.setattr(harness, "product_rate", lambda *_: 1e11)


def test_twins_have_the_papers_experts():
    assert set(train.twin("MoE-128", 64).experts) == {0, 128}
    assert set(train.twin("PR-MoE-32/64", 32).experts) == {0, 32, 64}
    for width in (32, 64, 128, 384):
        model = train.twin("dense", width)
        assert (model.hidden, model.vocab, model.context, model.is_moe) == (width, 2048, 128, False)


@pytest.mark.parametrize("another", [False, True])
def test_the_command_names_a_dtype_for_each_family(another, tmp_path, monkeypatch, capsys):
    """With `another` library than PyTorch's for fp32 products, both are measured."""
    monkeypatch.setattr(train, "onednn_is_faster", lambda: another)
    wanted = dict(families=["dense", "PR-MoE-32/64"], dtypes=["fp32", "bf16"])
    train.main(**GIVEN | wanted, widths=[32], out=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    names = [
        "dense, fp32", "dense, bare loop, fp32", "dense, PyTorch's products, fp32", "dense, bf16", "dense, bare loop, bf16",
        "PR-MoE-32/64, fp32", "PR-MoE-32/64, PyTorch's products, fp32", "PR-MoE-32/64, bf16",
    ]  # fmt: skip
    assert [r["candidate"] for r in rows] == [name for name in names if another or train.DEFAULT not in name]
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(2 * 128 / row["median_ms"] * 1e3)
        flops = train.twin(row["family"], 32).flops_per_token()
        assert row["floor_ms"] == pytest.approx(2 * 128 * flops / 1e11 * 1e3)
    said = capsys.readouterr().out
    assert said.count("use fp32") + said.count("use bf16") == 2 and (tmp_path / "train.svg").exists()


def test_a_student_has_a_teacher(monkeypatch):
    heard = []
    further = train.Distiller.targets
    monkeypatch.setattr(train.Distiller, "targets", lambda *given: heard.append(further(*given)) or heard[-1])
    teacher, student = train.measure(32, **GIVEN | dict(families=["PR-MoE-32/64", "PR-MoE+L21 + KD"]))
    assert len(heard) == 3 and None not in heard, "a warm-up and two rounds"
    flops = train.twin("PR-MoE+L21 + KD", 32).flops_per_token() + train.twin("PR-MoE-32/64", 32).flops_per_token() / 3
    assert student.floor_ms == pytest.approx(2 * 128 * flops / 1e11 * 1e3) and student.floor_ms > teacher.floor_ms


@pytest.mark.parametrize(
    ("fp32", "bf16", "use"),
    [((2.0, 3.0), (1.0, 1.0), "use bf16"), ((1.0, 1.0), (2.0, 3.0), "use fp32"), ((1.0, 2.0), (1.5, 1.5), "equal")],
)
def test_advice_follows_every_round(fp32, bf16, use):
    numbers = {
        f"dense, {d}": {"family": "dense", "dtype": d, "parameters": 1, "tokens_per_s": 1.0} for d in ("fp32", "bf16")
    }
    found = harness.rows(
        {"width": 32}, {"dense, fp32": fp32, "dense, bf16": bf16}, against="dense, fp32", floor_s=1.0,
        timing=QUICK, inputs="none", numbers=numbers,
    )  # fmt: skip
    (line,) = train.advice(found)
    assert use in line and line.startswith("dense, 32 wide: fp32")
    assert train.advice(found[:1]) == []


@pytest.mark.parametrize(("steps", "rounds"), [(1, 20), (3, 7), (10, 2), (20, 1), (50, 1)])
def test_no_timed_step_is_among_the_first_ones(steps, rounds):
    assert train.warm_up_rounds(steps) == rounds


def test_side_by_side_returns_a_speed_each_round():
    model = ModelConfig(2, 32, 1, vocab=100, context=16)  # fewer ids than the text has
    speeds = train.side_by_side({"a": model, "b": model}, TrainConfig(batch_size=2), steps=1, rounds=2)
    assert {name: len(found) for name, found in speeds.items()} == {"a": 2, "b": 2}
    assert min(min(found) for found in speeds.values()) > 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(families=["MoE-64"]), r"family must be one of dense, .*, PR-MoE\+L21 \+ KD, got 'MoE-64'"),
        (dict(dtypes=["fp16"]), "dtype must be one of fp32, bf16, got 'fp16'"),
        (dict(widths=[40]), "width must be a multiple of 16 up to 1024, got 40"),
        (dict(steps=0), "steps must be at least 1"),
        (dict(sequences=0), "sequences must be at least 1"),
        (dict(threads=2), "processor time needs 1 thread"),
    ],
)
def test_bad_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        train.main(**GIVEN | dict(widths=[32], out=None) | wrong)


@pytest.mark.multiprocess
def test_each_candidate_has_a_process(monkeypatch, tmp_path):
    monkeypatch.setattr(train, "onednn_is_faster", lambda: True)
    train.main(**GIVEN | dict(timing=Timing(1, warm_up=0)), widths=[32], out=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    names = ["dense, fp32", "dense, bare loop, fp32", "dense, PyTorch's products, fp32"]
    assert [row["candidate"] for row in rows] == names and all(row["apart"] and row["median_ms"] > 0 for row in rows)


@pytest.mark.multiprocess
def test_a_process_that_dies_is_one_line():
    with pytest.raises(ValueError, match=r"^bench train: dense: .* died with exit code -9$"):
        train.apart({"dense": functools.partial(signal.raise_signal, signal.SIGKILL)}, 1, 1, Timing(1, warm_up=0))
