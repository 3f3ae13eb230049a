"""Gating kernels and all-to-all: counts, rounds and what is read from files."""

import json

import pandas as pd
import pytest

from moelab.design import verdicts as claims
from moelab.experiments import (
    all_to_all,
    decoding,
    gating_kernels,
    inference_scaling,
)
from moelab.lab import Lab
from moelab.simulate import ways


def test_counts_of_the_exchanges_are_the_papers_and_the_simulators():
    counted = pd.DataFrame(all_to_all.counts((8, 32, 128)))
    for what in ("messages", "rows", "gathered_rows"):
        assert counted[what].tolist() == counted[f"formula_{what}"].tolist() == counted[f"simulated_{what}"].tolist()
    verdicts = {v.claim: v for v in all_to_all.verdicts(counted)}
    assert {v.verdict for v in verdicts.values()} == {claims.REPRODUCED}
    assert verdicts["hierarchical-hops"].ours == pytest.approx(10 / 31) and verdicts["pcc-hops"].ours == 16 / 128
    assert verdicts["hierarchical-volume"].ours == 2 and "1.68" in verdicts["hierarchical-volume"].note


def test_the_simulated_exchange_pays_with_ranks():
    found = ways.times().set_index(["bytes", "way", "ranks"])["ratio"]
    for size in (1 << 14, 1 << 18, 1 << 22):
        assert found[size, "hierarchical", 8] == 1 and found[size, "hierarchical", 256] < 0.7
        assert found[size, "coordinated", 256] < found[size, "hierarchical", 256]


def kernel_rounds(session, masks, ours):
    """Rounds of "all three" in a session, at 8 tokens and 16 experts, and one slow shape that no verdict looks at."""
    rows = [
        (8, 16, name, i, ms)
        for name, all_ms in (("einsum (baseline)", masks), ("ours", ours))
        for i, ms in enumerate(all_ms)
    ]
    rows += [(64, 4, name, 0, ms) for name, ms in (("einsum (baseline)", 50.0), ("ours", 1.0))]
    columns = ["tokens", "experts", "candidate", "round", "ms"]
    return gating_kernels.speedups(pd.DataFrame(rows, columns=columns).assign(part="all three", session=session))


@pytest.mark.parametrize(
    ("sessions", "scale", "verdict"),
    [
        ([(7.0, 7.1, 7.2)], "gpu", claims.FEW_SESSIONS),
        ([(7.0, 7.1, 7.2), (7.1, 7.2, 7.3)], "gpu", claims.FEW_SESSIONS),
        ([(7.0, 7.1, 7.2), (7.1, 7.2, 7.3), (7.1, 7.3, 7.4)], "gpu", claims.REPRODUCED),
        ([(7.0, 7.1, 7.2), (7.1, 7.2, 7.3), (7.1, 7.3, 7.4)], "cpu", claims.DIRECTION),
        ([(0.5, 0.51, 0.52), (0.5, 0.52, 0.53), (0.5, 0.51, 0.52)], "cpu", claims.NOT_REPRODUCED),
        ([(7.0, 7.1, 7.2)], "smoke", claims.NOT_TESTABLE),
    ],
)
def test_six_times_is_judged_over_sessions_and_on_a_processor_only_its_order(sessions, scale, verdict):
    ratios = pd.concat([kernel_rounds(i, masks, (1.0, 1.0, 1.0)) for i, masks in enumerate(sessions)])
    found, work = gating_kernels.verdicts(ratios, scale, "a machine", 64.0)
    medians = [sorted(masks)[1] for masks in sessions]
    assert found.verdict == verdict and found.ours == pytest.approx(sum(medians) / len(medians))
    assert "On a machine: 8 tokens, 16 experts" in found.note and "to 50.0 times" in found.note
    assert f"{min(sessions[0]):.3g} to {max(sessions[0]):.3g} over 3 rounds" in found.note
    at = gating_kernels.of_sessions(ratios).query("tokens == 8")
    assert list(at["ratio"]) == medians
    assert work.verdict == claims.REPRODUCED and work.kind == claims.COUNTED


def test_the_work_of_dispatch_is_tokens_times_slots():
    s = gating_kernels.SHAPES["smoke"]
    S, E = s.tokens[-1], s.experts[-1]
    assert gating_kernels.work("smoke") == -(-S // E) * E


def test_measurements_of_a_cluster_are_read_and_drawn(tmp_path):
    import matplotlib.pyplot as plt

    from moelab.plotting import serving

    def row(mode, ranks, ms):
        parts = {"attention": ms / 2, "all-to-all": ms / 2}
        rank = {
            "candidate": mode,
            "ranks": ranks,
            "median_ms": ms,
            "p95_ms": 2 * ms,
            "floor_ms": 1.0,
            "parts_ms": parts,
        }
        return rank | {"batch": 64, "empty_collective_ms": 0.1}

    rows = [row(mode, ranks, ms) for ranks, ms in ((64, 4.0), (8, 9.0)) for mode in ("baseline", "optimised")]
    file = tmp_path / "decode.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = inference_scaling.measured_steps(Lab().measure, "paper", str(file))
    assert list(found["label"]) == ["8 ranks", "8 ranks", "64 ranks", "64 ranks"]
    assert decoding.speedups(found) == {"8 ranks": 1.0, "64 ranks": 1.0}
    fig, axes = plt.subplots(1, 2)
    serving.decoding_steps(found, *axes)
    for ax in axes:
        shown = {t.get_text() for t in (*ax.texts, *ax.get_yticklabels())}
        assert {"8 ranks", "64 ranks"} <= shown
    plt.close(fig)
    file.write_text("{}")
    for given, part in (
        (None, "needs -p measured_file=FILE"),
        (str(tmp_path / "none"), "No such file"),
        (str(file), "no rows"),
    ):
        with pytest.raises(ValueError, match=part):
            inference_scaling.measured_steps(Lab().measure, "paper", given)
