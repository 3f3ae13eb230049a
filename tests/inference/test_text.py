"""From a trained run to text, through the library, the notebook's one line and the command."""

import json
import shutil
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from moelab.cli import app
from moelab.cli._options import run_names
from moelab.engine.checkpoint import hf
from moelab.engine.launch import launch
from moelab.inference import Sampling
from moelab.inference.text import load_run, open_text
from moelab.lab import Lab
from moelab.runs.store import RunStore

SAMPLING = Sampling(max_new_tokens=20, temperature=0.7, top_k=20)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def spec(tiny_spec):
    return replace(tiny_spec, model=replace(tiny_spec.model, dropout=0.0))


@pytest.fixture
def trained(spec, home, monkeypatch):
    """A finished run, trained once."""
    monkeypatch.setenv("MOELAB_HOME", str(home))
    return Lab(RunStore()).run([spec], executor="inline")[0]


def test_a_run_writes_and_streams_the_same_text(trained, home):
    writer = open_text(trained.path, cache=home / "data")
    prompts = ["wave salt", "", "corn plough barn"]
    found = writer.generate(prompts, SAMPLING)
    assert [t.prompt for t in found] == prompts
    assert all(0 < t.tokens <= 20 and t.finish in ("length", "stop") for t in found)
    streamed = {0: "", 1: "", 2: ""}
    for i, text in writer.stream(prompts, SAMPLING):
        streamed[i] += text
    assert [streamed[i] for i in range(3)] == [t.text for t in found]
    assert writer.generate(prompts[:1], SAMPLING) == found[:1]


def test_modes_and_exports_write_the_same_text(trained, home, tmp_path):
    expected = open_text(trained.path, cache=home / "data").generate(["the wave"], SAMPLING)
    assert open_text(trained.path, cache=home / "data", mode="baseline").generate(["the wave"], SAMPLING) == expected
    model = load_run(trained.path)
    writer = open_text(trained.path, cache=home / "data")
    folder = hf.export(model, tmp_path / "out", writer.tokenizer)
    assert open_text(folder, cache=home / "data").generate(["the wave"], SAMPLING) == expected


def test_half_a_character_is_shown_at_the_end(trained, home):
    writer = open_text(trained.path, cache=home / "data")
    e, grave = writer.tokenizer.encode("è")

    class Piece:
        prompt = 0

        def __init__(self, token, finish=None):
            self.token, self.finish = token, finish

    assert list(writer._texts(iter([Piece(e), Piece(grave, "length")]))) == [(0, "è")]
    assert list(writer._texts(iter([Piece(e), Piece(e, "length")]))) == [(0, "��")]


def test_one_line_in_a_notebook(trained):
    lab = Lab()
    text = lab.generate(trained, "wave", max_new_tokens=5, temperature=0)
    assert str(text).startswith("wave") and text.tokens <= 5
    assert lab.generate(trained.spec.id[:8], ["wave", "corn"], max_new_tokens=5, temperature=0)[0] == text
    with pytest.raises(ValueError, match=r"lab\.generate: unknown topp; allowed: max_new_tokens"):
        lab.generate(trained, "wave", topp=0.5)


def test_bf16_writes_too(trained, home):
    assert open_text(trained.path, cache=home / "data", dtype="bf16").generate(["wave"], SAMPLING)[0].tokens


def moelab(*arguments):
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def test_commands(trained, tmp_path):
    few = ("--max-new-tokens", "6", "--temperature", "0")
    assert moelab("generate", trained.spec.id, "--prompt", "wave salt", *few).startswith("wave salt")
    assert "moelab format in" in moelab("export", trained.spec.id[:6], str(tmp_path / "out"))
    both = moelab("generate", str(tmp_path / "out"), "--prompt", "wave", "--prompt", "corn", *few)
    assert both.startswith("wave") and "\n\ncorn" in both
    lines = moelab("generate", str(tmp_path / "out"), "--prompt", "wave", "--prompt", "corn", *few, "--json")
    rows = [json.loads(line) for line in lines.splitlines()]
    assert "\n\n".join(row["prompt"] + row["text"] for row in rows) + "\n" == both
    assert rows[0]["model"] == "out" and rows[0]["sampling"]["temperature"] == 0


def test_published_weights_are_opened_by_name(trained, tmp_path, monkeypatch):
    folder = tmp_path / "weights" / "looked-at"
    moelab("export", trained.spec.id, str(folder), "--dtype", "bf16", "--format", "moelab")
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    card, result = (folder / "README.md").read_text(), trained.result
    assert "moelab generate looked-at --prompt" in card and f"{result['validation_loss']:.4f} nats a token" in card
    assert f"| sea | {result['validation_by_domain']['sea']['loss']:.3f} |" in card and "{" not in card
    monkeypatch.setenv("MOELAB_RESULTS", str(tmp_path))
    few = ("--prompt", "wave", "--max-new-tokens", "6", "--temperature", "0", "--dtype", "bf16")
    assert moelab("generate", "looked-at", *few) == moelab("generate", trained.spec.id, *few)
    assert run_names("look") == ["looked-at"] and RunStore().find("looked") == folder
    with pytest.raises(ValueError, match=r"^export: --dtype is for the weights of runs; .* is a model"):
        moelab("export", "looked-at", str(tmp_path / "again"), "--dtype", "fp32")


