"""What a capacity limit costs: validation under other limits than the run's own."""

from dataclasses import replace

import pytest

from moelab.config import RoutingConfig
from moelab.experiments import capacity, validation_limits
from moelab.runs.store import Run
from tests.experiments.helpers import final


def under(run, **routing):
    """Return a run with the same weights and another limit."""
    model = replace(run.spec.model, routing=RoutingConfig(**routing))
    return Run(replace(run.spec, model=model), run.path)


@pytest.mark.slow
def test_one_trained_model_is_validated_with_its_limit_and_without(trained):
    # A few tokens are weighted otherwise.
    loss = trained.result["validation_loss"]
    assert validation_limits.validated(trained)["by_domain"] == pytest.approx(loss, abs=2e-3)
    half = under(trained, capacity_factor_eval=0.5, min_capacity=1)
    found = validation_limits.validated(half)
    # Every expert takes half an even share at most: at least half of the tokens are dropped.
    assert 0.5 <= found["by_domain_dropped"] < 1 and 0.5 <= found["mixed_dropped"] < 1
    assert len({found["by_domain"], found["mixed"], found["without"]}) == 3
    assert validation_limits.validated(half, 64) != found
    one = Run(replace(half.spec, train=replace(half.spec.train, micro_batch=1)), half.path)
    assert validation_limits.validated(one)["by_domain"] != found["by_domain"], "a limit is one of a micro-batch"
    free = validation_limits.validated(under(trained, drop_tokens=False))
    assert free == dict.fromkeys(("by_domain", "mixed", "without"), free["by_domain"]), "without a limit all are one"


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
