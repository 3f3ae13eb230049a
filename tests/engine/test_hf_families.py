"""Published MoE families: tiny random models made by transformers, read, compared, written back."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moelab.config.parallel import ParallelConfig
from moelab.engine import gradients
from moelab.engine.checkpoint import hf, shards
from moelab.engine.checkpoint.hf_families import family_of, why_not
from moelab.engine.mesh import Mesh
from moelab.files import read_json, write_json
from moelab.inference import Generator, Sampling, set_mode

transformers = pytest.importorskip("transformers", reason="needs transformers (extra eval)")

TINY = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 48, "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
QWEN = {"intermediate_size": 40, "moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3}
FAMILIES = {
    "olmoe": ("Olmoe", {"intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3}),
    "olmoe, renormalised": (
        "Olmoe",
        {"intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 4, "norm_topk_prob": True},
    ),
    "mixtral": ("Mixtral", {"intermediate_size": 24, "num_local_experts": 6, "rope_theta": 1e5}),
    "mixtral, own head size": ("Mixtral", {"intermediate_size": 24, "num_local_experts": 6, "head_dim": 12}),
    "qwen2_moe": ("Qwen2Moe", {**QWEN, "shared_expert_intermediate_size": 20, "mlp_only_layers": [0]}),
    "qwen2_moe, tied": ("Qwen2Moe", {**QWEN, "shared_expert_intermediate_size": 20, "tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3Moe", {**QWEN, "head_dim": 10, "norm_topk_prob": True}),
    "qwen3_moe, every second": ("Qwen3Moe", {**QWEN, "head_dim": 6, "decoder_sparse_step": 2}),
}
TOKENS = torch.randint(3, 61, (3, 21), generator=torch.Generator().manual_seed(1))


def settings_of(name: str):
    """The configuration of a model of transformers."""
    kind, settings = FAMILIES[name]
    return getattr(transformers, f"{kind}Config")(**{**TINY, **settings})


def theirs(name: str, folder: Path, dtype=torch.float32, shard: str = "1GB"):
    """A model of transformers with no weight at a value that hides errors, and its directory."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(settings_of(name)).eval().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


def assert_logits(ours: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_greedy_tokens_are_those_of_transformers(tmp_path, name):
    original = theirs(name, tmp_path / "in")
    model = hf.load(tmp_path / "in").eval()
    assert family_of(model.config) == original.config.model_type
    assert model.config.parameters() == sum(p.numel() for p in original.parameters())
    with torch.no_grad():
        assert_logits(model(TOKENS).logits_BTV, original(TOKENS).logits)
    prompts = [[5, 6, 7, 8], [9], list(range(3, 14))]
    continued = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        found = original.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12)
        continued.append(found[0, len(prompt) :].tolist())
    for mode in ("optimised", "baseline"):
        generator = Generator(set_mode(hf.load(tmp_path / "in"), mode), batch=2)
        ours = generator.generate(prompts, Sampling(max_new_tokens=12, temperature=0, stop_tokens=(2,)))
        assert [list(c.tokens) for c in ours] == continued


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.bfloat16) for name in FAMILIES), ("qwen2_moe, tied", torch.float32)]
)
def test_there_and_back_bit_for_bit(tmp_path, name, dtype, monkeypatch):
    original = theirs(name, tmp_path / "in", dtype, shard="20KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 2
    monkeypatch.setattr(hf, "SHARD_BYTES", 9000)
    kind = original.config.model_type
    config = hf.convert(tmp_path / "in", tmp_path / "ours")
    assert hf.read_config(tmp_path / "ours") == config and len(list((tmp_path / "ours").glob("*.safetensors"))) > 2
    assert hf.convert(tmp_path / "ours", tmp_path / "back", kind) == config
    hf.export(hf.load(tmp_path / "ours"), tmp_path / "model")
    before = tensors(tmp_path / "in")
    for folder in ("back", "model"):
        after = tensors(tmp_path / folder)
        assert after.keys() == before.keys()
        assert all(after[n].dtype == dtype and torch.equal(after[n], before[n]) for n in before)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / folder).eval()
        assert again.dtype == dtype and again.config.model_type == kind
        first = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "in").eval()
        with torch.no_grad():
            torch.testing.assert_close(again(TOKENS).logits, first(TOKENS).logits)


def rank_logits(folder: Path, layout: ParallelConfig) -> torch.Tensor:
    mesh = Mesh(layout, hf.read_config(folder).experts)
    model = hf.load_part(folder, mesh).module.eval()
    assert any(".experts." in name for name, _ in model.named_parameters())
    with torch.no_grad():
        logits = model(TOKENS).logits_BTV
    if layout.shard:  # its parameters have the shapes of the whole model's
        with pytest.raises(ValueError, match="on other ranks; load it as a whole"):
            hf.export(model, folder / "out")
    mesh.close()
    return logits