@pytest.mark.multiprocess
@pytest.mark.slow
def test_the_command_on_ranks(trained, tmp_path):
    """What `torchrun -m moelab.cli generate` does, started by our own launcher."""
    arguments = ["generate", trained.spec.id, "--prompt", "wave", "--prompt", "corn", "--prompt", "mill"]
    alone = CliRunner().invoke(app, arguments, catch_exceptions=False).output
    command = [sys.executable, "-m", "moelab.cli", *arguments, "--tensor", "2", "--exchange", "coordinated"]
    launch(command, 2, logs=tmp_path)
    assert (tmp_path / "rank-00000.txt").read_text().endswith(alone)
    assert alone not in (tmp_path / "rank-00001.txt").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny", "--tensor", "2"], "generate: tensor needs several ranks; start with torchrun or srun"),
        (["tiny", "--exchange", "ring"], "--exchange must be flat or hierarchical or coordinated"),
        (["tinny"], "run 'tinny': no such run or directory; did you mean tiny-"),
        (["other"], "run 'other': no such run or directory; runs are in .*, 1 there"),
        (["tiny", "--top-p", "0"], "sampling: top_p must be above 0 and at most 1, got 0.0"),
        (["tiny", "--mode", "slow"], "--mode must be optimised or baseline, got 'slow'"),
    ],
)
def test_bad_commands(trained, arguments, message):
    with pytest.raises(ValueError, match=message):
        CliRunner().invoke(app, ["generate", *arguments], catch_exceptions=False)


def test_a_damaged_optimizer_keeps_no_weights_from_being_read(trained, home, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(trained.path, run)
    newest = sorted((run / "checkpoints").iterdir())[-1]
    for file in newest.glob("optimizer-*"):
        file.write_bytes(b"torn")
    expected = load_run(trained.path).state_dict()
    found = load_run(run).state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected) and not caplog.records


@pytest.mark.parametrize("harm", ["damaged", "removed"])
def test_earlier_weights_are_not_the_results(trained, home, tmp_path, caplog, harm):
    """Of a run that is not finished they are used, and the step is named."""
    run = tmp_path / "run"
    shutil.copytree(trained.path, run)
    *_, before, newest = sorted((run / "checkpoints").iterdir())
    if harm == "removed":
        shutil.rmtree(newest)
    else:
        for file in newest.glob("model-*"):
            file.write_bytes(b"torn")
    with pytest.raises(
        ValueError, match=r"the checkpoint of its result, step 24, is missing or damaged, .*: it goes on"
    ):
        load_run(run)
    caplog.clear()
    (run / "result.json").unlink()
    load_run(run)
    assert harm == "removed" or f"step {int(before.name[5:])} is used in place of the newest checkpoint" in caplog.text


def test_what_cannot_be_opened(trained, home, tmp_path):
    with pytest.raises(ValueError, match="neither a run"):
        open_text(tmp_path, cache=home / "data")
    empty = RunStore(tmp_path / "runs").run(trained.spec).path
    with pytest.raises(ValueError, match="no checkpoint yet; train the run first"):
        open_text(empty, cache=home / "data")
    with pytest.raises(ValueError, match="dtype must be fp32 or bf16, got 'fp64'"):
        open_text(trained.path, cache=home / "data", dtype="fp64")
    with pytest.raises(ValueError, match="2 runs begin so"):
        store = RunStore(tmp_path / "two")
        store.run(trained.spec)
        store.run(replace(trained.spec, train=replace(trained.spec.train, lr=1e-3)))
        store.find("tiny")


def test_a_published_model_is_imported_continued_and_exported(tmp_path):
    transformers = pytest.importorskip("transformers", reason="needs transformers (extra eval)")
    import torch

    from moelab.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.train(["the wave and the wind and the mast"] * 3, 300)
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, intermediate_size=32, moe_intermediate_size=16, num_experts=4,
        num_experts_per_tok=2, max_position_embeddings=64, initializer_range=0.3, eos_token_id=tokenizer.eot,
    )  # fmt: skip
    theirs = transformers.Qwen3MoeForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "in")
    tokenizer.save(tmp_path / "in" / "tokenizer.json")
    ids = torch.tensor([tokenizer.encode("the wind")])
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=9)[0].tolist()
    assert "of them active" in moelab("import", str(tmp_path / "in"), str(tmp_path / "ours"))
    for folder in ("in", "ours"):
        options = ("--prompt", "the wind", "--temperature", "0", "--max-new-tokens", "9")
        shown = moelab("generate", str(tmp_path / folder), *options)
        assert shown.rstrip("\n") == tokenizer.decode([t for t in expected if t != tokenizer.eot]).rstrip("\n")
    assert "qwen3_moe format in" in moelab("export", str(tmp_path / "ours"), str(tmp_path / "back"))
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (tmp_path / "in" / "tokenizer.json").read_bytes()
