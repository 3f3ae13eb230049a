"""Make up results of runs."""

import pandas as pd


def final(losses, **columns):
    """Return `runs.final()` of losses by arm, one a seed; `columns` by arm."""
    rows = [
        {"arm": arm, "seed": seed, "validation_loss": v, **{k: c[arm] for k, c in columns.items()}}
        for arm, values in losses.items()
        for seed, v in enumerate(values)
    ]
    return pd.DataFrame(rows)
