"""Figures in the notebooks' style, closed after each test."""

import matplotlib
import pytest
from matplotlib import pyplot as plt

from moelab.plotting import figures


@pytest.fixture(autouse=True)
def _style():
    with matplotlib.rc_context():
        figures.theme()
        yield
    plt.close("all")
