"""What a terminal is told: how long things take."""

import pytest

from moelab import terminal


@pytest.mark.parametrize(
    ("seconds", "said"), [(None, "…"), (0.4, "0 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s"), (3900, "1 h 05 min")]
)
def test_durations(seconds, said):
    assert terminal.duration(seconds) == said


def test_each_case_is_named_before_it_and_the_time_left_after_the_first(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    said = []
    for _ in terminal.announced(["a", "b", "c"], lambda case: f"case {case}"):
        said.append(capsys.readouterr().out)
        now[0] += 30
    assert said == [
        "case a (1 of 3)\n",
        "case b (2 of 3, about 1 min 00 s left)\n",
        "case c (3 of 3, about 30 s left)\n",
    ]


def test_what_goes_on_is_no_markup_and_nothing_in_a_file(capsys):
    with terminal.working("writing [/b]"):
        pass
    assert capsys.readouterr() == ("", "")
