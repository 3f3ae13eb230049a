"""What is measured of a run: its gates route text as the model does, pictures show that; losses by mode and dtype."""

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from moelab.cli import app
from moelab.config import ModelConfig, RoutingConfig
from moelab.evaluation import rounding
from moelab.evaluation.gates import SPACE, Choices, Gates, dropped, frame
from moelab.inference.text import load_run
from moelab.plotting import placement
from moelab.runs.store import RunStore

TEXT = "wave salt ship mast wind gull."


def choices(experts: list[int], count: int = 4, top_k: int = 1) -> Choices:
    """Each token certain of one expert."""
    logits = 9 * torch.nn.functional.one_hot(torch.tensor(experts), count).float()
    return Choices(2, tuple(f"t{e}" for e in experts), logits, top_k)


def test_a_full_expert_drops_what_does_not_fit():
    # 12 tokens, 4 experts: room for the least capacity of 4 at factor 1, for 6 at factor 2.
    lopsided = choices([0] * 9 + [1, 2, 3])
    assert lopsided.dropped() == 0
    assert lopsided.dropped(capacity_factor=1.0) == pytest.approx(5 / 12)
    assert lopsided.dropped(capacity_factor=2.0) == pytest.approx(3 / 12)
    assert sorted(lopsided.route(capacity_factor=1.0).slot_SK[:9, 0].tolist()) == [-1, -1, -1, -1, -1, 0, 1, 2, 3]


def test_more_choices_double_the_capacity_and_share_the_weight():
    even = choices([0, 1, 2, 3] * 4)
    assert even.route(2).expert_SK.shape == (16, 2)
    assert torch.allclose(even.route(2).weight_SK.sum(1), torch.ones(16))
    table = dropped(even, [0.5, 1.0], top_k=2)
    assert table.columns.tolist() == ["layer", "experts", "top_k", "capacity_factor", "dropped"]
    assert table["dropped"].is_monotonic_decreasing and table["top_k"].eq(2).all()


def test_repeats():
    said = Choices(2, ("the", "sea", "the", "the"), choices([0, 1, 0, 2]).logits_SE, 1)
    assert said.repeats() == (1, 2)
    assert choices([0, 1, 2]).repeats() == (0, 0)


def test_the_pictures_say_it(ax):
    lopsided = choices([0] * 9 + [1, 2, 3])
    kept, asked, limit = lopsided.loads(1, 1.0)
    placement.loads(kept, asked, ax, limit=limit)
    assert ax.get_title("left").replace("\n", " ") == "42% of 12 choices dropped, 56% of 16 slots empty"
    heights = [bar.get_height() for bar in ax.patches]
    assert heights == [4, 1, 1, 1, 5, 0, 0, 0]
    ax.clear()
    placement.heatmap(lopsided.probability_SE.numpy(), lopsided.route().expert_SK.numpy(), lopsided.tokens, ax)
    assert [t.get_text() for t in ax.get_xticklabels()] == list(lopsided.tokens)
    assert list(ax.lines[0].get_ydata()) == [0] * 9 + [1, 2, 3]
    table = frame({"now": lopsided})
    assert len(table) == 12 * 4 and table["chosen"].sum() == 12
    assert table.groupby("position")["probability"].sum().to_numpy() == pytest.approx(1)


