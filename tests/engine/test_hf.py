import re
from dataclasses import replace

import pytest
import tokenizers
import torch
from safetensors.torch import save_file

from moelab.config import ModelConfig
from moelab.config.parallel import ParallelConfig
from moelab.data.tokenizer import Tokenizer
from moelab.engine.checkpoint import hf
from moelab.engine.mesh import Mesh
from moelab.files import read_json, write_json
from moelab.models import build
from moelab.models.moe import Experts

DENSE = ModelConfig(layers=2, hidden=32, heads=2, vocab=300, context=24, init_std=0.3)
PR = replace(DENSE, layers=4, experts=(0, 2, 0, 4), residual=True, name="small PR")
TOKENS = torch.randint(300, (3, 20), generator=torch.Generator().manual_seed(1))


def made(config):
    model = build(config, 0).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
    return model


@pytest.fixture
def transformers():
    return pytest.importorskip("transformers", reason="needs transformers (extra eval)")


def test_a_dense_model_has_the_logits_of_transformers_gpt2(tmp_path, transformers):
    model = made(DENSE)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(hf.export(model, tmp_path / "out")).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(TOKENS).logits, model(TOKENS).logits_BTV, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", ["lm head", "bare", "shards"])
def test_a_gpt2_of_transformers_is_read(tmp_path, transformers, part):
    config = transformers.GPT2Config(
        n_layer=2, n_embd=32, n_head=2, vocab_size=300, n_positions=24, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    saved = theirs.transformer if part == "bare" else theirs
    saved.save_pretrained(tmp_path / "in", max_shard_size="20KB" if part == "shards" else "1GB")
    assert (tmp_path / "in" / "model.safetensors.index.json").exists() == (part == "shards")
    model = hf.load(tmp_path / "in").eval()
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits_BTV, theirs(TOKENS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [DENSE, PR, replace(PR, top_k=2, residual=False)])
def test_what_is_written_is_read_back_bit_for_bit(tmp_path, config):
    model = made(config)
    again = hf.load(hf.export(model, tmp_path / "out"))
    assert again.config.experts == config.experts and again.config.residual == config.residual
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits_BTV, again.eval()(TOKENS).logits_BTV)


def test_a_mesh_of_one_rank_says_where_the_model_is(tmp_path):
    folder = hf.export(made(PR), tmp_path / "out")
    model = hf.load_part(folder, Mesh(ParallelConfig(), PR.experts)).module
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_an_expert_is_a_tensor_named_by_its_global_id(tmp_path):
    from safetensors.torch import load_file

    model = made(PR)
    tensors = load_file(hf.export(model, tmp_path / "out") / "model.safetensors")
    assert torch.equal(tensors["blocks.3.ffn.experts.2.up"], model.blocks[3].ffn.experts.up[2])
    assert tensors["blocks.3.ffn.experts.2.down_bias"].shape == (32,)
    assert "blocks.1.ffn.experts.2.up" not in tensors, "the first MoE layer has two experts"


def test_a_ranks_part_of_a_model_is_refused(tmp_path):
    """Its experts would be written under the numbers of others."""
    model = made(PR)
    model.blocks[3].ffn.experts = Experts(2, PR.expert_feed_forward)
    with pytest.raises(ValueError, match=r"^export: weights of this model are .* on other ranks; load it as a whole$"):
        hf.export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_goes_along(tmp_path, transformers):
    text = "the wave and the wind and the mast"
    tokenizer = Tokenizer.train([text] * 3, 300)
    folder = hf.export(made(DENSE), tmp_path / "out", tokenizer)
    assert hf.load_tokenizer(folder).encode(text) == tokenizer.encode(text)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs(text)["input_ids"] == tokenizer.encode(text) and theirs.eos_token_id == tokenizer.eot


