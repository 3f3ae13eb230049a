"""Routing and decoder variants against plain references; the paper's models keep their ids, weights and outputs."""

import hashlib
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from moelab.bench.decode_steps import weight_bytes
from moelab.config import (
    DataConfig,
    DecoderConfig,
    ExpertConfig,
    FeedForward,
    ModelConfig,
    ParallelConfig,
    RoutingConfig,
    TrainConfig,
    digest,
    expert_pattern,
    from_json,
    to_json,
)
from moelab.config.feed_forward import Weight
from moelab.models import GPT, build
from moelab.models.attention import rotation_at
from moelab.models.routing import Router, normalized_entropy
from moelab.runs.dry_run import STATE_BYTES, state_bytes
from moelab.runs.spec import RunSpec
from moelab.simulate.layouts import Layouts
from moelab.simulate.memory import rank_parameters

FREE = RoutingConfig(drop_tokens=False)
GUMBEL_SECOND = RoutingConfig(choice_noise="gumbel_second")
MODERN = ModelConfig(
    layers=3, hidden=24, heads=4, experts=(0, 5, 7), top_k=3, vocab=61, context=32, init_std=0.1, routing=FREE,
    decoder=DecoderConfig.modern(kv_heads=2, head_size=10, ffn=40), expert=ExpertConfig(ffn=18, shared=2, shared_ffn=9),
)  # fmt: skip
VARIANTS = {
    "modern": MODERN,
    "shared gate": replace(MODERN, expert=ExpertConfig(ffn=18, shared=1, shared_gate=True)),
    "head norm": replace(MODERN, decoder=replace(MODERN.decoder, qk_norm="head")),
    "norm of all heads": replace(MODERN, decoder=replace(MODERN.decoder, qk_norm="all")),
    "smeared keys": replace(MODERN, decoder=replace(MODERN.decoder, qk_norm="head", smeared_keys=True)),
    "qkv biases": replace(MODERN, decoder=replace(MODERN.decoder, biases="qkv", tied=True)),
    "swiglu with biases": replace(MODERN, decoder=DecoderConfig(feed_forward="swiglu"), expert=ExpertConfig()),
    "residual": replace(MODERN, expert=ExpertConfig(), residual=True),
    "sigmoid": replace(MODERN, routing=replace(FREE, scores="sigmoid", balance_rate=0.01)),
    "dropping": replace(MODERN, routing=RoutingConfig(capacity_factor=0.5, min_capacity=1, aux_choices="all")),
    "per sequence": replace(MODERN, routing=replace(FREE, aux_choices="all", aux_scope="sequence", aux_loss=0.1)),
}

PINNED = {  # model -> (run id, digest of the initial weights) as they were before there were options
    "350M twin": ("350m-twin-s1-aa9784f0c5", "9c5e4592624c4dfa"),
    "350M+MoE-32 twin": ("350m-moe-32-twin-s1-dce40c2008", "23e8913e9ed6cf23"),
    "1.3B+PR-MoE-64/128 twin": ("1.3b-pr-moe-64-128-twin-s1-efab9d940d", "d33b36b7ceaf6ec8"),
}


@pytest.mark.parametrize("name", PINNED)
def test_the_papers_models_keep_ids_and_initial_weights(name):
    model = ModelConfig.parse(name)
    small = build(model.shrink(hidden=1, depth=2, experts=1, vocab=64, context=16, head_size=32), 5)
    weights = hashlib.sha256()
    for parameter, value in small.named_parameters():
        weights.update(parameter.encode())
        weights.update(value.detach().numpy().tobytes())
    assert (RunSpec(model, TrainConfig(seed=1)).id, weights.hexdigest()[:16]) == PINNED[name]


def test_a_default_leaves_no_trace_in_the_identity_and_old_specs_load():
    plain = ModelConfig.parse("350M+MoE-32 twin")
    assert digest(plain) == digest(replace(plain, decoder=DecoderConfig(), expert=ExpertConfig()))
    stored = to_json(plain)
    for field in ("decoder", "expert"):
        del stored[field]
    for field in ("scores", "balance_rate", "aux_choices"):
        del stored["routing"][field]
    assert from_json(ModelConfig, stored) == plain
    assert len({digest(config) for config in VARIANTS.values()}) == len(VARIANTS)
    assert all(from_json(ModelConfig, to_json(config)) == config for config in VARIANTS.values())


