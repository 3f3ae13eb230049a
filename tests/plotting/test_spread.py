import math

import pandas as pd

from moelab.plotting import figures, spread


def test_onsets_and_deviations_have_a_row_an_arm_and_a_limit():
    rows = [["A", 0, 0.05, 3.0], ["A", 1, 0.2, 3.1], ["B", 0, math.nan, 3.0], ["B", 1, 0.1, 3.0]]
    study = pd.DataFrame(rows, columns=["arm", "seed", "onset", "loss"])
    spreads = pd.DataFrame(
        [["A", 3, 0.05, 0.1, 0.02, 0.01, False], ["B", 2, 0.01, 0.01, 0.01, 0.01, None]],
        columns=["arm", "seeds", "spread", "repeated", "changed", "new", "passes"],
    )
    _, (began, apart) = figures.panels(2)
    spread.onsets(study, began, limit=0.1)
    assert sorted(began.collections[0].get_offsets()[:, 0].tolist()) == [5, 10, 20, 100], "never: at the right edge"
    spread.deviations(spreads, apart, limit=0.015)
    assert [t.get_text() for t in apart.texts] == ["A (3)"], "two seeds say too little"
    assert [len(c.get_offsets()) for c in apart.collections] == [1] * 4


def test_head_roles_have_a_colour_an_arm():
    effects = pd.DataFrame({"arm": ["A", "A", "B"], "new": [0.1, 0.2, 0.3], "repeated": [1.0, 0.1, 0.2]})
    _, (ax,) = figures.panels()
    spread.head_roles(effects, ax)
    assert [len(c.get_offsets()) for c in ax.collections] == [2, 1]
