"""How a model routes text: counts against the model's own routing, and what serving costs with the load measured."""

import numpy as np
import pytest
import torch

from moelab.config import DataConfig, DecoderConfig, ModelConfig, RoutingConfig
from moelab.config.parallel import ParallelConfig
from moelab.data.preparation import encode_validation
from moelab.data.tokenizer import Tokenizer
from moelab.engine.checkpoint import hf
from moelab.evaluation import routing
from moelab.experiments import imported_model
from moelab.models import build

CONFIG = ModelConfig(
    layers=3, hidden=32, heads=4, experts=(8, 0, 4), top_k=2, vocab=300, context=64, init_std=0.3,
    decoder=DecoderConfig.modern(qk_norm="all", ffn=24), routing=RoutingConfig(drop_tokens=False),
)  # fmt: skip


@pytest.fixture(scope="module")
def texts(text_folder):
    return Tokenizer.train((file.read_text() for file in sorted(text_folder.rglob("*.txt"))), 300)


def test_validation_text_is_encoded_by_domain_with_a_given_tokenizer(text_folder, texts, tmp_path):
    config = DataConfig(f"folder:{text_folder}", context=32)
    whole = encode_validation(config, tmp_path, texts)
    assert list(whole) == ["field", "sea"] and all(windows.shape[1] == 32 for windows in whole.values())
    words = texts.decode(whole["sea"].flatten())
    assert "ship" in words and "plough" not in words
    few = encode_validation(config, tmp_path, texts, max_tokens=100)
    assert [windows.shape for windows in few.values()] == [(3, 32), (3, 32)]
    assert all((few[domain] == whole[domain][:3]).all() for domain in few)
    with pytest.raises(ValueError, match=r"max_tokens 31 must be 0 .all. or at least the context, 32"):
        encode_validation(config, tmp_path, texts, max_tokens=31)
    with pytest.raises(ValueError, match="context 1000000 is too long"):
        encode_validation(DataConfig(f"folder:{text_folder}", context=1_000_000), tmp_path, texts)