def test_a_tensor_that_an_expert_gains_is_built_counted_and_simulated(monkeypatch):
    """By its name, shape and slices alone, which stand in one place."""
    tensors = FeedForward.tensors
    gained = Weight((18, 3), 0)

    def more(shape):
        return tensors(shape) | ({"gained": gained} if shape.ffn == 18 else {})

    config = replace(MODERN, experts=(0, 4, 6), expert=ExpertConfig(ffn=18))
    layout, layouts = ParallelConfig(data=2), Layouts([ParallelConfig(data=2)])
    found = []
    for patched in (tensors, more):
        monkeypatch.setattr(FeedForward, "tensors", patched)
        with torch.device("meta"):
            built = GPT(config)
        spec = RunSpec(config, TrainConfig(micro_batch=1), data=DataConfig(context=16), parallel=layout)
        found.append([
            sum(p.numel() for p in built.parameters()), config.parameters(),
            config.active_parameters(), config.flops_per_token(training=False) // 2,
            state_bytes(spec) / STATE_BYTES, rank_parameters(config, layouts)[1][0], weight_bytes(config, 2, 4) / 4,
        ])  # fmt: skip
    one, K, E = math.prod(gained.shape), config.top_k, sum(config.experts)
    gains = [after - before for before, after in zip(*found, strict=True)]
    assert gains == [E * one, E * one, 2 * K * one, 2 * K * one, E / 2 * one, E / 2 * one, 2 * 2 * one]


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_parameters_and_flops_are_those_of_the_built_model(config):
    """Each weight of a matrix product counts one multiply-add per token; scores and their sums count T + 1 keys."""
    twin = config.shrink(hidden=1, depth=1, experts=1, vocab=64, context=16, head_size=8)
    with torch.device("meta"):
        sizes = {name: p.shape for name, p in GPT(config).named_parameters()}
        assert sum(p.numel() for p in GPT(twin).parameters()) == twin.parameters()
    assert sum(shape.numel() for shape in sizes.values()) == config.parameters()
    used = config.vocab * config.hidden * config.decoder.tied
    for name, shape in sizes.items():
        if not any(kind in name for kind in ("norm", "bias", "smear", "embedding")):
            used += shape[1:].numel() * config.top_k if ".experts." in name else shape.numel()
    scores = config.layers * 2 * config.heads * config.head_size * (config.context + 1)
    assert config.flops_per_token(training=False) == 2 * used + scores


