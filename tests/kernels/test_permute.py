"""Row tables, dispatch and combine: against loops, the reference, and poisoned memory."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moelab.kernels.gating import gate
from moelab.kernels.permute import RowTable, combine, dispatch, row_table

from tests.kernels.helpers import assert_same_bits_on_any_number_of_threads, poison, refused

CASES = [  # S, E, K, capacity, M
    (0, 4, 2, None, 8),
    (1, 2, 1, None, 1),
    (7, 4, 2, 2, 13),
    (13, 5, 1, 2, 67),
    (67, 8, 3, 11, 130),
    (67, 32, 2, None, 64),
    (40, 3, 1, 1, 256),
]


def make(S, E, K, capacity, device="cpu", seed=2):
    logits = torch.randn(S, E)
    if E > 3:
        logits[:, 1] = -50.0  # an empty expert
    return gate(logits.to(device), K, capacity, seed=seed)


@pytest.mark.parametrize("S,E,K,capacity,M", CASES)
def test_table(target, S, E, K, capacity, M):
    backend, device, _ = target
    g = make(S, E, K, capacity, device)
    table = row_table(g, backend=backend)
    kept, chosen = g.kept_E.tolist(), zip(g.expert_SK.flatten().tolist(), g.slot_SK.flatten().tolist(), strict=True)
    offsets = [sum(kept[:e]) for e in range(E + 1)]
    rows = [offsets[expert] + slot if slot >= 0 else -1 for expert, slot in chosen]
    entries = [rows.index(r) if r < sum(kept) else -1 for r in range(len(table.entry_R))]
    want = (torch.tensor(rows).view(S, K), torch.tensor(entries), torch.tensor(offsets))
    assert all(t.dtype == torch.int32 and torch.equal(t.cpu(), w.int()) for t, w in zip(table, want, strict=True))


def run(x, table, weight, dy, backend):
    """Outputs and gradients of combine(f(dispatch(x))) with a fixed f."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    rows = dispatch(x, table, backend=backend)
    rows.retain_grad()
    y = combine(rows * 1.5, table, weight, backend=backend)
    y.backward(dy)
    return rows.detach(), y.detach(), x.grad, rows.grad, weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("S,E,K,capacity,M", CASES)
def test_values_and_gradients(target, S, E, K, capacity, M, dtype):
    backend, device, _ = target
    g = make(S, E, K, capacity, device)
    for spare in (0, 5):
        table = row_table(g, rows=int(g.kept_E.sum()) + spare, backend=backend)
        x, dy = torch.randn(2, S, M, device=device).to(dtype)
        if backend == "cpp" and dtype == torch.float16:
            with refused():
                dispatch(x, table, backend="cpp")
            with refused():
                combine(x.new_zeros(len(table.entry_R), M), table, g.weight_SK, backend="cpp")
            return
        poison()
        got = run(x, table, g.weight_SK, dy, backend)
        want = run(x, table, g.weight_SK, dy, "reference")
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
        for name, a, b in zip(("rows", "y", "dx", "d rows", "d weight"), got, want, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape, name
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * M**0.5, msg=lambda m, n=name: f"{n}: {m}")
        assert torch.equal(got[0], want[0])


def test_dispatch_and_combine_by_hand(target):
    backend, device, _ = target
    x = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]], device=device)
    table = RowTable(
        *(
            torch.tensor(t, dtype=torch.int32, device=device)
            for t in ([[1, 3], [-1, 2], [0, -1]], [4, 0, 3, 1, -1], [0, 2, 5])
        )
    )
    rows = dispatch(x, table, backend=backend)
    assert rows.tolist() == [[3, 30], [1, 10], [2, 20], [1, 10], [0, 0]]
    rows[4] = float("nan")  # an empty row is never read
    weight = torch.tensor([[0.5, 0.25], [9.0, 2.0], [1.0, 9.0]], device=device)
    y = combine(rows, table, weight, backend=backend)
    assert y.tolist() == [[0.75, 7.5], [4, 40], [3, 30]]


