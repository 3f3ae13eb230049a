"""Differences of losses by what the sequence has shown before of a target."""

import pytest

from moelab.design import settings, targets
from moelab.files import write_json
from moelab.runs.collection import Runs
from moelab.runs.store import RunStore


def test_parts_sum_to_the_difference(tmp_path, result):
    """The parts of arms that are both there, by seed; a result without parts is left out."""
    losses = {("A", seed): (2.0, 4.0) for seed in range(3)}
    losses |= {("B", 0): (3.0, 4.4), ("B", 1): (5.0, 4.0), ("B", 2): None}
    runs = []
    for (arm, seed), values in sorted(losses.items(), key=lambda item: item[0][1]):
        rate = {"train.lr": ord(arm) / 1e4}
        run = RunStore(tmp_path).run(settings.spec("350M", "smoke", seed, label=arm, overrides=rate))
        by_pair = zip(("repeated", "new"), (0.25, 0.75), values or (), strict=False)
        more = {"validation_by_pair": {kind: {"loss": loss, "share": share} for kind, share, loss in by_pair}}
        write_json(run.path / "result.json", result(**(more if values else {})))
        runs.append(run)
    table = targets.gaps(Runs(runs), [("A", "B"), ("A", "C")])
    assert set(table["pair"]) == {"A − B"} and list(table["seed"]) == [0, 0, 1, 1]
    assert list(table["part"]) == pytest.approx([-0.25, -0.3, -0.75, 0.0])
    means = targets.summary(table)
    assert means.loc["A − B"].to_dict() == pytest.approx({"repeated": -0.5, "new": -0.15, "all": -0.65})
    assert not len(targets.gaps(Runs(runs[-2:]), [("A", "B")]))
