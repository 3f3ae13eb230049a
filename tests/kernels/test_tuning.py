"""Other tile sizes reach the launches and change no result."""

import torch
from moelab.kernels import expert_ffn, tuning


def test_a_tile_reaches_the_launch_and_changes_no_result(interpreted, monkeypatch):
    from moelab.kernels import _experts_triton as experts

    x, w = torch.randn(70, 16), torch.randn(2, 16, 16)
    args = (x, torch.tensor([0, 30, 70], dtype=torch.int32), w, None, w, None)
    want = expert_ffn(*args, backend="reference")
    heights, plan = [], experts._plan
    monkeypatch.setattr(experts, "_plan", lambda *args: heights.append(plan(*args).BM) or plan(*args))
    for changes in ({}, {"BM": 16}):
        with tuning.trial("rows", changes), tuning.trial("product1", {"BN": 32, "BK": 16}):
            torch.testing.assert_close(expert_ffn(*args, backend="triton"), want, rtol=2e-5, atol=2e-5)
    assert heights == [64, 16]

    # A setting makes a product persistent; without it there is a program for each place.
    grids, grid = [], experts._grid
    monkeypatch.setattr(experts, "_grid", lambda *args: grids.append(grid(*args)) or grids[-1])
    for programs, want_grid in ((None, 4), (1, 2)):
        with tuning.trial("product1", {} if programs is None else {"programs_per_sm": programs}):
            torch.testing.assert_close(expert_ffn(*args, backend="triton"), want, rtol=2e-5, atol=2e-5)
        (launched,), config = grids[-2]
        assert launched == want_grid and config["PERSISTENT"] is (programs is not None)