def test_more_experts_than_the_gate_takes_are_refused_when_the_model_is_built():
    config = replace(MODERN, experts=(0, 512, 513))
    assert config.parameters() > 0, "a simulation may have them"
    with torch.device("meta"), pytest.raises(ValueError, match=r"^model: a layer of 513 experts; the gate takes up to"):
        GPT(config)
    with torch.device("meta"):
        GPT(replace(config, experts=(0, 512, 512)))


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: replace(MODERN, decoder=DecoderConfig(kv_heads=3)), "3 key and value heads do not divide 4 heads"),
        (lambda: replace(MODERN, decoder=DecoderConfig.modern(head_size=7)), "size 7 must be even"),
        (lambda: replace(MODERN, residual=True), "shared experts need MoE layers without residual"),
        (lambda: replace(MODERN, experts=(0, 0, 0), top_k=1), "shared experts need MoE layers"),
        (lambda: replace(MODERN, routing=GUMBEL_SECOND, top_k=1), "top_k must be at least 2, got 1"),
        (lambda: ExpertConfig(shared_gate=True), "shared is 0"),
        (lambda: RoutingConfig(balance_rate=0.1, choice_noise="gumbel"), "use one of them"),
        (lambda: RoutingConfig(scores="tanh"), "scores must be one of"),
        (lambda: RoutingConfig(capacity_factor=math.inf), "finite (drop_tokens=False sets no limit), got inf and 1.0"),
        (lambda: RoutingConfig(capacity_factor_eval=math.nan), "positive and finite"),
        (lambda: RoutingConfig(aux_loss=math.nan), "aux_loss must be 0 or more and finite, got nan"),
        (lambda: RoutingConfig(aux_loss=math.inf), "aux_loss must be 0 or more and finite, got inf"),
        (lambda: RoutingConfig(z_loss=-1.0), "z_loss must be 0 or more and finite, got -1.0"),
        (lambda: DecoderConfig(norm="batch"), "norm must be one of"),
        (lambda: expert_pattern(4, 8, dense_first=4), "no MoE layer among 4"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(make, part):
    with pytest.raises(ValueError) as error:
        make()
    assert part in str(error.value) and "\n" not in str(error.value)
    assert expert_pattern(6, 8, dense_first=2, every=3) == (0, 0, 8, 0, 0, 8)
    assert expert_pattern(5, 8, dense_first=1) == (0, 8, 8, 8, 8)


def router_of(config: RoutingConfig, top_k=3, experts=6) -> Router:
    torch.manual_seed(0)
    router = Router(8, experts, top_k, config)
    torch.nn.init.normal_(router.weight)
    if router.balance_bias is not None:
        torch.nn.init.normal_(router.balance_bias, 0.0, 0.5)
    return router


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("rate", [0.0, 0.01])
def test_the_bias_chooses_and_the_scores_weigh(scores, rate, normalize):
    router = router_of(replace(FREE, scores=scores, balance_rate=rate, normalize_weights=normalize))
    x = torch.randn(67, 8, requires_grad=True)
    routing = router(x)
    logits = F.linear(x, router.weight)
    p = logits.softmax(1) if scores == "softmax" else logits.sigmoid()
    chosen = (p + (router.balance_bias if rate else 0)).topk(3).indices
    weight = p.gather(1, chosen)
    weight = weight / weight.sum(1, keepdim=True) if normalize else weight
    assert torch.equal(routing.expert_SK.long(), chosen)
    torch.testing.assert_close(routing.weight_SK, weight)
    along = torch.randn_like(weight)
    for ours, theirs in zip(
        torch.autograd.grad((routing.weight_SK * along).sum(), (x, router.weight), retain_graph=True),
        torch.autograd.grad((weight * along).sum(), (x, router.weight), retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not router.balance_bias.requires_grad if rate else router.balance_bias is None


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
@pytest.mark.parametrize("choices", ["first", "all"])
@pytest.mark.parametrize("scope", ["micro_batch", "sequence"])
def test_balance_losses_equal_their_formula(scores, choices, scope):
    router = router_of(replace(FREE, scores=scores, aux_choices=choices, aux_scope=scope))
    x = torch.randn(5, 13, 8)
    routing = router(x.flatten(0, 1), 5)
    logits = F.linear(x, router.weight)
    p = logits.softmax(-1) if scores == "softmax" else logits.sigmoid() / logits.sigmoid().sum(-1, keepdim=True)
    chosen = F.one_hot(routing.expert_SK.long(), 6).float().view(5, 13, 3, 6)
    share = (chosen[:, :, :1] if choices == "first" else chosen).mean(2)
    losses = [6 * (p[b].mean(0) * share[b].mean(0)).sum() for b in range(5)]
    if scope == "micro_batch":
        losses = [6 * (p.mean((0, 1)) * share.mean((0, 1))).sum()]
    torch.testing.assert_close(routing.aux_loss, torch.stack(losses).mean())
    routing.aux_loss.backward()
    assert router.weight.grad.abs().sum() > 0
    assert float(router(x.flatten(0, 1)[:0], 5).aux_loss.detach()) == 0


def test_the_bias_moves_against_the_load_until_it_is_even():
    router = router_of(replace(FREE, balance_rate=0.02), top_k=1)
    torch.nn.init.zeros_(router.balance_bias)
    x = torch.randn(500, 8) + 1
    router.balance(torch.tensor([5, 1, 0, 3, 3, 6]))
    assert router.balance_bias.tolist() == pytest.approx([-0.02, 0.02, 0.02, 0, 0, -0.02])
    torch.nn.init.zeros_(router.balance_bias)
    before = router(x).load_E
    for _ in range(100):
        router.balance(router(x).load_E)
    after = router(x).load_E
    assert after.max() < 1.3 * 500 / 6 < 1.7 * 500 / 6 < before.max()


def test_entropy_of_the_router():
    assert float(normalized_entropy(torch.full((4, 8), 1 / 8))) == pytest.approx(1)
    assert float(normalized_entropy(torch.eye(8))) == 0
    router, x = router_of(FREE), torch.randn(30, 8)
    router.entropies = []
    router(x)
    p = F.linear(x, router.weight).softmax(1).detach()
    assert float(router.entropies[0]) == pytest.approx(float(-(p * p.log()).sum(1).mean() / math.log(6)), rel=1e-5)


def plain_rms(x, norm):
    return x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight


def plain_attention(attention, x_BTM, config):
    """In torch's own words: norms, turned pairs as complex numbers, a key and value head for each query head."""
    d, D, (B, T, _) = config.decoder, config.head_size, x_BTM.shape
    q, k, v = attention.qkv(x_BTM).split([n * D for n in (config.heads, config.kv_heads, config.kv_heads)], -1)
    if d.qk_norm == "all":
        q, k = plain_rms(q, attention.q_norm), plain_rms(k, attention.k_norm)
    q, k, v = (t.view(B, T, -1, D).transpose(1, 2) for t in (q, k, v))
    if d.qk_norm == "head":
        q, k = plain_rms(q, attention.q_norm), plain_rms(k, attention.k_norm)
    if d.smeared_keys:
        share = attention.smear.sigmoid()[:, None]
        mixed = [k[:, :, 0], *((1 - share) * k[:, :, t] + share * k[:, :, t - 1] for t in range(1, T))]
        k = torch.stack(mixed, 2)
    angle = torch.arange(T)[:, None] * d.rotary_base ** (-torch.arange(0, D, 2) / D)
    pairs = (torch.complex(*t.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle) for t in (q, k))
    q, k = (torch.cat((pair.real, pair.imag), -1) for pair in pairs)
    k, v = (t.repeat_interleave(config.heads // config.kv_heads, 1) for t in (k, v))
    scores = (q @ k.mT / math.sqrt(D)).masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)
    return attention.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("name", ["modern", "head norm", "norm of all heads", "smeared keys", "qkv biases"])
def test_attention_equals_the_plain_one(name):
    config = VARIANTS[name]
    attention = build(config, 0).blocks[0].attention
    for p in attention.parameters():
        torch.nn.init.normal_(p, 0.0, 0.3)
    x = torch.randn(2, 13, config.hidden, generator=torch.Generator().manual_seed(1))
    rotation = rotation_at(torch.arange(13)[None], config.head_size, config.decoder.rotary_base)
    grads = []
    for forward in (lambda x: attention(x, None, rotation), lambda x: plain_attention(attention, x, config)):
        leaf = x.clone().requires_grad_()
        attention.zero_grad()
        y = forward(leaf)
        y.square().sum().backward()
        grads.append([y.detach(), leaf.grad, *(p.grad.clone() for p in attention.parameters())])
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_a_step_in_bf16_is_near_one_in_fp32(config):
    tokens = torch.randint(61, (2, 33), generator=torch.Generator().manual_seed(0))
    found = []
    for bf16 in (False, True):
        torch.manual_seed(4)
        model = build(config, 1)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output = model(tokens[:, :-1], targets_BT=tokens[:, 1:])
        (output.loss + output.routing_loss()).backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        found.append(float(output.loss.detach()))
    assert found[0] == pytest.approx(found[1], abs=0.05)


@pytest.mark.parametrize("config", [MODERN, ModelConfig.parse("350M+MoE-32 twin")], ids=["modern", "paper"])
def test_parameters_outside_the_embeddings_are_those_of_the_blocks_and_the_last_norm(config):
    sizes = {name: p.numel() for name, p in build(config, 0).named_parameters()}
    inside = sum(size for name, size in sizes.items() if name.startswith(("blocks.", "norm.")))
    assert config.non_embedding_parameters() == inside
    assert config.embedding_parameters() == sum(sizes.values()) - inside
    assert config.non_embedding_parameters(active=True) < inside


def test_a_residual_branch_that_is_added_is_a_shared_expert():
    """With the same initial weights, so that the arms of a comparison start alike."""
    added = ModelConfig.parse("350M+Residual-MoE-32 twin", residual_mix="sum")
    shared = ModelConfig.parse("350M+MoE-32 twin", expert=ExpertConfig(shared=1))
    assert added.active_parameters() == shared.active_parameters()
    one, other = (build(config, 3).eval() for config in (added, shared))
    weights, others = dict(one.named_parameters()), dict(other.named_parameters())
    assert weights.keys() == others.keys() and all(torch.equal(weights[n], others[n]) for n in weights)
    tokens = torch.randint(added.vocab, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(*(model(tokens, targets_BT=tokens).loss for model in (one, other)))