def test_counts_are_those_of_the_models_routing(text_folder, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(routing, "BATCH", 100)  # several batches of a domain
    data, model = DataConfig(f"folder:{text_folder}", context=32), build(CONFIG, 0).eval()
    found = routing.routing(model, texts, data, tmp_path, max_tokens=320)
    assert found["tokens"] == {"field": 320, "sea": 320}
    windows = encode_validation(data, tmp_path, texts, max_tokens=320)
    layers, shares = imported_model.tables(found)
    assert list(layers["layer"]) == [1, 3] and list(layers["experts"]) == [8, 4]
    for i, layer in enumerate((1, 3)):
        with torch.no_grad():
            chosen = {d: model(torch.from_numpy(w)).routing[i].expert_SK.numpy() for d, w in windows.items()}
        E = CONFIG.experts[layer - 1]
        load = sum(np.bincount(experts.ravel(), minlength=E) for experts in chosen.values())
        assert found["loads"][str(layer)] == load.tolist() and load.sum() == 2 * 640
        of_layer = shares[shares["layer"] == layer]
        for domain, experts in chosen.items():
            share = np.bincount(experts.ravel(), minlength=E) / experts.size
            assert np.allclose(of_layer[of_layer["domain"] == domain]["share"], share)
            assert of_layer[of_layer["domain"] == domain]["choices"].eq(experts.size).all()
        row = layers.iloc[i]
        assert row["busiest"] == pytest.approx(load.max() / load.mean()) == row["max_violation"] + 1
        assert row["p50"] <= row["p90"] <= row["p99"] <= row["busiest"]
        assert row["max_violation"] <= row["domain_violation"] + 1e-9, "the domains have as many tokens"
        assert 0 < row["load_entropy"] <= 1 and 0 < row["router_entropy"] < 1
        assert 0 <= row["by_domain"] < row["by_token"] <= 1, "the token's embedding decides more than the domain"
    with torch.no_grad():
        p_SE = model.blocks[0].ffn.router(torch.randn(4, 32)).expert_SK
    assert model.blocks[0].ffn.router.entropies is None and p_SE.shape == (4, 2), "nothing is left on"


def test_a_directory_is_measured_in_bf16_and_known_by_its_files(text_folder, texts, tmp_path, monkeypatch):
    monkeypatch.setenv("MOELAB_HOME", str(tmp_path / "home"))
    folder = hf.export(build(CONFIG, 0), tmp_path / "model", texts)
    first = routing.stamp(folder)
    (folder / "evaluation").mkdir()
    (folder / "evaluation" / "score.json").write_text("{}")
    assert routing.stamp(folder) == first, "what an evaluation writes is not the model"
    (folder / "config.json").touch()
    assert routing.stamp(folder) != first
    data = DataConfig(f"folder:{text_folder}", context=512)  # more than the model's
    bf16, fp32 = (routing.measure(str(folder), first, data, 640, dtype) for dtype in ("bf16", "fp32"))
    assert bf16["tokens"] == fp32["tokens"] == {"field": 640, "sea": 640}
    for layer, load in fp32["loads"].items():
        assert np.abs(np.subtract(load, bf16["loads"][layer])).sum() < 0.1 * sum(load)
    assert imported_model.directory(str(folder)) == folder
    with pytest.raises(ValueError, match="no such run or directory"):
        imported_model.directory("nosuch")
    dense = ModelConfig(layers=1, hidden=32, heads=2, vocab=300, context=32)
    with pytest.raises(ValueError, match="is dense, it routes nothing"):
        imported_model.directory(str(hf.export(build(dense, 0), tmp_path / "dense", texts)))


def test_the_random_model_is_made_once_and_is_of_olmoes_form(tmp_path, monkeypatch):
    monkeypatch.setenv("MOELAB_HOME", str(tmp_path))
    folder = imported_model.directory("")
    before = routing.stamp(folder)
    assert imported_model.directory("") == folder and routing.stamp(folder) == before
    assert hf.read_config(folder).experts == (16,) * 4 and "olmoe" in (folder / "config.json").read_text()
    assert hf.load_tokenizer(folder).vocab_size == 512


def test_the_busiest_rank_by_hand():
    loads = {"1": [6, 2, 0, 0], "2": [1, 1, 1, 1]}
    assert imported_model.imbalance(loads, ParallelConfig(data=1)) == 1
    assert imported_model.imbalance(loads, ParallelConfig(data=2)) == pytest.approx((2 + 1) / 2)
    assert imported_model.imbalance(loads, ParallelConfig(data=4)) == pytest.approx((3 + 1) / 2)
    assert imported_model.imbalance(loads, ParallelConfig(data=4, expert=2)) == pytest.approx((2 + 1) / 2)


def test_serving_with_the_load_measured():
    config = ModelConfig(
        layers=16, hidden=2048, heads=16, experts=(64,) * 16, top_k=8, vocab=50304, context=4096,
        decoder=DecoderConfig.modern(qk_norm="all", ffn=1024), routing=RoutingConfig(drop_tokens=False), name="OLMoE",
    )  # fmt: skip
    loads = {str(i): [400, *[100] * 63] for i in range(1, 17)}
    rows = imported_model.serving(config, loads, "h100", 16)
    best = set(", ".join(rows["best_by"]).split(", "))
    assert rows["latency_ms"].is_monotonic_increasing and {"latency", "throughput", "cost"} <= best
    assert (rows["latency_uneven_ms"] >= rows["latency_ms"] - 1e-9).all() and (rows["imbalance"] >= 1).all()
    assert (rows["latency_uneven_ms"] > rows["latency_ms"]).any(), "large batches over ranks wait for the busiest"
    title = imported_model.serving_headline(rows, "OLMoE", "h100")
    assert "USD per million" in title and "\n" not in title
    slots = imported_model.serving(config, loads, "h100", 16, program="deepspeed")
    assert (slots["latency_uneven_ms"] == slots["latency_ms"]).all(), "slots are padded whatever the load"
    with pytest.raises(ValueError, match="no cluster 'b100'"):
        imported_model.serving(config, loads, "b100", 16)


def test_a_program_that_slices_all_experts_feels_no_uneven_load():
    """Also where the experts, such as Qwen2-MoE's 60, could not be spread over its GPUs."""
    config = ModelConfig(layers=1, hidden=8192, heads=8, experts=(60,), top_k=4, vocab=50304, context=64)
    rows = imported_model.serving(config, {"1": [4, *[1] * 59]}, "h100", 8, program="engine-tp")
    assert (rows["tensor"] == 8).any() and (rows["imbalance"] == 1).all()
