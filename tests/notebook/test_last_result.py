"""The newest result with the same parameters, among results that cannot be read."""

import pytest

from moelab.experiments import EXPERIMENTS
from moelab.files import write_json
from moelab.notebook import batch
from moelab.report.summary import SUMMARY

BASE = {"experiment": "pr-moe", "scale": "smoke", "title": "t", "finished": "2026-01-01T00:00:00Z"}


@pytest.mark.parametrize("bad", ["", "[1]", '{"parameters": [1]}', '{"parameters": {}}', "[" * 100_000])
def test_a_malformed_summary_is_passed_over(bad, tmp_path, monkeypatch):
    monkeypatch.setenv("MOELAB_RESULTS", str(tmp_path))
    folder, values = tmp_path / "pr-moe" / "smoke", {"scale": "smoke", "seeds": 2}
    measurements = [{"id": "a", "measured": "2026-01-01 00:00", "seconds": 1.0, "read_back": False}]
    write_json(folder / "20260101-000000" / SUMMARY, {**BASE, "parameters": values, "measurements": measurements})
    write_json(folder / "20260102-000000" / SUMMARY, {**BASE, "parameters": {**values, "seeds": 3}})
    (folder / "20260103-000000").mkdir()
    (folder / "20260103-000000" / SUMMARY).write_text(bad)
    found = batch.last_result(EXPERIMENTS["pr-moe"], values)
    assert found is not None and found.measurements[0].id == "a"
    assert not batch.reads_back(found, values), "nothing is stored"
    assert batch.last_result(EXPERIMENTS["pr-moe"], {**values, "seeds": 4}) is None
    assert not batch.reads_back(None, values)