def backward(model, sequences: torch.Tensor) -> None:
    """Add the gradients of the mean loss of sequences, each of them a micro-batch."""
    model.train()
    for one in sequences.split(1):
        output = model(one[:, :-1])
        loss = torch.nn.functional.cross_entropy(output.logits_BTV.flatten(0, 1), one[:, 1:].flatten())
        ((loss + output.routing_loss()) / len(sequences)).backward()


def largest_gradient_difference(folder: Path, layout: ParallelConfig) -> float:
    """On a rank: the largest difference of a gradient from the whole model's, relative to its parameter's largest."""
    with torch.enable_grad():
        whole = hf.load(folder)
        backward(whole, TOKENS[:2])
        mesh = Mesh(layout, whole.config.experts)
        part = hf.load_part(folder, mesh)
        sync = gradients.GradientSync(part)
        backward(part.module, TOKENS[:2].chunk(mesh.data.size)[mesh.data.index])
        sync.finish()
    of = dict(whole.named_parameters())
    worst = 0.0
    for name, parameter in part.module.named_parameters():
        expected = of[name].grad
        for shard in shards.pieces(name, parameter.grad, part.placements[name]):
            region = tuple(slice(o, o + n) for o, n in zip(shard.offset, shard.tensor.shape, strict=True))
            worst = max(worst, float((shard.tensor - expected[region]).abs().max() / expected.abs().max()))
    mesh.close()
    return worst


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", ["olmoe", "qwen2_moe"])
def test_an_imported_model_is_trained_on_ranks_with_the_gradients_of_one_process(on_ranks, tmp_path, name):
    theirs(name, tmp_path / "in")
    for layout in (
        ParallelConfig(data=2),
        ParallelConfig(data=2, expert=1, expert_slicing=2),
        ParallelConfig(tensor=2, exchange="coordinated"),
        ParallelConfig(data=2, expert=1, shard=True),
    ):
        assert max(on_ranks(2, largest_gradient_difference, tmp_path / "in", layout)) < 1e-4, layout


@pytest.mark.multiprocess
def test_ranks_read_their_experts(on_ranks, tmp_path):
    layouts = {
        "olmoe": [
            ParallelConfig(data=2),
            ParallelConfig(data=2, expert=1, expert_slicing=2),
            ParallelConfig(tensor=2, exchange="coordinated"),
            ParallelConfig(data=2, expert=1, shard=True),
        ],
        "qwen2_moe": [ParallelConfig(data=2), ParallelConfig(tensor=2, exchange="coordinated")],
        "qwen3_moe": [ParallelConfig(tensor=2, expert=1)],
    }
    for name, chosen in layouts.items():
        original = theirs(name, tmp_path / name)
        hf.convert(tmp_path / name, tmp_path / f"{name} ours")
        with torch.no_grad():
            expected = original(TOKENS).logits
        for layout, folder in itertools.product(chosen, (name, f"{name} ours")):
            for logits in on_ranks(2, rank_logits, tmp_path / folder, layout):
                assert_logits(logits, expected)


