"""From a trained run to text, through the library, the notebook's one line and the command."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from safetensors.torch import load_file
from tokenizers import decoders, models
from typer.testing import CliRunner

from moelab.cli import app
from moelab.cli._options import run_names
from moelab.config import ModelConfig
from moelab.data.preparation import prepare
from moelab.data.tokenizer import EOT, Tokenizer
from moelab.engine.checkpoint import hf
from moelab.inference import Sampling
from moelab.inference.text import Writer, load_run, open_model, open_text
from moelab.lab import Lab
from moelab.models import build
from moelab.runs.store import RunStore

SAMPLING = Sampling(max_new_tokens=20, temperature=0.7, top_k=20)


@pytest.fixture
def opened(trained, workspace):
    """`opened(**options)`: what writes texts with the run's model."""
    return lambda **options: open_text(trained.path, cache=workspace / "data", **options)


def test_a_run_writes_and_streams_the_same_text(opened):
    writer, prompts = opened(), ["wave salt", "", "corn plough barn"]
    found = writer.generate(prompts, SAMPLING)
    assert [t.prompt for t in found] == prompts
    assert all(0 < t.tokens <= 20 and t.finish in ("length", "stop") for t in found)
    streamed = {0: "", 1: "", 2: ""}
    for i, text in writer.stream(prompts, SAMPLING):
        streamed[i] += text
    assert [streamed[i] for i in range(3)] == [t.text for t in found]
    assert writer.generate(prompts[:1], SAMPLING) == found[:1]
    e, grave = writer.tokenizer.encode("è")  # half a character is shown at the end
    for tokens, text in (((e, grave), "è"), ((e, e), "\N{REPLACEMENT CHARACTER}" * 2)):
        pieces = [SimpleNamespace(prompt=0, token=t, finish=f) for t, f in zip(tokens, (None, "length"), strict=True)]
        assert list(writer._texts(iter(pieces))) == [(0, text)]


