"""The terms that today's systems need, each beside a count by hand."""

from dataclasses import replace

import numpy as np
import pytest

from moelab import simulate
from moelab.config import DecoderConfig, ExpertConfig, ModelConfig
from moelab.config.parallel import ParallelConfig
from moelab.config.routing import RoutingConfig
from moelab.simulate import serving, traffic
from moelab.simulate.attention import LatentModel, cache_slices, cached_numbers, output_weights, pair_flops
from moelab.simulate.constants import MODERN_FREE, MODERN_START, modern
from moelab.simulate.decoding import decode_sweep
from moelab.simulate.layouts import Layouts
from moelab.simulate.published import MODELS, named
from moelab.simulate.search import describe
from moelab.simulate.step import expert_row_bytes
from moelab.simulate.systems import System, system
from tests.simulate.toy import ROUND, TOY

BARE = System("bare", 2, 1, 1, 1, 1, 1, 1, 0, 1, 1, "flat", 0, grouped=True, graph=True, modern=True)
DROPLESS = RoutingConfig(drop_tokens=False)
LATENT = LatentModel(
    layers=2, hidden=64, heads=4, experts=(0, 8), top_k=2, vocab=64, routing=DROPLESS,
    decoder=DecoderConfig.modern(ffn=128, head_size=8), expert=ExpertConfig(ffn=16, shared=1),
    query_rank=32, latent=16, rotated=4, value_size=8,
)  # fmt: skip


def test_latent_attention_by_hand():
    queries = 64 * 32 + 32 * 4 * (8 + 4)
    keys = 64 * (16 + 4) + 16 * 4 * (8 + 8)
    assert LATENT.attention_weights == queries + keys + 4 * 8 * 64 and output_weights(LATENT) == 2048
    assert cached_numbers(LATENT) == 20 and cache_slices(LATENT, np.array([8]))[0] == 1
    assert pair_flops(LATENT, decoding=True) == 2 * 4 * (16 + 4 + 16)  # scores with latent and key, sum of latents
    assert pair_flops(LATENT, decoding=False) == 2 * 4 * (8 + 4 + 8)
    grouped = ModelConfig(layers=1, hidden=64, heads=8, decoder=DecoderConfig.modern(kv_heads=2))
    assert cached_numbers(grouped) == 2 * 2 * 8 and cache_slices(grouped, np.array([1, 2, 8])).tolist() == [1, 2, 2]
    assert pair_flops(grouped, decoding=True) == 4 * 64
    # A row of an expert, M 64, F 16, gated, bf16: in and out of order 4 x 64 each, products read 2 x 64 and 2 x 16.
    assert expert_row_bytes(LATENT, 2) == 4 * 64 + 2 * 64 + 2 * 32 + (2 * 32 + 2 * 16) + (2 * 16 + 2 * 64) + 4 * 64


def test_published_shapes_have_their_sizes():
    """Total and active parameters in billions as the models' cards state them."""
    sizes = {"mixtral-8x7b": (46.7, 12.9), "mixtral-8x22b": (141, 39), "dbrx": (132, 36), "qwen3-30b": (30.5, 3.3),
             "qwen3-235b": (235, 22), "deepseek-v3": (671, 37)}  # fmt: skip
    for name, (total, active) in sizes.items():
        assert named(name).parameters() / 1e9 == pytest.approx(total, rel=0.01)
        assert named(name).active_parameters() / 1e9 == pytest.approx(active, rel=0.03)
    assert set(sizes) == set(MODELS)
    assert named("dbrx") is MODELS["dbrx"] is named(MODELS["dbrx"]) and str(named("350M")) == "350M"
    layout = ParallelConfig(tensor=2, gpus_per_node=2)
    one = simulate.decode("mixtral-8x7b", layout, "h100", program="engine-tp", batch=1)
    assert one.model == "Mixtral-8x7B" and one.fits


def test_eight_ranks_copy_the_four_key_value_heads_of_qwen3():
    four, eight = ParallelConfig(tensor=4), ParallelConfig(tensor=8)
    caches = {
        simulate.decode("qwen3-30b", p, "h100", program=program).memory_gib["cache"]
        for p, program in ((four, "engine-tp"), (eight, "engine-tp"), (eight, "engine"))
    }
    assert len(caches) == 1, "a rank keeps one head"
    with pytest.raises(ValueError, match="tensor 8 does not divide the model's 4 key-value heads"):
        simulate.decode("qwen3-30b", eight, "h100", program="moelab")
    found = simulate.plan("qwen3-30b", 8, "h100", program="engine-tp", batches=(1,))
    assert found.considered == 4, "tensor slicing alone, over 1, 2, 4 and 8"
    assert describe(found.best) == "4 GPUs, tensor 4 x data 1, 1 sequence a tensor group"
    assert simulate.plan("qwen3-30b", 8, "h100", program="engine", batches=(64,)).best.parallel.tensor == 8