@pytest.mark.parametrize(
    ("name", "settings", "missing"),
    [
        ("olmoe", {"rms_norm_eps": 1e-5, "router_aux_loss_coef": 0.01}, ["rms_norm_eps", "router_aux_loss_coef"]),
        ("mixtral", {"rms_norm_eps": 1e-5}, ["rms_norm_eps", "head_dim", "router_aux_loss_coef"]),
        ("qwen2_moe", {"rms_norm_eps": 1e-6}, ["rms_norm_eps", "initializer_range", "decoder_sparse_step"]),
        ("qwen3_moe", {"rms_norm_eps": 1e-6, "head_dim": None}, ["rms_norm_eps", "head_dim", "router_aux_loss_coef"]),
    ],
)
def test_what_is_missing_or_null_has_the_value_of_transformers(tmp_path, name, settings, missing, monkeypatch):
    kind, given = FAMILIES[name]
    given = {key: value for key, value in {**given, **settings}.items() if value is not None and key != "head_dim"}
    monkeypatch.setitem(FAMILIES, name, (kind, given))
    original = theirs(name, tmp_path / "in")
    with torch.no_grad():  # small activations, so that the norms' epsilon counts
        original.model.embed_tokens.weight.mul_(1e-3)
    original.save_pretrained(tmp_path / "in")
    record = read_json(tmp_path / "in" / "config.json")
    for changed in (
        {key: value for key, value in record.items() if key not in missing},
        {**record, **dict.fromkeys(missing)},
    ):
        write_json(tmp_path / "in" / "config.json", changed)
        model = hf.load(tmp_path / "in").eval()
        default = getattr(transformers, f"{kind}Config")()
        assert model.config.head_size == 8 and model.config.routing.aux_loss == default.router_aux_loss_coef
        with torch.no_grad():
            assert_logits(model(TOKENS).logits_BTV, original(TOKENS).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads must be greater than or equal to 1, got 0"),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps must be a number, got 'tiny'"),
        ({"rms_norm_eps": 0}, "decoder: norm_eps must be positive, got 0.0"),
        ({"initializer_range": -1.0}, "initializer_range must be greater than or equal to 0, got -1.0"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings must be true or false, got 'no'"),
        ({"norm_topk_prob": 1}, "norm_topk_prob must be true or false, got 1"),
        ({"rope_parameters": [1]}, r"rope_parameters must be an object, got \[1\]"),
        ({"rope_parameters": None, "rope_scaling": "yarn"}, "rope_scaling must be an object, got 'yarn'"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            r"rope_scaling and rope_parameters differ: {'rope_type': 'yarn', 'factor': 4.0} and {.*}",
        ),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear"}}, ".* of type 'linear', supported is 'default'"),
        (
            {"rope_parameters": {"full_attention": {}}},
            "rope_parameters has 'full_attention', supported are rope_type .*",
        ),
        ({"num_experts": 5, "num_local_experts": 6}, "num_local_experts and num_experts differ: 6 and 5"),
        ({"vocab_size": 2**40}, "vocab_size must be less than or equal to 16777216, got 1099511627776"),
        ({"rope_parameters": {"rope_theta": "1e4"}}, "rope_theta must be a number, got '1e4'"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step must be greater than or equal to 1, got 0"),
        ({"mlp_only_layers": 1}, "mlp_only_layers must be a valid array, got 1"),
        ({"mlp_only_layers": ["1"]}, "mlp_only_layers.0 must be a whole number, got '1'"),
    ],
)
def test_a_malformed_value_is_refused_in_one_line_with_file_and_key(tmp_path, change, message):
    record = settings_of("qwen3_moe").to_dict()
    write_json(tmp_path / "config.json", {**record, "norm_topk_prob": True, **change})
    with pytest.raises(ValueError, match=rf"config\.json: {message}$") as error:
        hf.read_config(tmp_path)
    assert "\n" not in str(error.value) and str(error.value).count("config.json") == 1


@pytest.mark.parametrize("kind", ["Olmoe", "Mixtral", "Qwen2Moe", "Qwen3Moe", "GPT2"])
def test_a_missing_key_has_the_default_of_transformers_or_is_refused_by_name(tmp_path, kind):
    """Without a key, transformers takes its class's default, so the model is that of the class's defaults."""
    names = {"architectures": [f"{kind}LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"]}
    record = {**getattr(transformers, f"{kind}Config")().to_dict(), **names}
    write_json(tmp_path / "config.json", record)
    whole = hf.read_config(tmp_path)
    refused = set()
    for missing in record:
        write_json(tmp_path / "config.json", {key: value for key, value in record.items() if key != missing})
        try:
            assert hf.read_config(tmp_path) == whole, missing
        except ValueError as error:
            assert missing.replace("local_", "") in str(error).replace("local_", "")
            refused.add(missing)
    assert refused.isdisjoint({"num_key_value_heads", "rms_norm_eps", "rope_parameters", "tie_word_embeddings"})


def test_null_means_the_default(tmp_path):
    record = settings_of("qwen3_moe").to_dict()
    names = ("router_aux_loss_coef", "rms_norm_eps", "decoder_sparse_step", "mlp_only_layers", "num_key_value_heads")
    write_json(tmp_path / "config.json", {**record, **dict.fromkeys(names), "rope_parameters": {"rope_theta": None}})
    config = hf.read_config(tmp_path)
    assert config.routing.aux_loss == 0.001 and config.decoder.norm_eps == 1e-6 and config.kv_heads == config.heads
    assert config.decoder.rotary_base == 10_000.0 and all(config.experts)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', supported is 'silu'"),
        ({"clip_qkv": 8.0}, "clip_qkv is 8.0, supported is None"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rotary positions of type 'yarn'"),
        ({"num_experts_per_tok": 9}, "top_k must be between 1 and the fewest experts"),
        ({"num_experts": 5}, r"tensor model.layers.\d.mlp.experts.5.\w+.weight \(9 such\) is none of this model's"),
        ({"num_hidden_layers": 2}, r"tensor model.layers.2.\S+ \(\d+ such\) is none of this model's"),
        ({"num_experts": 7}, r"ffn.router.weight is \(6, 32\), expected \(7, 32\)"),
        ({"intermediate_size": 17}, r"experts.0.gate_proj.weight is \(32, 24\), expected \(32, 17\)"),
        ({"num_key_value_heads": 1}, r"k_proj.weight is \(16, 32\), expected \(8, 32\)"),
        ({"vocab_size": 1 << 24}, r"token_embedding.weight is \(61, 32\), expected \(16777216, 32\)"),
        (
            {"hidden_size": 1 << 24, "intermediate_size": 1 << 24, "num_experts": 512},
            "/in: .*expected|/in: .* overflow",
        ),
        ({"num_hidden_layers": 10**7}, "84 tensors are too few for 10000000 layers"),
        ({"num_experts": 10**7}, r"/in: model: a layer of 10000000 experts"),
        ({"model_type": "deepseek_v3"}, "model_type 'deepseek_v3' is not supported; allowed: gpt2, olmoe"),
        ({"tie_word_embeddings": True}, "lm_head differs from the embedding"),
    ],
)
def test_what_we_do_not_have_is_refused_in_one_line_before_anything_is_allocated(
    tmp_path, change, message, monkeypatch
):
    theirs("olmoe", tmp_path / "in")
    monkeypatch.setattr(hf, "empty", lambda *_, **__: pytest.fail("allocated"))
    record = read_json(tmp_path / "in" / "config.json")
    write_json(tmp_path / "in" / "config.json", {**record, **change})
    with pytest.raises(ValueError, match=message) as error:
        hf.load(tmp_path / "in")
    assert "\n" not in str(error.value)


