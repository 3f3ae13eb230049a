"""Zero-shot averages and loss curves, recomputed."""

import pytest

from moelab import paper


def average(run, corpus="internal"):
    (row,) = paper.zero_shot(run, corpus)
    return row.average


def test_averages_are_means_of_six_cells():
    for row in paper.zero_shot():
        cells = [getattr(row, task) for task in paper.TASKS]
        assert row.average == (None if None in cells else pytest.approx(sum(cells) / 6))
        assert all(0 < cell < 100 for cell in cells if cell is not None)
        assert row.scores == {task: cell for task, cell in zip(paper.TASKS, cells, strict=True) if cell is not None}
    assert average("350M") == pytest.approx(35.255, abs=1e-3), "the claims pin all other runs' averages"


def test_quoted_averages():
    """mos-350m-average: the quoted averages follow from the cells for the 1.3B pair and not for the 350M pair."""
    quoted = {row.run: row for row in paper.zero_shot() if row.quoted_average is not None}
    assert len(quoted) == 4
    for run, row in quoted.items():
        follows = abs(row.quoted_average - row.average) < 0.0051
        assert follows == run.startswith("1.3B")
        assert ("mos-350m-average" in row.conflict) == (not follows)
    small = average("350M+PR-MoE-32/64+L21+MoS") / average("350M+PR-MoE-32/64")
    large = average("1.3B+PR-MoE-64/128+L21+MoS") / average("1.3B+PR-MoE-64/128")
    assert round(100 * small, 1) == 97.8 and round(100 * large, 1) == 99.2
    (student,), (teacher,) = paper.zero_shot("1.3B+PR-MoE-64/128+L21+MoS"), paper.zero_shot("1.3B+PR-MoE-64/128")
    assert 0.991 < student.quoted_average / teacher.quoted_average < 0.992  # printed as 99.1 %: cut, not rounded


def test_gains_of_the_staged_student():
    """mos-350m-gains: the cells' differences, none of which the text quotes."""
    (mos,), (scratch,) = paper.zero_shot("350M+PR-MoE-32/64+L21+MoS"), paper.zero_shot("350M+PR-MoE-32/64+L21")
    gains = (mos.race_h - scratch.race_h, mos.triviaqa - scratch.triviaqa, mos.boolq - scratch.boolq)
    assert gains == pytest.approx((2.29, 4.88, 5.72), abs=1e-6)
    assert all(abs(gain - quoted) > 0.3 for gain, quoted in zip(gains, (1.7, 4.5, 6.5), strict=True))


def test_students_rank_on_tasks():
    """full-kd-loss-or-tasks: distilled throughout beats scratch on the average, whatever its loss."""
    student = "350M+PR-MoE-32/64+L21"
    assert average(student) < average(student + "+KD") < average(student + "+MoS") < average("350M+PR-MoE-32/64")


def test_loss_curves():
    for name in ("350M", "1.3B", "6.7B", "350M+MoE-128", "1.3B+MoE-128"):
        curve = paper.loss_curve(name)
        assert len(curve.tokens_B) == len(curve.loss) == len(curve.uncertainty) == 12
        assert list(curve.tokens_B) == sorted(curve.tokens_B) and curve.tokens_B[-1] == 295
        assert all(later <= earlier for earlier, later in zip(curve.loss, curve.loss[1:], strict=False))
        assert curve.final_low <= curve.final <= curve.final_high
        assert set(curve.uncertainty) == {0.005}
    for base in ("350M", "1.3B"):
        moe, dense = paper.loss_curve(f"{base}+MoE-128").loss, paper.loss_curve(base).loss
        assert all(ours < theirs for ours, theirs in zip(moe, dense, strict=True)), "ahead at every reading"
