"""What `moelab power` and `Lab.power` read and say."""

import json
import os
import subprocess
import sys

import pandas as pd
import pytest

from moelab.report import planning


def final(losses):
    return pd.DataFrame(
        [{"arm": a, "seed": s, "validation_loss": v} for a, values in losses.items() for s, v in enumerate(values)]
    )


class TestCommand:
    def test_claims_and_arms_of_a_result(self, publish, tmp_path):
        results = tmp_path / "results"
        publish(results, "pr-moe", "cpu", claims={"moe128-beats-moe32": (-0.02, -0.03, -0.01), "pr-moe-size": (0.3,)})
        found = planning.needs("pr-moe", "cpu", results)
        (row,) = found.to_dict("records")
        assert row["comparison"] == "moe128-beats-moe32" and row["spread"] == pytest.approx(0.01)
        assert (row["seeds"], row["effect"], row["at most"]) == (3, 0.01, 12)
        found = planning.needs("pr-moe", "cpu", results, effect=0.05)
        assert list(found["comparison"]) == ["350M+MoE-128 − 350M"] and found["effect"][0] == 0.05
        publish(results, "what-survives", "cpu")
        assert len(planning.needs("what-survives", "cpu", results)) == 1, "an experiment without claims"

    def test_runs_at_hand(self):
        found = planning.needs_of(final({"a": [1.0, 2.0, 3.0], "b": [1.5, 2.49, 3.51], "c": [0.0]}))
        assert list(found["comparison"]) == ["b − a"] and found["spread"][0] == pytest.approx(0.01)
        assert list(planning.needs_of(final({"a": [1, 2], "b": [1, 3], "c": [2, 2]}), against="b")["comparison"]) == [
            "a − b",
            "c − b",
        ]

    @pytest.mark.parametrize(
        ("arguments", "line"),
        [
            (("nosuch",), "no experiment 'nosuch'; allowed: start"),
            (("pr-moe", "--scale", "huge"), "no scale 'huge'; allowed: smoke"),
            (
                ("pr-moe", "--scale", "gpu"),
                "no result of pr-moe at scale gpu to take a spread from; `moelab run pr-moe",
            ),
            (("pr-moe", "--against", "MoE-7"), "no arm 'MoE-7' in these runs; there are 350M, 350M+MoE-128"),
            (("pr-moe", "--effect", "-1"), "effect must be a positive number of nats per token, got -1.0"),
            (("pr-moe", "--effect", "nan"), "effect must be a positive number of nats per token, got nan"),
        ],
    )
    def test_bad_input_is_one_line(self, arguments, line, publish, tmp_path):
        publish(tmp_path / "results", "pr-moe", "cpu")
        env = os.environ | {"MOELAB_RESULTS": str(tmp_path / "results"), "MOELAB_HOME": str(tmp_path / "home")}
        ran = subprocess.run(
            [sys.executable, "-m", "moelab.cli", "power", *arguments], env=env, capture_output=True, text=True
        )
        assert ran.returncode == 2 and line in ran.stderr and ran.stderr.count("\n") == 1, ran.stderr

    def test_the_table_says_it_in_words(self, publish, tmp_path):
        publish(tmp_path / "results", "pr-moe", "cpu", claims={"moe128-beats-moe32": (-0.02, -0.3, 0.1)})
        env = os.environ | {"MOELAB_RESULTS": str(tmp_path / "results"), "MOELAB_HOME": str(tmp_path / "home")}
        ran = subprocess.run(
            [sys.executable, "-m", "moelab.cli", "power", "pr-moe"], env=env, capture_output=True, text=True
        )
        text = " ".join(ran.stdout.split())
        assert "moe128-beats-moe32 0.21 of 3 0.01, the smallest > 99 > 99 > 99" in text
        assert "80 % probability if the effect is there" in text

    def test_lab(self, publish, tmp_path, monkeypatch):
        from moelab.lab import Lab

        publish(tmp_path / "results", "pr-moe", "cpu", claims={"moe128-beats-moe32": (-0.02, -0.03, -0.01)})
        monkeypatch.setenv("MOELAB_RESULTS", str(tmp_path / "results"))
        monkeypatch.setenv("MOELAB_HOME", str(tmp_path / "home"))
        assert json.loads(Lab().power("pr-moe").to_json(orient="records"))[0]["at most"] == 12
