"""What a capacity limit costs: validation under other limits than the run's own."""

from dataclasses import replace

import pandas as pd
import pytest

from moelab.config import RoutingConfig
from moelab.experiments import capacity, validation_limits
from moelab.runs import executors
from moelab.runs.store import RunStore


def trained(spec, tmp_path, monkeypatch, **routing):
    monkeypatch.setenv("MOELAB_HOME", str(tmp_path / "home"))
    model = replace(spec.model, routing=RoutingConfig(**routing))
    run = RunStore(tmp_path / "runs").run(replace(spec, model=model, train=replace(spec.train, tokens=6 * 128)))
    assert executors.start(run).wait() == 0, run.log_tail(20)
    return run


@pytest.mark.slow
def test_one_trained_model_is_validated_with_its_limit_and_without(tiny_spec, tmp_path, monkeypatch):
    run = trained(tiny_spec, tmp_path, monkeypatch, capacity_factor_eval=0.5, min_capacity=1)
    found = validation_limits.validated(run)
    assert found["by_domain"] == pytest.approx(
        run.result["validation_loss"], abs=2e-3
    )  # a few tokens are weighted otherwise
    # Every expert takes half an even share at most: at least half of the tokens are dropped.
    assert 0.5 <= found["by_domain_dropped"] < 1 and 0.5 <= found["mixed_dropped"] < 1
    assert len({found["by_domain"], found["mixed"], found["without"]}) == 3
    assert validation_limits.validated(run, 64) != found


@pytest.mark.slow
def test_without_a_limit_all_kinds_are_one(tiny_spec, tmp_path, monkeypatch):
    run = trained(tiny_spec, tmp_path, monkeypatch, drop_tokens=False)
    found = validation_limits.validated(run)
    assert found == dict.fromkeys(("by_domain", "mixed", "without"), found["by_domain"])


def rows(values):
    return [{"arm": arm, "seed": seed} | kinds for arm, each in values.items() for seed, kinds in enumerate(each)]


def test_costs_are_paired_by_seed_and_need_all_runs():
    final = pd.DataFrame(
        rows(
            {
                "drop-free": [{"validation_loss": 3.0}, {"validation_loss": 3.1}],
                "capacity 1": [{"validation_loss": 3.2}, {"validation_loss": 3.4}],
            }
        )
    )
    measured = rows(
        {
            "drop-free": [{"mixed": 3.0, "without": 3.0}, {"mixed": 3.1, "without": 3.1}],
            "capacity 1": [{"mixed": 3.1, "without": 3.05}, {"mixed": 3.3, "without": 3.2}],
        }
    )
    found = validation_limits.costs(final, measured, "drop-free")
    means = found[found["arm"] == "capacity 1"].groupby("validation")["gap"].mean()
    assert means.to_dict() == pytest.approx(
        dict(zip(validation_limits.KINDS.values(), (0.25, 0.15, 0.075), strict=True))
    )
    assert set(validation_limits.costs(final, measured[:3], "drop-free")["validation"]) == {
        validation_limits.KINDS["by_domain"]
    }
    assert capacity.headline(final, measured).endswith("; validated without a limit 0.075")
    assert "without" not in capacity.headline(final, [])