def rewritten(file: Path, change) -> None:
    save_file({name: change(name, t) for name, t in load_file(file).items()}, file, {"format": "pt"})


def test_a_router_keeps_its_dtype_and_others_are_named(tmp_path):
    original = theirs("olmoe", tmp_path / "in", torch.bfloat16)
    file = tmp_path / "in" / "model.safetensors"
    exact = {n: t.float() + 1e-4 for n, t in load_file(file).items() if n.endswith("mlp.gate.weight")}
    rewritten(file, lambda name, t: exact.get(name, t))
    for dtype in (None, torch.bfloat16):
        model = hf.load(tmp_path / "in", dtype=dtype)
        routers = {n: p for n, p in model.named_parameters() if n.endswith("router.weight")}
        assert len(routers) == original.config.num_hidden_layers
        for layer, router in enumerate(routers.values()):
            assert torch.equal(router, exact[f"model.layers.{layer}.mlp.gate.weight"])
        assert {p.dtype for n, p in model.named_parameters() if n not in routers} == {torch.bfloat16}
        assert model.eval()(TOKENS).logits_BTV.dtype == torch.bfloat16
    assert {p.dtype for p in hf.load(tmp_path / "in", dtype=torch.float32).parameters()} == {torch.float32}
    mesh = Mesh(ParallelConfig(), (6,))
    mesh.fsdp = "shards"
    with pytest.raises(ValueError, match=r"routers have another dtype than torch\.bfloat16; `shard` needs one: choose"):
        hf.load_part(tmp_path / "in", mesh)
    hf.convert(tmp_path / "in", tmp_path / "ours")
    hf.convert(tmp_path / "ours", tmp_path / "back", "olmoe")
    assert all(torch.equal(tensors(tmp_path / "back")[n], t) for n, t in exact.items())

    rewritten(file, lambda name, t: t.float() if name == "model.norm.weight" else t)
    with pytest.raises(
        ValueError, match=r"norm\.weight is torch\.float32 and the embedding torch\.bfloat16; choose the"
    ):
        hf.load(tmp_path / "in")
    hf.load(tmp_path / "in", dtype=torch.float32)
    rewritten(file, lambda name, t: t.float() if "q_proj" in name else t)
    with pytest.raises(
        ValueError, match=r"k_proj\.weight has another dtype than the others of blocks\.0\.attention\.qkv"
    ):
        hf.convert(tmp_path / "in", tmp_path / "out")
    rewritten(file, lambda name, t: t.to(torch.float8_e4m3fn) if "down_proj" in name else t)
    with pytest.raises(ValueError, match=r"down_proj\.weight is F8_E4M3; allowed"):
        hf.load(tmp_path / "in")


def test_a_format_that_does_not_describe_the_model_is_refused(tmp_path):
    theirs("olmoe", tmp_path / "in")
    with pytest.raises(ValueError, match="mixtral has qk_norm 'none'; this model differs"):
        hf.convert(tmp_path / "in", tmp_path / "out", "mixtral")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="format 'llama' is unknown; allowed: gpt2, olmoe"):
        hf.convert(tmp_path / "in", tmp_path / "out", "llama")


def test_smeared_keys_are_refused_by_formats_that_have_none(tmp_path):
    theirs("olmoe", tmp_path / "in")
    config = hf.load(tmp_path / "in", dtype=torch.float32).config
    assert why_not(config, "olmoe") is None
    smeared = replace(config, decoder=replace(config.decoder, smeared_keys=True))
    assert why_not(smeared, "olmoe") == "export: olmoe has keys of single tokens, not smeared ones; this model differs"
    assert family_of(smeared) is None