def test_the_end_of_a_text_goes_along(tmp_path):
    file = Tokenizer.train(["the wave"], 300).backend.to_str().replace("<|endoftext|>", "</s>")
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(file), "</s>")
    folder = hf.export(made(DENSE), tmp_path / "out", tokenizer)
    assert hf.load_tokenizer(folder).eot == tokenizer.eot
    hf.convert(folder, tmp_path / "ours")
    hf.convert(tmp_path / "ours", tmp_path / "back", "gpt2")
    assert read_json(tmp_path / "back" / "config.json")["eos_token_id"] == tokenizer.eot
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(
        ValueError, match=r"/out/tokenizer\.json has no token <\|endoftext\|>; eos_token in tokenizer_con"
    ):
        hf.load_tokenizer(folder)


def test_weights_that_are_no_numbers_and_a_damaged_tokenizer_are_not_converted(tmp_path):
    model = made(DENSE)
    for value in (float("nan"), float("inf")):
        with torch.no_grad():
            model.get_parameter("position_embedding.weight")[3, 4] = value
        folder = hf.export(model, tmp_path / f"out-{value}")
        with pytest.raises(ValueError, match=r"1 of 768 numbers of position_embedding\.weight are NaN or infinite"):
            hf.convert(folder, tmp_path / "converted")
    folder = hf.export(made(DENSE), tmp_path / "out")
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer of the `tokenizers` library \(") as error:
        hf.convert(folder, tmp_path / "converted")
    assert "\n" not in str(error.value) and not (tmp_path / "converted").exists()


def test_bad_directories(tmp_path):
    with pytest.raises(ValueError, match="no model here"):
        hf.load(tmp_path)
    with pytest.raises(ValueError, match=r"no tokenizer\.json here"):
        hf.load_tokenizer(tmp_path)
    folder = hf.export(made(DENSE), tmp_path / "out")
    with pytest.raises(ValueError, match="exists; choose a new directory"):
        hf.export(made(DENSE), folder)
    record = read_json(folder / "config.json")
    for change, message in (
        ({"activation_function": "relu"}, "activation_function is 'relu', supported is 'gelu_new'"),
        ({"model_type": "llama"}, "model_type 'llama' is not supported; allowed: gpt2, olmoe"),
        ({"n_layer": None}, "n_layer must be a whole number, got None"),
        ({"n_inner": 7}, "n_inner is 7, supported is 4 x n_embd"),
        ({"n_layer": 3}, "tensor transformer.h.2.ln_1.weight is missing"),
        ({"n_positions": 25}, r"position_embedding.weight is \(24, 32\), expected \(25, 32\)"),
        ({"model_type": ["gpt2"]}, r"model_type \['gpt2'\] is not supported"),
        ({"n_head": 0}, r"config\.json: n_head must be greater than or equal to 1, got 0"),
        ({"n_head": 5}, r"config\.json: model: 5 heads do not divide hidden size 32"),
    ):
        write_json(folder / "config.json", {**record, **change})
        with pytest.raises(ValueError, match=message):
            hf.load(folder)
    for ids in ([], "end"):
        write_json(folder / "config.json", {**record, "eos_token_id": ids})
        words = f"config.json: eos_token_id must be a whole number or a list of them, got {ids!r}"
        with pytest.raises(ValueError, match=re.escape(words)):
            hf.convert(folder, tmp_path / "converted")
    write_json(folder / "config.json", {**record, "eos_token_id": [7, 8]})
    hf.convert(folder, tmp_path / "converted", "gpt2")
    assert read_json(tmp_path / "converted" / "config.json")["eos_token_id"] == 7
    write_json(folder / "config.json", record)
    for index in ({"metadata": {}}, [1], {"weight_map": []}, {"weight_map": {"wte.weight": 3}}):
        write_json(folder / "model.safetensors.index.json", index)
        with pytest.raises(ValueError, match=r"index\.json: weight_map must be an object of tensor names and their fi"):
            hf.load(folder)
    (folder / "model.safetensors.index.json").unlink()
    save_file({}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"no tensor in model\.safetensors"):
        hf.load(folder)
    (folder / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="unreadable"):
        hf.load(folder)
    moe = hf.export(made(PR), tmp_path / "moe")
    write_json(moe / "config.json", {**read_json(moe / "config.json"), "format": 9})
    with pytest.raises(ValueError, match="format 9 of a moelab model, known is 1"):
        hf.load(moe)