def test_bytes_that_are_no_character_are_shown_with_what_follows():
    """Of a tokenizer with tokens for bytes, as Mixtral's, whose library gives up such a stream."""
    bytes_ = {f"<0x{byte:02X}>": byte for byte in range(256)}
    backend = tokenizers.Tokenizer(models.BPE(vocab={**bytes_, EOT: 256, "as": 257}, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    pieces = [SimpleNamespace(prompt=0, token=t, finish=None) for t in (0x26, 0xE9, 257)]
    shown = [text for _, text in Writer(None, Tokenizer(backend))._texts(iter(pieces))]
    assert shown == ["&", "\N{REPLACEMENT CHARACTER}as"]


def test_modes_and_exports_write_the_same_text(trained, workspace, opened, tmp_path):
    expected = opened().generate(["the wave"], SAMPLING)
    assert opened(mode="baseline").generate(["the wave"], SAMPLING) == expected
    folder = hf.export(load_run(trained.path), tmp_path / "out", opened().tokenizer)
    assert open_text(folder, cache=workspace / "data").generate(["the wave"], SAMPLING) == expected
    assert opened(dtype="bf16").generate(["wave"], SAMPLING)[0].tokens


def test_positions_that_were_not_trained_are_not_used(trained, workspace, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained.path, run)
    spec = json.loads((run / "spec.json").read_text())
    (run / "spec.json").write_text(json.dumps(spec | {"data": spec["data"] | {"context": 16}}))
    model, whole = load_run(run), load_run(trained.path)
    assert model.config.context == 16 and whole.config.context == 32
    assert torch.equal(model.position_embedding.weight, whole.position_embedding.weight[:16])
    folder = hf.export(model, tmp_path / "out", Tokenizer.train(["wave"], 257))
    assert hf.load(folder).config.context == 16
    (text,) = open_text(run, cache=workspace / "data").generate(["wave salt"], replace(SAMPLING, temperature=0))
    assert text.finish == "context" and text.tokens < 16


def test_one_line_in_a_notebook(trained):
    lab = Lab()
    text = lab.generate(trained, "wave", max_new_tokens=5, temperature=0)
    assert str(text).startswith("wave") and text.tokens <= 5
    assert lab.generate(trained.spec.id[:8], ["wave", "corn"], max_new_tokens=5, temperature=0)[0] == text
    for wrong, said in (({"topp": 0.5}, r"topp.*max_new_tokens"), ({"top_k": 2.5}, r"top_k must be .* got 2\.5")):
        with pytest.raises(ValueError, match=rf"lab\.generate.*{said}"):
            lab.generate(trained, "wave", **wrong)
    assert lab.generate(trained.path, "wave", max_new_tokens=5, temperature=0) == text
    with pytest.raises(ValueError, match="run 'nosuch': no such run or directory"):
        lab.generate(Path("nosuch"), "wave")
    with pytest.raises(ValueError, match="device must be cpu, or cuda where there is a GPU, got 'gpu'"):
        lab.generate(trained, "wave", device="gpu")


def test_a_text_that_has_changed_is_refused(trained, tmp_path, monkeypatch):
    """The folder's name is in the run's id, its files are not: the tokens would mean others."""
    changed = tmp_path / "text"
    shutil.copytree(trained.spec.data.corpus.removeprefix("folder:"), changed)
    (changed / "sea" / "new.txt").write_text("kelp and brine, brine and kelp. " * 400)
    other = prepare(replace(trained.spec.data, corpus=f"folder:{changed}"), tmp_path / "data")
    monkeypatch.setattr("moelab.inference.text.prepare", lambda *_: other)
    with pytest.raises(ValueError, match="its text or the tokens of it have changed since the training") as error:
        Lab().generate(trained, "wave")
    assert "\n" not in str(error.value)
    monkeypatch.setattr("moelab.data.preparation.prepare", lambda *_: other)
    later = replace(trained.spec, train=replace(trained.spec.train, seed=7))
    with pytest.raises(ValueError, match="has changed between them"):
        Lab().run([trained.spec, later], executor="inline")
    with pytest.raises(ValueError, match=rf"^run {trained.spec.id}: the text folder:.* has changed since it was"):
        Lab().run([trained.spec])
    assert Lab().run([trained.spec], executor="read")[0].finished
    run = Lab().store.run(later)
    assert not run.finished, "it is said before hours of training"
    shutil.rmtree(run.path)  # other tests name the run by the begin of its id


def moelab(*arguments):
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def test_commands(trained, tmp_path, monkeypatch):
    few = ("--max-new-tokens", "6", "--temperature", "0")
    assert moelab("generate", trained.spec.id, "--prompt", "wave salt", *few).startswith("wave salt")
    long = CliRunner().invoke(app, ["generate", trained.spec.id, "--prompt", "wave " * 99])
    assert "allowed are at most 31" in str(long.exception) and not long.output, "it is not printed"
    assert "moelab format in" in moelab("export", trained.spec.id[:6], str(tmp_path / "out"))
    both = moelab("generate", str(tmp_path / "out"), "--prompt", "wave", "--prompt", "corn", *few)
    assert both.startswith("wave") and "\n\ncorn" in both
    out = tmp_path / "out"
    ids = [hf.load_tokenizer(out).encode_prompt(text) for text in ("wave", "corn")]
    given = [word for one in ids for word in ("--ids", ",".join(map(str, one)))]
    (out / "tokenizer.json").rename(out / "hidden")
    with pytest.raises(ValueError, match="text needs a tokenizer, `moelab generate --ids` takes ids"):
        moelab("generate", str(out), "--prompt", "wave", *few)
    for words, said in ((["--ids", "1,x"], "expected token ids"), ([*given, "--prompt", "a"], "not both")):
        with pytest.raises(ValueError, match=said):
            moelab("generate", str(out), *words)
    answers = [json.loads(line) for line in moelab("generate", str(out), *given, *few, "--json").splitlines()]
    assert moelab("generate", str(out), *given, *few).splitlines() == [
        ",".join(map(str, answer["tokens"])) for answer in answers
    ]
    (out / "hidden").rename(out / "tokenizer.json")
    tokens = hf.load_tokenizer(out)
    texts = [
        text + tokens.decode_after(answer["tokens"]) for text, answer in zip(("wave", "corn"), answers, strict=True)
    ]
    assert "\n\n".join(texts) + "\n" == both
    lines = moelab("generate", str(tmp_path / "out"), "--prompt", "wave", "--prompt", "corn", *few, "--json")
    rows = [json.loads(line) for line in lines.splitlines()]
    assert "\n\n".join(row["prompt"] + row["text"] for row in rows) + "\n" == both
    assert rows[0]["model"] == "out" and rows[0]["sampling"]["temperature"] == 0
    monkeypatch.chdir(tmp_path / "out")
    assert json.loads(moelab("generate", ".", "--prompt", "wave", *few, "--json")) == rows[0]


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny", "--tensor", "2"], "generate: tensor needs several ranks; start with torchrun or srun"),
        (["tiny", "--exchange", "ring"], "--exchange must be flat or hierarchical or coordinated"),
        (["tinny"], "run 'tinny': no such run or directory; did you mean tiny-"),
        (["tiny", "--top-p", "0"], "sampling: top_p must be above 0 and at most 1, got 0.0"),
    ],
)
def test_bad_commands(trained, arguments, message):
    with pytest.raises(ValueError, match=message):
        CliRunner().invoke(app, ["generate", *arguments], catch_exceptions=False)


