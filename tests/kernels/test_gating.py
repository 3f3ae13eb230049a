"""The gate against a brute-force loop over tokens, its backends against each other, and its gradients."""

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moelab.kernels._hash import hash_keys, priorities
from moelab.kernels.gating import Gate, gate

from tests.kernels.helpers import assert_same_bits_on_any_number_of_threads, poison, refused

SHAPES = [  # S, E, K, capacity
    (0, 4, 1, None),
    (1, 2, 1, None),
    (1, 2, 2, 1),
    (7, 2, 1, 4),
    (13, 5, 2, 3),
    (67, 7, 3, 11),
    (35, 512, 2, 1),
    (70, 64, 8, 12),
    (257, 16, 1, 19),
]
LONG = [(300, 3, 2, 40), (1500, 3, 3, 1300), (90, 2, 2, 1)]  # more entries of an expert than the selection's chunk


def brute_force(choice_SE, top_k, capacity, seed):
    """Experts and slots by loops over Python numbers, straight from the definition."""
    S, E = choice_SE.shape
    rows = choice_SE.tolist()
    experts = [sorted(range(E), key=lambda e: (-row[e], e))[:top_k] for row in rows]
    entries = [(k, s) for k in range(top_k) for s in range(S)]  # k-major
    kept = set()
    for e in range(E):
        mine = [(k, s) for k, s in entries if experts[s][k] == e]
        if capacity is not None and seed is not None:
            mine.sort(key=lambda ks: (-python_priority(seed, ks[1], ks[0]), ks[1]))
        kept.update(mine if capacity is None else mine[:capacity])
    slots = [[-1] * top_k for _ in range(S)]
    counts = [0] * E
    for k, s in entries:
        if (k, s) in kept:
            slots[s][k] = counts[experts[s][k]]
            counts[experts[s][k]] += 1
    load = [sum(e in row for row in experts) for e in range(E)]
    return experts, slots, load, counts


def python_priority(seed, token, k):
    low, high = hash_keys(seed)

    def mix(x):
        x ^= x >> 16
        x = x * 0x85EBCA6B % 2**32
        x ^= x >> 13
        x = x * 0xC2B2AE35 % 2**32
        return x ^ x >> 16

    return mix((mix(token % 2**32 ^ low) + k * 0x9E3779B9) % 2**32 ^ high)


def on(target, logits, *args, choice_logits_SE=None, **kwargs):
    """gate(…) on the target's device, results back on CPU."""
    backend, device, _ = target
    if choice_logits_SE is not None:
        choice_logits_SE = choice_logits_SE.to(device)
    poison()
    g = gate(logits.to(device), *args, choice_logits_SE=choice_logits_SE, backend=backend, **kwargs)
    return Gate(*(None if t is None else t.detach().cpu() for t in g))


def check_against_brute_force(logits, top_k, capacity, seed, normalize, target, choice=None):
    options = dict(seed=seed, normalize=normalize, choice_logits_SE=choice)
    g = on(target, logits, top_k, capacity, **options)
    bare = on(target, logits, top_k, capacity, losses=False, **options)  # which a decoding step computes
    assert all(torch.equal(a, b) for a, b in zip(g[:5], bare[:5], strict=True))
    assert (bare.aux_loss is None) == (bare.z_loss is None) == (target[0] == "cpp")
    experts, slots, load, kept = brute_force(logits if choice is None else choice, top_k, capacity, seed)
    S, E = logits.shape
    shape = (S, top_k)
    assert torch.equal(g.expert_SK, torch.tensor(experts, dtype=torch.int32).reshape(shape))
    assert torch.equal(g.slot_SK, torch.tensor(slots, dtype=torch.int32).reshape(shape))
    assert g.load_E.tolist() == load and g.kept_E.tolist() == kept
    p = logits.double().softmax(1)
    weight = torch.where(g.slot_SK >= 0, p.gather(1, g.expert_SK.long()), 0.0)
    if normalize:
        weight = weight / weight.sum(1, keepdim=True).clamp(min=1.2e-7)
    torch.testing.assert_close(g.weight_SK.double(), weight, rtol=1e-5, atol=1e-6)
    if S:
        first = torch.bincount(g.expert_SK[:, 0].long(), minlength=E) / S
        assert math.isclose(g.aux_loss.item(), (E * (p.mean(0) * first).sum()).item(), rel_tol=1e-5)
        assert math.isclose(g.z_loss.item(), logits.double().logsumexp(1).square().mean().item(), rel_tol=1e-5)
    else:
        assert g.aux_loss.item() == 0 and g.z_loss.item() == 0
    for t in (g.expert_SK, g.slot_SK, g.load_E, g.kept_E):
        assert t.dtype == torch.int32
    assert g.weight_SK.dtype == g.aux_loss.dtype == g.z_loss.dtype == torch.float32
    return g


