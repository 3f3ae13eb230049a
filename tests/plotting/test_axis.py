"""The axis that rows of a page share."""

from moelab.plotting.axis import EDGE, LOWEST, Axis


def test_an_interval_below_zero_ends_at_the_axis():
    axis = Axis.of_multiples("times the paper's", [-0.4, 0.9, 3.0])
    assert 0 < axis.low < LOWEST and axis.percent(-0.4) == EDGE < axis.percent(1.0) < axis.percent(3.0)
    assert all(LOWEST <= tick for tick in axis.ticks) and "svg" in axis.ruler()
