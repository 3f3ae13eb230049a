"""What a capacity limit costs: validation under other limits than the run's own."""

from dataclasses import replace

import pytest

from moelab.config import RoutingConfig
from moelab.experiments import capacity, validation_limits
from moelab.runs.execute import execute
from moelab.runs.store import RunStore
from tests.experiments.helpers import final


def trained(spec, tmp_path, monkeypatch, **routing):
    monkeypatch.setenv("MOELAB_HOME", str(tmp_path / "home"))
    model = replace(spec.model, routing=RoutingConfig(**routing))
    run = RunStore(tmp_path / "runs").run(replace(spec, model=model, train=replace(spec.train, tokens=6 * 128)))
    execute(run)
    return run


@pytest.mark.slow
def test_one_trained_model_is_validated_with_its_limit_and_without(tiny_spec, tmp_path, monkeypatch):
    run = trained(tiny_spec, tmp_path, monkeypatch, capacity_factor_eval=0.5, min_capacity=1)
    found = validation_limits.validated(run)
    # A few tokens are weighted otherwise.
    assert found["by_domain"] == pytest.approx(run.result["validation_loss"], abs=2e-3)
    # Every expert takes half an even share at most: at least half of the tokens are dropped.
    assert 0.5 <= found["by_domain_dropped"] < 1 and 0.5 <= found["mixed_dropped"] < 1
    assert len({found["by_domain"], found["mixed"], found["without"]}) == 3
    assert validation_limits.validated(run, 64) != found


@pytest.mark.slow
def test_without_a_limit_all_kinds_are_one(tiny_spec, tmp_path, monkeypatch):
    run = trained(tiny_spec, tmp_path, monkeypatch, drop_tokens=False)
    found = validation_limits.validated(run)
    assert found == dict.fromkeys(("by_domain", "mixed", "without"), found["by_domain"])


def test_costs_are_paired_by_seed_and_need_all_runs():
    table = final({"drop-free": [3.0, 3.1], "capacity 1": [3.2, 3.4]})
    others = [(3.0, 3.0), (3.1, 3.1), (3.1, 3.05), (3.3, 3.2)]
    runs = table[["arm", "seed"]].to_dict("records")
    measured = [run | {"mixed": m, "without": w} for run, (m, w) in zip(runs, others, strict=True)]
    found = validation_limits.costs(table, measured, "drop-free")
    means = found[found["arm"] == "capacity 1"].groupby("validation")["gap"].mean()
    kinds = validation_limits.KINDS
    assert means.to_dict() == pytest.approx(dict(zip(kinds.values(), (0.25, 0.15, 0.075), strict=True)))
    few = validation_limits.costs(table, measured[:3], "drop-free")
    assert set(few["validation"]) == {kinds["by_domain"]}
    assert capacity.headline(table, measured).endswith("; validated without a limit 0.075")
    assert "without" not in capacity.headline(table, [])