@pytest.mark.parametrize(
    "S,E,K,capacity,seed",
    [
        *((*shape, seed) for shape in SHAPES for seed in (None, 1 << 40)),
        *((*shape, 3) for shape in LONG),
        (13, 5, 2, 3, 0),
    ],
)
def test_semantics(target, S, E, K, capacity, seed):
    check_against_brute_force(torch.randn(S, E), K, capacity, seed, K > 1, target)


@settings(max_examples=10 if os.environ.get("TRITON_INTERPRET") == "1" else 30, deadline=None)
@given(data=st.data())
def test_semantics_hypothesis(target, data):
    S, E = data.draw(st.integers(0, 40)), data.draw(st.integers(2, 12))
    K = data.draw(st.integers(1, E))
    capacity = data.draw(st.none() | st.integers(1, 12))
    seed = data.draw(st.none() | st.integers(0, 2**63 - 1))
    values = data.draw(st.lists(st.integers(-2, 2), min_size=S * E, max_size=S * E))  # many ties
    logits = torch.tensor(values, dtype=torch.float32).reshape(S, E)
    choice = torch.randn(S, E) if data.draw(st.booleans()) else None
    normalize = data.draw(st.booleans())
    check_against_brute_force(logits, K, capacity, seed, normalize, target, choice)


def test_one_expert_takes_all(target):
    logits = torch.zeros(67, 8)
    logits[:, 5] = 9.0
    for seed in (None, 4):
        g = check_against_brute_force(logits, 1, 9, seed, False, target)
        assert g.kept_E.tolist() == [0, 0, 0, 0, 0, 9, 0, 0]


def test_infinite_logits(target):
    """An expert masked with -inf is chosen last; +inf in the choice logits forces a choice."""
    logits, choice = torch.randn(2, 9, 6)
    logits[:, 2:], choice[:, 3] = -math.inf, math.inf
    check_against_brute_force(logits, 4, None, None, False, target)
    check_against_brute_force(torch.randn(9, 6), 2, 4, 1, True, target, choice)


@pytest.mark.parametrize("where", ["nan", "inf", "minus", "choice"])
@pytest.mark.parametrize("S,E", [(13, 5), (41, 128)])
def test_bad_tokens_go_nowhere_and_poison_the_losses(target, where, S, E):
    logits = torch.randn(S, E)
    clean = logits[[s for s in range(S) if s not in (3, 7)]]
    choice = logits.clone()
    if where == "choice":
        choice[[3, 7], 4] = math.nan
    else:
        logits[3, 1] = logits[7, 0] = {"nan": math.nan, "inf": math.inf, "minus": 0.0}[where]
        if where == "minus":
            logits[[3, 7]] = -math.inf
        choice = logits
    for capacity, seed, losses in ((3, None, True), (3, 5, True), (None, None, True), (None, None, False)):
        g = on(target, logits, 2, capacity, seed=seed, choice_logits_SE=choice, losses=losses)
        assert g.expert_SK[[3, 7]].tolist() == [[0, 1]] * 2
        assert (g.slot_SK[[3, 7]] == -1).all() and (g.weight_SK[[3, 7]] == 0).all()
        assert g.aux_loss is None or (g.aux_loss.isnan() and g.z_loss.isnan())
        assert torch.equal(g.load_E, gate(clean, 2).load_E)
        assert g.weight_SK.isfinite().all()


