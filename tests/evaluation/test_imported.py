"""Models of the four families, made small and random by transformers: every command that takes a directory finishes."""

import json
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from moelab.cli import app
from moelab.files import write_json

transformers = pytest.importorskip("transformers", reason="needs transformers (extra eval)")

SIZES = {
    "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 96, "initializer_range": 0.3, "num_experts_per_tok": 2, "intermediate_size": 24,
    "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
QWEN = {"moe_intermediate_size": 16, "num_experts": 4}
FAMILIES = {
    "olmoe": ("Olmoe", {"num_experts": 4}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen2_moe": ("Qwen2Moe", {**QWEN, "shared_expert_intermediate_size": 20, "mlp_only_layers": [0]}),
    "qwen3_moe": ("Qwen3Moe", {**QWEN, "head_dim": 10, "norm_topk_prob": True}),
}


def moelab(*arguments):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


def published(family, folder, tokenizer):
    """Write a model as its authors would: weights, config.json, tokenizer."""
    kind, settings = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **settings})
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.json")
    write_json(folder / "tokenizer_config.json", {"eos_token": "<|endoftext|>"})
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_command_takes_the_directory(family, place, tokenizer):
    """And says of a model as it is published what it says of it when it is imported."""
    pytest.importorskip("lm_eval", reason="needs lm-eval (extra eval)")
    source, folder = published(family, place / "published", tokenizer), place / "imported"
    assert " k parameters, " in moelab("import", source, folder)
    write = ("--prompt", "the wave and", "--max-new-tokens", "8", "--temperature", "0")
    modes = ((source,), (folder,), (folder, "--mode", "baseline"))
    texts = [moelab("generate", where, *write, *mode) for where, *mode in modes]
    assert len(set(texts)) == 1 and texts[0].startswith("the wave and") and len(texts[0]) > 16
    ask = ("--tasks", "packaged_piqa,packaged_nq", "--limit", "3", "--json")
    ours, again = (json.loads(moelab("eval", where, *ask)) for where in (source, folder))
    assert [score["n"] for score in ours] == [3, 3]
    for one, other in zip(ours, again, strict=True):
        assert (one["accuracy"], one["bits_per_byte"]) == (other["accuracy"], other["bits_per_byte"])
    assert f"{family} format in" in moelab("export", folder, place / "back")
    assert (place / "back" / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert "tokens/s/GPU" in moelab("plan", folder, "--gpus", "4")
    assert "fits" in moelab("simulate", "decode", folder, "--gpus", "4", "--system", "moelab", "--imbalance", "1.5")
    assert "days for" in moelab("simulate", "train", folder, "--gpus", "4", "--batch", "8")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_bench_decode_measures_it_beside_transformers(place, tokenizer):
    folder = place / "imported"
    moelab("import", published("qwen2_moe", place / "published", tokenizer), folder)
    options = ("--batch", "2", "--ranks", "2", "--rank-batch", "2", "--prompt", "4", "--output", "4", "--rounds", "1")
    shown = moelab("bench", "decode", "--model", folder, *options, "--threads", "1", "--out", place / "out")
    rows = [json.loads(line) for line in (place / "out" / "decode.jsonl").read_text().splitlines()]
    one = {row["candidate"] for row in rows if row["ranks"] == 1}
    assert one - {"llama.cpp"} == {"optimised", "baseline", "transformers generate"}
    assert "transformers generate" in shown
    assert {row["candidate"] for row in rows if row["ranks"] == 2} == {"optimised", "baseline"}
    assert all(row["model"] == "imported" and row["median_ms"] > 0 for row in rows)


def test_bench_decode_says_before_it_measures_that_ranks_do_not_divide_the_experts(place, tokenizer):
    folder = published("olmoe", place / "published", tokenizer)
    options = ("--batch", "1", "--ranks", "3", "--prompt", "4", "--output", "4")
    done = CliRunner().invoke(app, ["bench", "decode", "--model", str(folder), *options])
    assert isinstance(done.exception, ValueError) and "experts" in str(done.exception) and not done.output


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_ranks_write_what_one_process_writes(place, tokenizer):
    folder = published("qwen2_moe", place / "published", tokenizer)
    layout = ("--tensor", "2", "--expert", "2", "--exchange", "coordinated")
    command = ("generate", str(folder), "--prompt", "the wave and", "--max-new-tokens", "8", "--temperature", "0")
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "moelab.cli"]
    done = subprocess.run([*ranks, *command, *layout], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == moelab(*command).strip()