def test_a_damaged_checkpoint(trained, tmp_path, caplog):
    """Its optimizer is not needed; earlier weights are not the result's, but those of a run that is not finished."""
    run = tmp_path / "run"
    shutil.copytree(trained.path, run)
    *_, before, newest = sorted((run / "checkpoints").iterdir())
    expected = load_run(trained.path).state_dict()
    for file in newest.glob("optimizer-*"):
        file.write_bytes(b"torn")
    found = load_run(run).state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected) and not caplog.records
    refused = r"the checkpoint of its result, step 24, is missing or damaged, .*: it goes"
    for file in newest.glob("model-*"):
        file.write_bytes(b"torn")
    with pytest.raises(ValueError, match=refused):
        load_run(run)
    (run / "result.json").rename(tmp_path / "result.json")
    caplog.clear()
    load_run(run)
    assert f"step {int(before.name[5:])} is used in place of the newest checkpoint" in caplog.text
    (tmp_path / "result.json").rename(run / "result.json")
    shutil.rmtree(newest)
    with pytest.raises(ValueError, match=refused):
        load_run(run)


def test_what_cannot_be_opened(trained, workspace, opened, tmp_path):
    with pytest.raises(ValueError, match="neither a run"):
        open_text(tmp_path, cache=workspace / "data")
    small = build(ModelConfig(layers=1, hidden=32, heads=2, vocab=200, context=8), 0)
    folder = hf.export(small, tmp_path / "small", Tokenizer.train(["wave"], 257))
    with pytest.raises(ValueError, match=r"/small: the tokenizer has 257 entries, the model's embedding only 200"):
        open_model(folder, cache=workspace / "data")
    empty = RunStore(tmp_path / "runs").run(trained.spec).path
    with pytest.raises(ValueError, match="no checkpoint yet; train the run first"):
        open_text(empty, cache=workspace / "data")
    with pytest.raises(ValueError, match="dtype must be fp32 or bf16, got 'fp64'"):
        opened(dtype="fp64")
    with pytest.raises(ValueError, match="2 runs start with it"):
        store = RunStore(tmp_path / "two")
        store.run(trained.spec)
        store.run(replace(trained.spec, train=replace(trained.spec.train, lr=1e-3)))
        store.find("tiny")
