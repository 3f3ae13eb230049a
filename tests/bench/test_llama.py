"""llama.cpp beside ours: the GGUF file holds our weights, the same tokens come out, and another model is refused."""

import os
import signal
from dataclasses import replace

import pytest
import torch

from moelab.bench import decode, decode_steps, llama, peers
from moelab.bench.decode import DecodeSettings
from moelab.bench.decoders import decoders
from moelab.config import DecoderConfig, ExpertConfig, ModelConfig
from moelab.engine.checkpoint import hf
from moelab.inference import Generator, Sampling, set_mode

needs_llama = pytest.mark.skipif(
    not (peers.has("llama_cpp") and peers.has("gguf")), reason="needs llama-cpp-python and gguf (extra peers)"
)
OLMOE = replace(decoders(hidden=64, layers=2, vocab=100)["OLMoE 64"], heads=4, context=24, init_std=0.3)
QWEN = replace(
    OLMOE,
    decoder=DecoderConfig.modern(qk_norm="head", ffn=96, kv_heads=2, head_size=32, rotary_base=1e6, norm_eps=1e-6),
    expert=ExpertConfig(ffn=48),
    routing=replace(OLMOE.routing, normalize_weights=True),
)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROMPTS = torch.randint(100, (3, 7), generator=torch.Generator().manual_seed(0)).tolist()
TINY = DecodeSettings(prompt=5, output=6, rounds=2)


@pytest.fixture
def changed(monkeypatch):
    """Change a setting of the model that is written, so that llama.cpp computes something else."""

    def change(**settings):
        def write(config, weights, target, write=llama.write):
            own = {n: v for n, v in settings.items() if hasattr(config.decoder, n)}
            rest = {n: v for n, v in settings.items() if n not in own}
            write(replace(config, **rest, decoder=replace(config.decoder, **own)), weights, target)

        monkeypatch.setattr(llama, "write", write)

    return change


@needs_llama
@pytest.mark.multiprocess
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", [OLMOE, QWEN, replace(QWEN, decoder=replace(QWEN.decoder, tied=True))])
def test_it_writes_our_tokens(config, dtype):
    model = decode_steps.filled(config, "cpu", DTYPES[dtype])
    with llama.beside(model, PROMPTS, 8) as found:  # checks the logits
        theirs = found[llama.NAME].generate(PROMPTS, 8, exact=True)
        alone = found[llama.NAME].generate(PROMPTS[:1], 8, exact=True)
        assert len(found[llama.NAME].turns(PROMPTS, 4)) == 4 and min(theirs.turns) > 0
    if dtype == "fp32":
        ours = Generator(set_mode(model), batch=3).generate(PROMPTS, Sampling(max_new_tokens=8, temperature=0))
        assert [list(c.tokens) for c in ours] == theirs.tokens.tolist()
        assert alone.tokens.tolist() == theirs.tokens[:1].tolist(), "a sequence sees no other"


@needs_llama
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("config", "dtype", "name", "value"),
    [
        (OLMOE, "fp32", "rotary_base", 100.0),
        (OLMOE, "fp32", "top_k", 7),
        (OLMOE, "bf16", "norm_eps", 0.1),
        (QWEN, "fp32", "norm_eps", 1e-4),
        (QWEN, "bf16", "rotary_base", 1e4),
    ],
)
def test_another_model_is_left_out(config, dtype, name, value, changed, capsys):
    changed(**{name: value})
    with llama.beside(decode_steps.filled(config, "cpu", DTYPES[dtype]), PROMPTS, 8) as found:
        assert not found
    (line,) = " ".join(capsys.readouterr().out.split()).split("left out: ")[1:]
    assert line.startswith("llama.cpp: its logits differ from ours by") and line.endswith("is allowed")


@needs_llama
@pytest.mark.multiprocess
def test_what_llama_cpp_refuses_is_left_out_with_its_reason(changed, capsys):
    changed(vocab=50)
    with llama.beside(decode_steps.filled(OLMOE, "cpu"), PROMPTS, 8) as found:
        assert not found
    line = " ".join(capsys.readouterr().out.split())
    assert line.startswith("left out: llama.cpp: it cannot open the file (") and "token_embd.weight" in line