def test_a_row_for_each_node_each_gpu_and_each_choice():
    """8 ranks in nodes of 2, 100 tokens, 2 choices in 2 of the 4 nodes: 2 (1 - 1/4) = 1.5 nodes, 4 (1 - 9/16) GPUs."""
    stage, nodes, gpus = traffic.grouped(8, 2, 100, 2, 2)
    assert nodes == pytest.approx(150) and gpus == pytest.approx(175)
    assert stage.far_rows[0] == pytest.approx(150 * 3 / 4) and stage.near_rows[0] == pytest.approx(175 / 2)
    alone, nodes, gpus = traffic.grouped(1, 1, 100, 2, 1)
    assert not alone.happens[0] and (nodes, gpus) == (100, 100)
    stage, by_card = (traffic.pairs(8, 2, 100, 2, by_card=by_card) for by_card in (False, True))
    assert (stage.near_messages[0], stage.far_messages[0]) == (1, 6)
    assert stage.near_rows[0] == pytest.approx(200 / 8) and stage.far_rows[0] == pytest.approx(200 * 6 / 8)
    assert by_card.near_rows[0] == 0 and by_card.far_rows[0] == pytest.approx(200 * 7 / 8)


def test_links_that_work_at_the_same_time():
    """Near 1 + 1000 / 1e4 us, far 2 x 4 + 2000 / 1e3: one after the other, or the longer; and what packing adds."""
    stage = traffic.even(4, 2, 4.0)
    near, far = 1 + 1 * 1000 / 1e4, 2 * 4 + 2 * 1000 / 1e3
    assert stage.microseconds(1000, TOY, ROUND)[0] == pytest.approx(10 + near + far)
    together = replace(ROUND, links_overlap=True, exchange_us=5.0)
    assert stage.microseconds(1000, TOY, together)[0] == pytest.approx(15 + far)


def step(model=LATENT, parallel=None, program=BARE, where=TOY, **settings):
    """A decoding step of one layout, whose every number is an array of one."""
    settings = {"context": 10, "dtype": "bf16", "constants": ROUND, **settings}
    return decode_sweep(model, Layouts([parallel or ParallelConfig()]), where, program=program, **settings)


def test_a_latent_step_by_hand():
    """Batch 2, cache 100, fp8: weights of 1 byte, cache of 2, read at 10,000 bytes a microsecond."""
    model = replace(LATENT, layers=1, experts=(0,), expert=ExpertConfig())
    got = step(model, batch=2, context=100, dtype="fp8", constants=replace(ROUND, product_us=0.5))
    pairs = 2 * 100
    cache = max(pairs * 20 * 2 / 1e4, pairs * pair_flops(model, decoding=True) / 0.5e6)
    assert got.parts_ms["attention"][0] * 1e3 == pytest.approx(2 * 0.5 + model.attention_weights / 1e4 + cache)
    assert got.memory["cache"][0] == 2 * 100 * 20 * 2 and got.memory["weights"][0] == model.parameters()


def test_experts_sliced_over_a_tensor_group():
    """2 slices, 3 tokens of 2 choices: 8 (1 - (6/8)^3) experts of half the weights are read; no all-to-all."""
    model = replace(LATENT, experts=(0, 8), expert=ExpertConfig(ffn=16))
    got = step(model, ParallelConfig(tensor=2, gpus_per_node=2), replace(BARE, sliced=True), batch=3)
    read, weights = 8 * (1 - (6 / 8) ** 3), model.expert_feed_forward.weights / 2
    assert got.parts_ms["experts"][0] * 1e3 == pytest.approx(read * weights * 2 / 1e4)
    assert got.parts_ms["all_to_all"][0] == 0
    assert got.memory["experts"][0] == 8 * model.expert_feed_forward.parameters * 2 / 2


def test_fused_attention_keeps_no_scores():
    """2 layers of 64 tokens: the paper's program keeps 5 heads bytes more for each pair of a token and its context."""
    model, one = ModelConfig(layers=2, hidden=32, heads=4, vocab=64, context=16), ParallelConfig()
    kept = {
        program: simulate.training(model, one, TOY, batch=4, micro_batch=4, program=program).memory_gib["activations"]
        for program in ("pytorch", "megatron")
    }
    assert (kept["pytorch"] - kept["megatron"]) * 2**30 == pytest.approx(2 * 64 * 5 * 4 * 16)