def test_gates_route_as_the_model_does(trained, tiny_spec, tmp_path):
    gates = Gates(trained.path)
    layers = gates.on_text(TEXT)
    assert [(c.layer, c.experts) for c in layers] == [(2, 2), (4, 4)]
    assert "".join(layers[0].tokens).replace(SPACE, " ") == TEXT
    assert len(set(gates.on_text("èé")[0].tokens)) == 3, "bytes C3 A8 C3 A9"
    ids = gates._tokenizer.encode(TEXT)
    with torch.no_grad():
        routing = load_run(trained.path).eval()(torch.tensor([ids])).routing
    for heard, did in zip(layers, routing, strict=True):
        assert torch.equal(heard.route().expert_SK, did.expert_SK)
    before = Gates(trained.path, initial=trained.spec.train.seed).on_text(TEXT)
    assert not torch.allclose(before[1].logits_SE, layers[1].logits_SE)
    spec = trained.spec
    assert len(gates.on_validation(spec.train.batch_size)[0].tokens) == spec.train.batch_size * spec.data.context
    with pytest.raises(ValueError, match="the text is empty"):
        gates.on_text("")
    dense = replace(tiny_spec, model=ModelConfig(layers=1, hidden=32, heads=2, vocab=320, context=32, name="flat"))
    with pytest.raises(ValueError, match=r"gates: .* is dense"):
        Gates(RunStore(tmp_path).run(dense).path)


def test_choices_are_the_models_by_all_its_rules(tmp_path, monkeypatch, data_config, tiny_spec):
    """Scores are sigmoids, and a bias that logits do not show decides."""
    routing = RoutingConfig(scores="sigmoid", balance_rate=0.1, normalize_weights=True, min_capacity=1)
    monkeypatch.setenv("MOELAB_HOME", str(tmp_path))
    gates = Gates(RunStore().run(replace(tiny_spec, model=replace(tiny_spec.model, routing=routing))).path, initial=0)
    for block in (gates._model.blocks[1], gates._model.blocks[3]):
        torch.nn.init.normal_(block.ffn.router.weight)
        block.ffn.router.balance_bias.data[-1] = 9
    ids = torch.tensor([gates._tokenizer.encode(TEXT)])
    with torch.no_grad():
        routed = gates._model(ids).routing
    for heard, did in zip(gates.on_text(TEXT), routed, strict=True):
        assert torch.equal(heard.route().expert_SK, did.expert_SK) and did.expert_SK.eq(heard.experts - 1).all()
        assert torch.equal(heard.route(capacity_factor=1.0).kept_E, did.kept_E)
        kept, _, limit = heard.loads(1, 1.0)
        assert max(kept) == limit == did.kept_E.max()
        assert torch.allclose(heard.probability_SE.sum(1), torch.ones(ids.numel()))
        scores_SE = heard.logits_SE.sigmoid()
        assert torch.allclose(heard.probability_SE, scores_SE / scores_SE.sum(1, keepdim=True))


def test_losses_by_mode_and_dtype(trained, tmp_path):
    """Modes of one dtype differ by rounding, and the first row's loss is that of the run's own validation."""
    name = trained.path.name
    arguments = ["eval", name, "--losses", "--out", str(tmp_path)]
    with pytest.raises(ValueError, match="it takes no --tasks, --batch, --dtype or --device"):
        CliRunner().invoke(app, [*arguments, "--dtype", "bf16"], catch_exceptions=False)
    output = CliRunner().invoke(app, arguments, catch_exceptions=False).output
    rows = [json.loads(line) for line in (tmp_path / f"losses-{name}.jsonl").read_text().splitlines()]
    assert (rows[0]["mode"], rows[0]["dtype"], rows[0]["minus_reference"]) == (*rounding.VARIANTS[0], 0.0)
    assert [(row["mode"], row["dtype"]) for row in rows] == list(rounding.VARIANTS)
    for row in rows:
        assert row["run"] == name and row["minus_reference"] == row["loss"] - rows[0]["loss"]
        assert abs(row["minus_reference"]) < (1e-5 if row["dtype"] == "fp32" else 0.05)
    assert any(row["minus_reference"] for row in rows if row["dtype"] == "bf16")
    assert rows[0]["loss"] == pytest.approx(trained.result["validation_loss"], abs=0.05)
    assert sum(part["share"] for part in rows[0]["by_pair"].values()) == pytest.approx(1)
    assert f"repeated {rows[0]['by_pair']['repeated']['loss']:.4f} (" in " ".join(output.split())
    assert "validation tokens" in output and (tmp_path / f"losses-{name}.provenance.json").is_file()
