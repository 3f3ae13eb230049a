"""Gating kernels: how rounds of sessions are judged, and what dispatch costs."""

import pandas as pd
import pytest

from moelab.design import verdicts as claims
from moelab.experiments import gating_kernels

FAST = [(7.0, 7.1, 7.2), (7.1, 7.2, 7.3), (7.1, 7.3, 7.4)]


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
        (FAST, "gpu", claims.HOLDS),
        (FAST, "cpu", claims.HOLDS),
        ([(4.0, 4.1, 4.2), (4.1, 4.2, 4.3), (4.1, 4.3, 4.4)], "cpu", claims.FAILS),
        (FAST[:1], "smoke", claims.CANNOT_TEST),
    ],
)
def test_six_times_is_judged_over_sessions_by_that_bound_alone(sessions, scale, verdict):
    ratios = pd.concat([kernel_rounds(i, masks, (1.0, 1.0, 1.0)) for i, masks in enumerate(sessions)])
    found, work = gating_kernels.verdicts(ratios, scale, "a machine", 64.0)
    medians = [sorted(masks)[1] for masks in sessions]
    assert found.verdict == verdict and found.ours == pytest.approx(sum(medians) / len(medians))
    assert "On a machine: 8 tokens, 16 experts" in found.note and "to 50.0 times" in found.note
    assert f"{min(sessions[0]):.3g} to {max(sessions[0]):.3g} over 3 rounds" in found.note
    at = gating_kernels.of_sessions(ratios).query("tokens == 8")
    assert list(at["ratio"]) == medians
    assert work.verdict == claims.HOLDS and work.kind == claims.COUNTED


def test_the_work_of_dispatch_is_tokens_times_slots():
    s = gating_kernels.SHAPES["smoke"]
    S, E = s.tokens[-1], s.experts[-1]
    assert gating_kernels.work("smoke") == -(-S // E) * E