def test_a_pipeline_idles_for_its_stages_and_overlap_hides_an_exchange_behind_products():
    """8 rounds over 2 stages of 2 chunks: (8 + 1/2) / 2 of a round of all layers, without overlap."""
    settings = {"batch": 8, "micro_batch": 1, "program": "megatron", "constants": ROUND}
    model, parallel = replace(LATENT, context=16), ParallelConfig(expert=1)
    one = simulate.training(model, parallel, TOY, overlap=False, **settings).parts_s
    two = simulate.training(model, parallel, TOY, overlap=False, pipeline=2, chunks=2, **settings).parts_s
    assert two["products"] / one["products"] == pytest.approx(8.5 / 2 / 8)
    assert two["optimizer"] == pytest.approx(one["optimizer"] / 2)
    with pytest.raises(ValueError, match="knows no pipeline"):
        simulate.training(model, parallel, TOY, batch=8, pipeline=2, program="pytorch")
    ranks = ParallelConfig(data=4, expert=4, gpus_per_node=2)
    shown, hidden = (simulate.training(model, ranks, TOY, overlap=o, **settings).parts_s for o in (False, True))
    assert shown["all_to_all"] > shown["products"]
    assert hidden["all_to_all"] == pytest.approx(shown["all_to_all"] - shown["products"])


def test_a_prefill_by_hand():
    """One dense layer, 8 tokens of prompts of 4: products with every token, the head with 2, scores of 2.5 pairs."""
    decoder, layouts = DecoderConfig.modern(ffn=128), Layouts([ParallelConfig()])
    model = ModelConfig(layers=1, hidden=64, heads=4, vocab=128, decoder=decoder, routing=DROPLESS)
    known = replace(ROUND, memory_share=1.0, counted_share=0.5)
    got = serving.prefill_s(model, layouts, TOY, BARE, tokens=8, prompt=4, dtype="bf16", constants=known)
    flops = 2 * (8 * (4 * 64 * 64 + 3 * 64 * 128) + 2 * 128 * 64) + 8 * 4 * 64 * 2.5
    products = max(flops / 0.5e6 / 0.5, model.parameters() * 2 / 2e4)
    elementwise = 2 * 8 * 64 * 34 / 2e4 / 0.5
    assert got * 1e6 == pytest.approx(products + elementwise)


def test_a_request_is_a_prefill_and_steps():
    layouts, settings = Layouts([ParallelConfig()]), {"dtype": "bf16", "constants": ROUND}
    got = serving.request_s(LATENT, layouts, TOY, BARE, batch=2, prompt=8, output=5, **settings)
    first = serving.prefill_s(LATENT, layouts, TOY, BARE, tokens=16, prompt=8, **settings)
    assert got == pytest.approx(first + 4 * step(batch=2).latency_ms[0] / 1e3)
    half = step(parallel=ParallelConfig(data=4, expert=4, gpus_per_node=2), batch=4)
    exchange = half.parts_ms["all_to_all"][0]
    assert serving.two_halves_ms(half)[0] == pytest.approx(2 * max(exchange, half.latency_ms[0] - exchange))
    with_it = step(program=replace(BARE, scheduler=True), batch=1, constants=replace(ROUND, step_us=700.0))
    assert with_it.latency_ms[0] - step(batch=1).latency_ms[0] == pytest.approx(0.7), "a scheduler adds its time"


def test_full_load_fills_the_memory():
    where = replace(TOY, gpu=replace(TOY.gpu, memory_gib=0.01))
    layouts, settings = Layouts([ParallelConfig()]), {"dtype": "bf16", "constants": ROUND}
    batch, rate = serving.full_load(LATENT, layouts, where, BARE, prompt=100, output=50, **settings)
    fits = [bool(step(where=where, batch=b, context=125).fits[0]) for b in (batch, batch + 1)]
    assert fits == [True, False] and rate > 0
    sizes, context = {"prompt": 100, "output": 50, **settings}, {"context": 125, "batch": 1}
    one = next(
        w
        for w in (replace(where, gpu=replace(where.gpu, memory_gib=1e-5 * 1.02**i)) for i in range(500))
        if step(where=w, **context).fits[0]
    )
    alone = serving.full_load(LATENT, layouts, one, BARE, **sizes)
    seconds = serving.request_s(LATENT, layouts, one, BARE, batch=1, **sizes)
    assert alone == (1, pytest.approx(50 / seconds)), "with room for one sequence, requests follow each other"
    small = replace(where, gpu=replace(where.gpu, memory_gib=1e-5))
    with pytest.raises(ValueError, match=r"does not fit toy with one sequence of 125 tokens$"):
        serving.full_load(LATENT, layouts, small, BARE, prompt=100, output=50, **settings)


def test_todays_programs_take_todays_constants():
    assert modern() == MODERN_START.with_free({n: getattr(modern(), n) for free in MODERN_FREE.values() for n in free})
    for free in MODERN_FREE.values():
        for name, (low, high, reason) in free.items():
            assert low <= getattr(modern(), name) <= high and reason
    step = simulate.decode("1.3B+MoE-128", ParallelConfig(data=8), "h100", program="engine", batch=8)
    slower = simulate.decode("1.3B+MoE-128", ParallelConfig(data=8), "h100", program="deepspeed", batch=8)
    assert step.latency_ms < slower.latency_ms
    assert system("engine-tp").sliced and not system("deepspeed").modern