@needs_llama
@pytest.mark.multiprocess
def test_a_process_that_dies_is_told():
    with llama.beside(decode_steps.filled(OLMOE, "cpu"), PROMPTS, 4) as found:
        os.kill(next(iter(found[llama.NAME].pool._processes)), signal.SIGKILL)
        with pytest.raises(ValueError, match=r"^bench decode: the process of llama\.cpp died$"):
            found[llama.NAME].turns(PROMPTS, 4)


@needs_llama
@pytest.mark.multiprocess
def test_bench_decode_measures_it(monkeypatch):
    monkeypatch.setattr(decode, "reader", lambda *_: lambda: 1e10)
    rows = [row.json() for row in decode.measure(OLMOE, [1, 3], TINY)]
    theirs = [row for row in rows if row["candidate"] == llama.NAME]
    assert [row["batch"] for row in theirs] == [1, 3]
    for row in theirs:
        assert row["build"].startswith("llama-cpp-python ") and "OPENMP" in row["build"]
        assert 0 < row["min_ms"] <= row["p95_ms"] and row["floor_ms"] > 0 and row["against"] == "optimised"


def test_the_file_holds_the_weights(tmp_path):
    gguf = pytest.importorskip("gguf", reason="needs gguf (extra peers)")
    model = decode_steps.filled(QWEN, "cpu", torch.bfloat16)
    llama.write(QWEN, dict(model.named_parameters()), tmp_path / "model.gguf")
    held = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    experts, attention = model.blocks[1].ffn.experts, model.blocks[1].attention
    expected = {
        "token_embd.weight": model.token_embedding.weight,
        "output.weight": model.output.weight,
        "blk.1.ffn_gate_exps.weight": experts.up[:, :, 0].mT,
        "blk.1.ffn_up_exps.weight": experts.up[:, :, 1].mT,
        "blk.1.ffn_down_exps.weight": experts.down.mT,
        "blk.1.attn_q.weight": attention.qkv.weight[: QWEN.heads * QWEN.head_size],
        "blk.1.ffn_gate_inp.weight": model.blocks[1].ffn.router.weight.float(),
        "blk.1.attn_q_norm.weight": attention.q_norm.weight.float(),
    }
    for name, weight in expected.items():
        bits = weight.detach().contiguous().view(torch.uint8).flatten().tolist()
        assert held[name].data.tobytes() == bytes(bits), name
    assert len(held) == 3 + QWEN.layers * 12


@pytest.mark.parametrize(
    ("config", "fits"),
    [
        (OLMOE, True),
        (QWEN, True),
        (replace(OLMOE, routing=QWEN.routing), False),
        (replace(QWEN, routing=OLMOE.routing), False),
        (replace(OLMOE, decoder=replace(OLMOE.decoder, kv_heads=2)), False),
        (replace(OLMOE, decoder=replace(OLMOE.decoder, tied=True)), False),
        (replace(QWEN, experts=(0, 64)), False),
        (replace(OLMOE, decoder=replace(OLMOE.decoder, qk_norm="none"), routing=QWEN.routing), False),  # Mixtral's
    ],
)
def test_which_models_fit(config, fits):
    assert hf.suitable_format(config) != "moelab" and llama.fits(config) is fits


@pytest.mark.parametrize("missing", ["llama_cpp", "gguf", "a model that fits"])
def test_nothing_starts_where_it_cannot(missing, monkeypatch):
    monkeypatch.setattr(llama, "has", lambda package: package != missing)
    monkeypatch.setattr(llama, "ProcessPoolExecutor", None)
    config = OLMOE if missing != "a model that fits" else ModelConfig(layers=2, hidden=32, heads=2, vocab=100)
    with llama.beside(decode_steps.filled(config, "cpu"), PROMPTS, 4) as found:
        assert found == {}