def test_everything_dropped(target):
    """A table without rows: zeros out, zero gradients."""
    backend, device, _ = target
    row = torch.full((5, 2), -1, dtype=torch.int32, device=device)
    table = RowTable(
        row, torch.empty(0, dtype=torch.int32, device=device), torch.zeros(4, dtype=torch.int32, device=device)
    )
    x = torch.randn(5, 3, device=device)
    rows, y, dx, _, dw = run(x, table, torch.ones(5, 2, device=device), torch.ones(5, 3, device=device), backend)
    assert rows.shape == (0, 3) and not y.any() and not dx.any() and not dw.any()


def test_given_row_count(target):
    """Rows past the last group are empty and zero, as on a GPU that must not ask for the exact count."""
    backend, device, _ = target
    g = make(20, 4, 1, 3, device)
    table = row_table(g, rows=20, backend=backend)
    total = int(table.offsets_E1[-1])
    assert total < 20 and (table.entry_R[total:] == -1).all()
    assert not dispatch(torch.randn(20, 7, device=device), table, backend=backend)[total:].any()


@settings(max_examples=25, deadline=None)
@given(S=st.integers(1, 30), E=st.integers(2, 9), data=st.data())
def test_round_trip_hypothesis(target, S, E, data):
    """Unit weights and no drops: combine(dispatch(x)) is K times x."""
    backend, device, _ = target
    K = data.draw(st.integers(1, min(E, 4)))
    M = data.draw(st.integers(1, 70))
    g = gate(torch.randn(S, E, device=device), K, backend=backend)
    table = row_table(g, backend=backend)
    x = torch.randn(S, M, device=device)
    y = combine(dispatch(x, table, backend=backend), table, torch.ones(S, K, device=device), backend=backend)
    torch.testing.assert_close(y, K * x)


def test_gradcheck():
    table = row_table(make(6, 3, 2, 3))
    x = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(len(table.entry_R), 4, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dispatch(x, table, backend="reference"), x)
    assert torch.autograd.gradcheck(lambda r, w: combine(r, table, w, backend="reference"), (rows, weight))


def test_clear_errors():
    table = row_table(make(6, 3, 2, 3))
    with pytest.raises(ValueError, match="table of 6 tokens"):
        dispatch(torch.zeros(5, 4), table)
    with pytest.raises(ValueError, match="combine: rows"):
        combine(torch.zeros(5, 4), table, torch.zeros(6, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_on_any_number_of_threads(instructions, dtype):
    g, (x, dy) = make(3000, 8, 2, 600), torch.randn(2, 3000, 67).to(dtype)

    def both_ways():
        table = row_table(g, backend="cpp")
        return *table, *run(x, table, g.weight_SK, dy, "cpp")

    assert_same_bits_on_any_number_of_threads(both_ways)


def test_the_code_names_what_a_table_does_not_fit(instructions):
    g = make(20, 4, 2, None)
    with pytest.raises(RuntimeError, match=r"row_table: an entry has row \d+ of 9"):
        row_table(g, rows=9, backend="cpp")
    with pytest.raises(RuntimeError, match="row_table: no expert 7 of 4"):
        row_table(g._replace(expert_SK=torch.full_like(g.expert_SK, 7)), backend="cpp")
    with pytest.raises(RuntimeError, match=r"row_table: .* must be contiguous int32"):
        row_table(g._replace(slot_SK=g.slot_SK.long()), backend="cpp")
    table, x = row_table(g, backend="cpp"), torch.randn(20, 7)
    with pytest.raises(RuntimeError, match="dispatch: the table names 99 of 40"):
        dispatch(x, table._replace(entry_R=table.entry_R.clone().fill_(99)), backend="cpp")
    wrong = table._replace(row_SK=table.row_SK.clone().fill_(99))
    with pytest.raises(RuntimeError, match="combine: the table names 99 of 40"):
        combine(dispatch(x, table, backend="cpp"), wrong, g.weight_SK, backend="cpp")
    with pytest.raises(RuntimeError, match="combine: the table must be contiguous int32"):
        combine(x.repeat(2, 1), table._replace(row_SK=table.row_SK.long()), g.weight_SK, backend="cpp")