@pytest.mark.parametrize("S,E,K", [(32, 8, 1), (8, 128, 2), (13, 5, 3), (300, 64, 2)])
def test_a_token_has_the_same_bits_in_any_company(instructions, S, E, K):
    logits = torch.randn(S, E)
    together = gate(logits, K, normalize=K > 1, losses=False, backend="cpp")
    for s in range(0, S, 1 + S // 20):
        alone = gate(logits[s : s + 1], K, normalize=K > 1, losses=False, backend="cpp")
        assert torch.equal(alone.expert_SK[0], together.expert_SK[s])
        assert torch.equal(alone.weight_SK[0], together.weight_SK[s])


def test_priorities_are_one_hash_everywhere():
    want = [[python_priority(11, s, k) for k in range(3)] for s in range(100)]
    assert priorities(11, 100, 3).tolist() == want
    assert priorities(12, 100, 3).tolist() != want
    assert priorities(11, 40, 3).tolist() == want[:40], "a token's draw does not depend on the number of tokens"
    assert len(set(priorities(3, 5000, 1).flatten().tolist())) == 5000


@pytest.mark.parametrize(
    "S,seed,first,second",  # tokens whose entries (first, k = 0) and (second, k = 1) draw the same priority
    [(512, 10810, 306, 111), (64, 1044463, 34, 26), (64, 3213365, 34, 58)],
)
def test_the_lower_token_wins_a_tie_of_priorities(target, S, seed, first, second):
    """All tokens want expert 0, first or second, and its capacity ends between two entries of equal priority."""
    assert python_priority(seed, first, 0) == python_priority(seed, second, 1)
    logits = torch.zeros(S, 3)
    rank_S = torch.arange(S) % 2  # of expert 0 among the choices
    rank_S[first], rank_S[second] = 0, 1
    logits[:, 0], logits[:, 1] = 2.0, 1.0 + 2.0 * rank_S
    draw_S = priorities(seed, S, 2)[torch.arange(S), rank_S]
    capacity = int((draw_S > draw_S[first]).sum()) + 1
    g = check_against_brute_force(logits, 2, capacity, seed, False, target)
    assert (g.expert_SK[torch.arange(S), rank_S] == 0).all()
    kept_S = g.slot_SK[torch.arange(S), rank_S] >= 0
    assert kept_S[min(first, second)] and not kept_S[max(first, second)]


def test_random_selection_is_fair():
    """Each of 64 tokens that want one expert is kept about as often as any other: no positional bias."""
    logits = torch.zeros(64, 2)
    logits[:, 0] = 1
    kept = torch.stack([gate(logits, 1, 16, seed=s).slot_SK[:, 0] >= 0 for s in range(2000)]).double().mean(0)
    spread = math.sqrt(0.25 * 0.75 / 2000)
    assert (kept - 0.25).abs().max() < 4.5 * spread


def losses(g, weights):
    return (g.weight_SK * weights).sum() + 0.3 * g.aux_loss + 0.07 * g.z_loss


@pytest.mark.parametrize(
    "S,E,K,capacity,normalize", [*((*shape, shape[2] > 1) for shape in SHAPES), (13, 5, 2, 3, False)]
)
def test_gradients_match_the_reference(target, S, E, K, capacity, normalize):
    """Each of the three outputs alone and all together."""
    backend, device, _ = target
    logits = torch.randn(S, E, device=device)
    out = torch.randn(S, K, device=device)
    grads = []
    for each in (backend, "reference"):
        x = logits.clone().requires_grad_()
        g = gate(x, K, capacity, seed=1, normalize=normalize, backend=each)
        terms = [(g.weight_SK * out).sum(), g.aux_loss, g.z_loss]
        grads.append([torch.autograd.grad(t, x, retain_graph=True)[0] for t in (*terms, sum(terms))])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck(normalize):
    logits = (torch.randn(5, 4, dtype=torch.float64) * 3).requires_grad_()
    choice = torch.randn(5, 4, dtype=torch.float64)

    def differentiable(x):
        g = gate(x, 2, 2, seed=1, normalize=normalize, choice_logits_SE=choice, backend="reference")
        return g.weight_SK, g.aux_loss, g.z_loss

    assert torch.autograd.gradcheck(differentiable, logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_route_in_float32(target, dtype):
    backend, device, _ = target
    logits = torch.randn(50, 9, device=device).to(dtype).requires_grad_()
    if backend == "cpp" and dtype == torch.float16:
        with refused():
            gate(logits, 2, backend="cpp")
        return
    g = gate(logits, 2, 8, seed=0, backend=backend)
    wide = gate(logits.detach().float().requires_grad_(), 2, 8, seed=0, backend=backend)
    assert g.weight_SK.dtype == torch.float32
    for a, b in zip(g, wide, strict=True):
        assert torch.equal(a, b)
    losses(g, 1.0).backward()
    assert logits.grad.dtype == dtype and logits.grad.isfinite().all()


@pytest.mark.parametrize(
    "args,kwargs,message",
    [
        ((torch.zeros(3), 1), {}, "logits must be"),
        ((torch.zeros(3, 4, dtype=torch.int64), 1), {}, "logits must be"),
        ((torch.zeros(3, 1), 1), {}, "2 to 512 experts"),
        ((torch.zeros(3, 513), 1), {}, "2 to 512 experts"),
        ((torch.zeros(3, 4), 5), {}, "top_k must be 1 to 4"),
        ((torch.zeros(3, 4), 1, 0), {}, "capacity must be at least 1"),
        ((torch.zeros(3, 4), 1, 1.25 * 3 / 2), {}, "capacity must be at least 1 and an int"),
        ((torch.zeros(3, 4), 1), {"choice_logits_SE": torch.zeros(3, 5)}, "choice logits"),
        ((torch.zeros(3, 4), 1), {"backend": "cuda"}, "unknown backend"),
        ((torch.zeros(3, 4), 1), {"backend": "triton"}, "needs CUDA tensors"),
    ],
)
def test_clear_errors(args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        gate(*args, **kwargs)


def gradient(logits, *args, backend, **kwargs):
    """Return the gate's results and the logits' gradient from all three differentiable ones."""
    x = logits.clone().requires_grad_()
    g = gate(x, *args, backend=backend, **kwargs)
    losses(g, torch.linspace(-1, 1, g.weight_SK.numel(), device=x.device).view_as(g.weight_SK)).backward()
    return [*(t.detach() for t in g), x.grad]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", [None, -3, (1 << 63) - 1])
@pytest.mark.parametrize(
    "S,E,K,capacity,noisy",
    [
        (4096, 128, 1, 32, False),
        (4099, 64, 2, 128, True),
        (4097, 50, 3, None, False),
        (2000, 8, 8, 1500, False),
        (1111, 500, 2, 3, False),
        (30000, 2, 1, 12000, True),
    ],
)
def test_many_tokens(instructions, S, E, K, capacity, noisy, seed, ties):
    """Integers equal the reference's; the rest agrees to rounding."""
    logits, noise = 3 * torch.randn(S, E) - 0.05 * torch.arange(E), torch.randn(S, E)
    if ties:
        logits, noise = logits.round(), noise.round() * torch.tensor([1.0, -0.0])[torch.randint(2, (S, E))]
    options = dict(seed=seed, normalize=K > 1, choice_logits_SE=noise if noisy else None)
    got, want = (gradient(logits, K, capacity, backend=b, **options) for b in ("cpp", "reference"))
    for name, a, b in zip((*Gate._fields, "gradient"), got, want, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.is_contiguous(), name
        if a.dtype == torch.int32:
            assert torch.equal(a, b), name
        else:
            tolerance = dict(rtol=1e-5, atol=2e-6) if name == "gradient" else dict(rtol=2e-6, atol=1e-9)
            torch.testing.assert_close(a, b, **tolerance, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("S,E,K", [(4099, 64, 1), (1000, 13, 2), (200, 128, 1)])
def test_the_same_bits_on_any_number_of_threads(instructions, S, E, K):
    logits = torch.randn(S, E)
    assert_same_bits_on_any_number_of_threads(
        lambda: gradient(logits, K, S * K // E, seed=1, normalize=K > 1, backend="cpp")
    )


def test_exponentials_are_exact_to_rounding(instructions):
    """Probabilities from 1 down to zero, by an expert that noise chooses; logits far from zero."""
    logits = torch.zeros(20000, 2)
    logits[:, 1] = -torch.linspace(0, 110, len(logits))
    choice = torch.tensor([[0.0, 1.0]]).expand_as(logits)
    for offset in (0.0, 4096.0):
        x = logits + offset
        got = gate(x, 1, choice_logits_SE=choice, backend="cpp").weight_SK[:, 0]
        want = x.double().softmax(1)[:, 1]
        torch.testing.assert_close(got.double(), want, rtol=3e-7, atol=2e-45)
