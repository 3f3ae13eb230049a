"""Runs that start from another run's checkpoint: their numbers are those of a run that was trained from scratch."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from moelab.config import DecoderConfig, ExpertConfig, RoutingConfig, UpcycleConfig
from moelab.config.distill import DistillConfig
from moelab.config.parallel import ParallelConfig
from moelab.engine import checkpoint
from moelab.files import write_json
from moelab.lab import Lab
from moelab.models import build
from moelab.runs import dry_run, records
from moelab.runs.branching import shorter, starting_point, token_budgets
from moelab.runs.collection import NoResult
from moelab.runs.execute import execute
from moelab.runs.progress import Snapshot
from moelab.runs.spec import RunSpec, Start, closure
from moelab.runs.states import Status
from moelab.runs.store import Run, RunStore
from moelab.runs.supervisor import RunProcess
from moelab.training.loop import TrainingStopped
from moelab.training.metrics import TRAIN, VALIDATION, read_rows
from moelab.training.optimizer import make_optimizer
from tests.conftest import numbers, stop_after, until
from tests.runs.conftest import record

pytestmark = pytest.mark.slow

STEP = 4 * 32
"""Tokens of a step."""


@pytest.fixture
def trunk(tiny_spec) -> RunSpec:
    """24 steps, the last 6 of them decay."""
    return replace(tiny_spec, train=replace(tiny_spec.train, cooldown_tokens=6 * STEP), label="trunk")


@pytest.fixture
def short(trunk) -> RunSpec:
    """The same run of 14 steps, from scratch; it decays from step 10 on, between two metric rows."""
    return replace(trunk, train=replace(trunk.train, tokens=14 * STEP, cooldown_tokens=4 * STEP), label="short")


@pytest.fixture
def branch(trunk, short) -> RunSpec:
    return replace(short, start=Start(trunk, 10 * STEP))


def assert_same_from(step: int, run: Run, whole: Run) -> None:
    """Rows after `step`, result, last weights and optimizer state are equal, bit for bit."""
    found = numbers(run.path, after=step)
    assert found[TRAIN] and found[VALIDATION] and run.finished and found == numbers(whole.path, after=step)


def test_a_branch_is_the_run_from_scratch(trunk, short, branch):
    """In processes, which read of the checkpoint to be kept in the trunk's spec; in this process in the other tests."""
    whole, run, stem = Lab().run([short, branch, trunk], executor="processes", workers=2)
    assert_same_from(10, run, whole)
    assert "trained again" not in run.log_tail()
    assert min(row["step"] for row in read_rows(run.path / TRAIN)) == 12
    assert [row["step"] for row in read_rows(run.path / VALIDATION)] == [10, 14], "metrics begin at the branch"
    assert run.provenance["start"] == {"run": trunk.id, "tokens": 10 * STEP, "trained_again": False}
    kept = [path.name for path in sorted((stem.path / "checkpoints").iterdir())]
    assert kept == ["step-00000010", "step-00000020", "step-00000024"], "the branch point, and the newest two"
    assert not (run.path / "prefix").exists()
    assert 0 < run.own_seconds < run.result["seconds"], "the trunk's time counts once"
    assert stem.own_seconds == stem.result["seconds"]


@pytest.mark.parametrize("damaged", ["torn", "gone"])
def test_a_branch_does_not_need_the_metrics_of_its_trunk(damaged, trunk, short, branch):
    """The checkpoint is whole, and a branch's own metrics begin at the branch."""
    lab = Lab()
    (whole, stem) = lab.run([short, trunk.with_checkpoints([10 * STEP])], executor="inline")
    file = stem.path / TRAIN
    content = file.read_bytes()
    file.unlink() if damaged == "gone" else file.write_bytes(content[:40] + content[60:])
    (run,) = lab.run([branch], executor="inline")
    assert_same_from(10, run, whole)
    assert not run.provenance["start"]["trained_again"]
    assert file.exists() == (damaged == "torn"), "the trunk's files are left as they are"


@pytest.mark.parametrize("steps", [1, 3])
def test_a_stopped_branch_goes_on(steps, trunk, short, branch):
    lab = Lab()
    (whole, _) = lab.run([short, trunk.with_checkpoints([10 * STEP])], executor="inline")
    run = lab.store.run(branch)
    with pytest.raises(TrainingStopped, match=f"stopped at step {10 + steps} of 14"):
        execute(run, should_stop=stop_after(steps))
    execute(run)
    assert_same_from(10, run, whole)


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_killed_branch_goes_on(trunk, short):
    """Killed while the trunk is trained again, and after that."""
    trunk = replace(trunk, train=replace(trunk.train, tokens=60 * STEP))
    often = replace(short.train, tokens=50 * STEP, cooldown_tokens=20 * STEP, checkpoint_every=1)
    lab = Lab()
    (whole, _) = lab.run([replace(short, train=often), trunk], executor="inline")
    run = lab.store.run(replace(short, train=often, start=Start(trunk, 30 * STEP)))
    for folder, step in (("prefix/checkpoints", 10), ("checkpoints", 33), ("checkpoints", 40)):
        process = RunProcess(run)
        until(lambda: process.poll() is not None or (run.path / folder / f"step-{step:08d}").exists())  # noqa: B023
        process.kill()
        process.wait()
        assert not run.finished and (run.path / "checkpoints").exists() == (step > 30)
    execute(run)
    assert_same_from(30, run, whole)


def test_a_branch_that_is_asked_for_later_trains_the_trunk_again(trunk, short, branch, capsys):
    """From the nearest checkpoint, and going on after a stop."""
    lab = Lab()
    (whole, _) = lab.run([short, trunk.with_checkpoints([5 * STEP])], executor="inline")
    run = lab.store.run(branch)
    with pytest.raises(TrainingStopped):
        execute(run, should_stop=stop_after(2))
    said = capsys.readouterr().out
    assert f"the trunk {trunk.id} has kept no checkpoint after 1280 tokens" in said
    assert "from its step 5; on the kind of processor that trained it first" in said
    assert checkpoint.latest(run.path / "prefix" / "checkpoints").step == 7
    assert Snapshot.of([run]).done == 0, "steps of the trunk are not its own"
    execute(run)
    assert "from its step 7; on the kind" in capsys.readouterr().out
    assert_same_from(10, run, whole)
    assert run.provenance["start"]["trained_again"] and not (run.path / "prefix").exists()


def test_training_again_that_leaves_no_checkpoint_is_one_line(branch, tmp_path):
    """Initial weights in its place would change the branch's numbers."""
    with pytest.raises(ValueError, match=r"has left no whole checkpoint of step 10 in .*prefix; remove") as error:
        starting_point(branch, tmp_path / branch.id, tmp_path, lambda *_: None, print)
    assert "\n" not in str(error.value)


def test_a_trunk_that_the_layout_of_its_branch_does_not_fit_is_one_line(trunk, short, tmp_path):
    """Its loss needs one micro-batch per data rank, dropout allows data ranks only."""
    train = replace(short.train, micro_batch=2)
    routing = replace(trunk.model.routing, aux_scope="step")
    stem = replace(trunk, train=replace(trunk.train, micro_batch=2), model=replace(trunk.model, dropout=0.1))
    branch = replace(
        stem,
        model=replace(trunk.model, dropout=0.0, routing=routing),
        train=train,
        start=Start(stem, 10 * STEP),
        parallel=ParallelConfig(tensor=2, data=2),
    )
    with pytest.raises(ValueError, match=f"the trunk {stem.id} must .* layout of its branch does not fit: ") as error:
        starting_point(branch, tmp_path / branch.id, tmp_path, lambda *_: None, print)
    assert "\n" not in str(error.value)


def test_a_branch_of_an_imported_trunk(trunk, short, branch, tmp_path, theirs):
    lab = Lab()
    (whole, stem) = lab.run([short, trunk], executor="inline")
    archive = record(stem, tmp_path)
    shutil.rmtree(stem.path)
    assert records.read(archive, lab.store).finished
    (run,) = lab.run([branch], executor="inline")
    assert_same_from(10, run, whole)
    taken = records.read(record(run, tmp_path), theirs)
    assert taken.spec == branch and taken.spec.start.run == trunk and taken.provenance["start"]["trained_again"]


def test_a_branch_of_a_branch(trunk, short, branch, capsys):
    """Its trunk's checkpoint is gone, and so is that of the trunk's trunk."""
    grown = replace(trunk, train=replace(trunk.train, tokens=20 * STEP), start=Start(trunk, 8 * STEP))
    leaf = replace(short, start=Start(grown, 10 * STEP))
    assert [spec.id for spec in leaf.requires()] == [trunk.id, grown.id]
    lab = Lab()
    whole, run = lab.run([short, leaf], executor="inline")
    assert_same_from(10, run, whole)
    for spec in (trunk, grown):
        shutil.rmtree(lab.store.run(spec).path / "checkpoints")
    shutil.rmtree(run.path)
    (again,) = lab.run([leaf], executor="inline")
    assert_same_from(10, again, whole)
    assert "from its step 8; on the kind" in capsys.readouterr().out, "the trunk itself"


def test_staged_distillation_is_a_branch_of_the_distilled_student(tiny_spec):
    teacher = replace(tiny_spec, label="teacher")
    student = replace(tiny_spec, model=replace(tiny_spec.model, hidden=16), teacher=teacher, distill=DistillConfig())
    stopped = replace(student, distill=DistillConfig(schedule="stop", stop=16 * STEP))
    off = replace(student, distill=DistillConfig(schedule="off"), start=Start(student, 16 * STEP))
    alone = replace(off, teacher=None, distill=None)
    whole, *runs = Lab().run([stopped, off, alone], executor="inline")
    for run in runs:
        assert_same_from(16, run, whole)
    assert "distill_loss" in read_rows(runs[0].path / TRAIN)[0], "the row spans steps of the trunk"
    assert "distill_loss" not in read_rows(runs[0].path / TRAIN)[-1]


@pytest.fixture
def dense(trunk) -> RunSpec:
    return replace(trunk, model=replace(trunk.model, experts=(0, 0, 0, 0), residual=False))


@pytest.mark.parametrize(
    ("residual", "decoder"),
    [(False, DecoderConfig()), (True, DecoderConfig()), (False, DecoderConfig(feed_forward="swiglu", ffn=48))],
    ids=["plain", "residual", "gated"],
)
def test_a_dense_run_is_upcycled(residual, decoder, dense):
    """With normalised weights two equal experts are the dense feed-forward; the router breaks the tie from then on."""
    dense = replace(dense, model=replace(dense.model, decoder=decoder))
    routing = RoutingConfig(drop_tokens=False)
    model = replace(dense.model, experts=(0, 4, 0, 2), residual=residual, top_k=2, routing=routing)
    branch = replace(dense, model=model, start=Start(dense, 16 * STEP))
    stem, run = Lab().run([dense, branch], executor="inline")
    first = read_rows(run.path / VALIDATION)[0]
    before = next(row for row in read_rows(stem.path / VALIDATION) if row["step"] == 16)
    assert first["step"] == 16 and run.finished
    assert first["loss"] == pytest.approx(before["loss"], abs=1e-5)
    last = checkpoint.latest(run.path / "checkpoints")
    state = load_file(last.path / "optimizer-00000.safetensors")
    assert state["step/blocks.1.ffn.experts.up"] == 8 and state["step/blocks.0.ffn.up.weight"] == 24
    experts = load_file(last.path / "model-00000.safetensors")["blocks.1.ffn.experts.up"]
    assert not torch.equal(experts[0], experts[1]), "they learn apart"


def filled(trunk: RunSpec, branch: RunSpec):
    """Return the trunk's weights at the start, the branch's before its first step, and which of these have a state."""
    (stem,) = Lab().run([trunk.with_checkpoints([branch.start.tokens])], executor="inline")
    model = build(branch.model, branch.train.seed)
    found = checkpoint.latest(stem.path / "checkpoints", up_to=branch.first_step)
    optimizer = make_optimizer(model, branch.train)
    scores = branch.model.routing.scores
    checkpoint.load(found, model, optimizer, upcycle=branch.start.upcycle, seed=branch.train.seed, scores=scores)
    named = dict(model.named_parameters())
    before = load_file(stem.path / "checkpoints" / f"step-{branch.first_step:08d}" / "model-00000.safetensors")
    return before, named, {n for n, p in named.items() if p in optimizer.state}


def test_copies_have_noise_of_their_own(trunk, dense):
    """Of a share of the copied tensor's deviation, another for each expert; without it they are equal."""
    for noise in (0.0, 0.5):
        start = Start(dense, 16 * STEP, upcycle=UpcycleConfig(noise=noise, scale=2.0))
        before, after, _ = filled(dense, replace(dense, model=trunk.model, start=start))
        for part, factor in (("up", 1.0), ("down", 2.0)):
            source = before[f"blocks.1.ffn.{part}.weight"].T * factor
            moved = after[f"blocks.1.ffn.experts.{part}"].detach() - source
            assert moved.std().item() == pytest.approx(noise * source.std().item(), rel=0.1, abs=1e-7)
            assert torch.equal(moved[0], moved[1]) == (noise == 0)
        assert torch.equal(after["blocks.1.ffn.mlp.up.weight"], before["blocks.1.ffn.up.weight"]), "no copy"


@pytest.mark.parametrize("expert", [ExpertConfig(shared=1, shared_ffn=64), ExpertConfig(ffn=32)])
def test_a_feed_forward_of_another_size_is_not_copied(expert, trunk, dense):
    model = replace(trunk.model, residual=False, expert=expert)
    with pytest.raises(checkpoint.CheckpointError, match=r"a dense feed-forward of \(128, 32\) does not become"):
        filled(dense, replace(dense, model=model, start=Start(dense, 16 * STEP)))


BIAS = {"balance_rate": 1e-3, "aux_loss": 0.0}


@pytest.mark.parametrize("rules", [{}, BIAS, {**BIAS, "scores": "sigmoid"}], ids=["no bias", "softmax", "sigmoid"])
def test_an_moe_grows_its_experts(rules, trunk):
    """The first experts stay, the others are copies with noise; with scaled outputs the loss stays within the noise."""
    model = replace(
        trunk.model, experts=(0, 4, 0, 2), residual=False, routing=RoutingConfig(drop_tokens=False, **rules)
    )
    few = replace(trunk, model=model)
    shared = 1.0 if "scores" in rules else 3.0  # of softmax scores, which experts divide, copies have a third
    start = Start(few, 16 * STEP, upcycle=UpcycleConfig(noise=1e-3, scale=shared))
    grown = replace(few, model=replace(model, experts=(0, 12, 0, 6)), start=start)
    before, after, kept_state = filled(few, grown)
    biases = ["router.balance_bias"] if rules else []
    for part in ("router.weight", "experts.up", "experts.up_bias", "experts.down", *biases):
        old, new = before[f"blocks.1.ffn.{part}"], after[f"blocks.1.ffn.{part}"].detach()
        old = old * {"experts.down": shared, "router.balance_bias": 1 / shared}.get(part, 1.0)
        assert torch.equal(new[:4], old)
        assert torch.allclose(new[4:8], old, atol=0.02 * old.std().item() + 1e-9)
        noisy = part != "router.balance_bias" and bool(old.any())
        assert torch.equal(new[4:8], old) != noisy, part
        assert f"blocks.1.ffn.{part}" not in kept_state
    assert {"blocks.1.attention.out.weight", "blocks.0.ffn.up.weight"} <= kept_state
    stem, run = Lab().run([few, grown], executor="inline")
    first = read_rows(run.path / VALIDATION)[0]
    there = next(row for row in read_rows(stem.path / VALIDATION) if row["step"] == 16)
    assert first["step"] == 16 and first["loss"] == pytest.approx(there["loss"], abs=2e-3) and run.finished
    loads = [row["expert_load"] for row in read_rows(run.path / TRAIN)]
    for layer, few_experts, many in (("2", 4, 12), ("4", 2, 6)):
        load = [sum(row[layer][i] for row in loads) for i in range(many)]
        assert len(loads[0][layer]) == many
        assert sum(load[few_experts:]) > sum(load) / 3, "copies take their part of the tokens"


def test_the_rate_of_a_branch_rises_again(trunk, branch):
    again = replace(branch, start=replace(branch.start, warmup_tokens=4 * STEP))
    assert again.id != branch.id
    run, plain = Lab().run([again, branch], executor="inline")
    rows, others = read_rows(run.path / TRAIN), read_rows(plain.path / TRAIN)
    assert rows[0]["step"] == 12 and rows[0]["lr"] == pytest.approx(others[0]["lr"] * 0.5)
    assert rows[-1]["lr"] == others[-1]["lr"]


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize(
    ("few", "layout"), [(0, ParallelConfig(data=2, expert_slicing=2)), (2, ParallelConfig(data=2, shard=True))]
)
def test_upcycling_on_ranks_is_that_of_one_process(few, layout, trunk, theirs):
    """Noise belongs to the expert, not to the rank: of a dense layer, and of one that grows from two experts."""
    trunk = replace(trunk, train=replace(trunk.train, micro_batch=2))
    stem = replace(trunk, model=replace(trunk.model, experts=(0, few, 0, few), residual=bool(few)))
    start = Start(stem, 16 * STEP, upcycle=UpcycleConfig(noise=0.3, scale=1.5))
    branch = replace(trunk, model=replace(trunk.model, experts=(0, 4, 0, 8)), start=start)
    lab = Lab()
    one = lab.run([branch], executor="inline")[0]
    trained = lab.store.run(start.run).path
    shutil.copytree(trained, theirs.root / trained.name)  # the ranks go on from the checkpoint of one process
    run = Lab(theirs).run([replace(branch, parallel=layout)])[0]
    assert "trained again" not in run.log_tail(40)
    rows, expected = read_rows(run.path / VALIDATION), read_rows(one.path / VALIDATION)
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], abs=1e-4)


def test_a_model_that_does_not_fit_is_one_line(trunk, branch):
    other = replace(branch, model=replace(trunk.model, residual=False))
    lab = Lab()
    with pytest.raises(NoResult, match=r"1 of 1 runs: .*differing parameters"):
        lab.run([other], executor="inline")
    run = lab.store.run(other)
    assert run.status.state == "failed" and "\n" not in run.status.reason
    assert "differing parameters: blocks.1.ffn." in run.status.reason and trunk.id in run.status.reason


def test_rows_begin_anew_where_the_trunks_do_not_fit(trunk, branch):
    """Other rows and other routing: the trunk's sums since its last row are no part of the branch's first one."""
    other = replace(branch, train=replace(branch.train, log_every=4), model=replace(trunk.model, top_k=2))
    (run,) = Lab().run([other], executor="inline")
    assert [row["step"] for row in read_rows(run.path / TRAIN)] == [12, 14]


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_branch_on_ranks(dense, short):
    """Two data ranks go on from a trunk of one, whose checkpoint is there or is trained again by both.

    Dense, because the rounding of two ranks may send a token to another expert.
    """
    trunk, short = (replace(s, model=dense.model, train=replace(s.train, micro_batch=2)) for s in (dense, short))
    branch = replace(short, start=Start(trunk, 10 * STEP), parallel=ParallelConfig(data=2))
    lab = Lab()
    whole, run = lab.run([short, branch], executor="inline")
    loss = whole.result["validation_loss"]
    assert run.result["validation_loss"] == pytest.approx(loss, abs=1e-5) and "trained again" not in run.log_tail(40)
    shutil.rmtree(run.path)
    shutil.rmtree(lab.store.run(trunk).path / "checkpoints")
    (run,) = lab.run([branch], executor="inline")
    assert run.result["validation_loss"] == pytest.approx(loss, abs=1e-5)
    assert run.log_tail(40).count("trained again up to there, from initial weights") == 1
    assert run.provenance["start"]["trained_again"]


def test_identity_and_json(trunk, branch):
    assert RunSpec.from_json(json.loads(json.dumps(branch.to_json()))) == branch
    assert trunk.with_checkpoints([STEP]).id == trunk.id and trunk.with_checkpoints([STEP]) == trunk
    named = replace(branch, start=Start(replace(trunk.with_checkpoints([STEP]), label="x"), 10 * STEP))
    assert named.id == branch.id and named == branch
    assert len({branch.id, replace(branch, start=None).id, replace(branch, start=Start(trunk, 9 * STEP)).id}) == 3
    old = trunk.to_json()
    del old["start"], old["train"]["keep_at"]
    assert RunSpec.from_json(old) == trunk
    earlier = branch.to_json()
    del earlier["start"]["upcycle"], earlier["start"]["warmup_tokens"]
    assert RunSpec.from_json(earlier) == branch
    more = replace(trunk.model, experts=(0, 4, 0, 8))
    starts = [replace(branch.start, upcycle=UpcycleConfig(noise)) for noise in (0.1, 0.2)]
    noisy = [replace(branch, model=more, start=start) for start in starts]
    assert len({spec.id for spec in noisy}) == 2 and RunSpec.from_json(noisy[0].to_json()) == noisy[0]


def test_what_a_branch_requires_and_costs(trunk, branch):
    other = replace(branch, start=Start(trunk, 8 * STEP))
    found = closure([branch, other, replace(trunk, label="asked for")])
    assert list(found) == [trunk.id, branch.id, other.id]
    assert found[trunk.id].train.keep_at == (8 * STEP, 10 * STEP) and found[trunk.id].label == "asked for"
    assert [spec.depth for spec in found.values()] == [0, 1, 1]
    assert branch.cost * 24 == trunk.cost * 4
    rows = dry_run.planned_runs([branch])
    assert [(row.spec.id, row.steps) for row in rows] == [(trunk.id, 24), (branch.id, 4)]
    store = RunStore()
    assert not store.root.exists(), "a dry run writes nothing"
    run = store.run(branch)
    run.set_status(Status("stopped", step=12, steps=14))
    assert Snapshot.of([run]).done == 0.5


def test_a_dry_run_tells_of_a_trunk_that_is_trained_again(trunk, branch, result):
    run = RunStore().run(trunk)
    write_json(run.path / "result.json", result(seconds=24 * 60.0))
    write_json(run.path / "holder.json", {})
    rows = dry_run.planned_runs([branch])
    assert rows[-1].again == pytest.approx(10 / 4 * branch.cost)
    took, again = dry_run.on_this_machine(rows)
    assert took.startswith("about 14 minutes") and again.startswith("1 of these train their trunk again first")
    (run.path / "checkpoints" / "step-00000010").mkdir(parents=True)
    (took,) = dry_run.on_this_machine(dry_run.planned_runs([branch]))
    assert took.startswith("about 4 minutes")


@pytest.mark.parametrize(
    ("own", "start", "part"),
    [
        ({}, {"tokens": 10 * STEP + 1}, "start.tokens must be a multiple of a step's 128 tokens and above 0, got 1281"),
        ({}, {"tokens": 0}, "above 0, got 0; nearest: 128 and 256"),
        ({"train": {"tokens": 40 * STEP}}, {"tokens": 25 * STEP}, "start.tokens must be above 0 and at most 3072"),
        ({}, {"tokens": 14 * STEP}, "leave nothing of 1792 tokens to train"),
        ({"train": {"tokens": 30 * STEP}}, {"tokens": 20 * STEP}, "are in the decay of tiny-s0"),
        ({"train": {"seed": 1}}, {}, "train.seed of a branch must be the trunk's, got 1 and 0: its steps go on"),
        ({"train": {"batch_size": 2}}, {}, "train.batch_size of a branch must be the trunk's"),
        ({"train": {"micro_batch": 2}}, {}, "train.micro_batch of a branch"),
        ({"train": {"threads": 2}}, {}, "train.threads of a branch must be the trunk's, got 2 and 1: its numbers"),
        ({"train": {"dtype": "bf16"}}, {}, "train.dtype of a branch"),
        ({"train": {"keep_at": (5,)}}, {}, "train.keep_at must be a multiple of a step's 128 tokens"),
        ({"data": {"max_bytes": 1000}}, {}, "data differ"),
        ({}, {"warmup_tokens": 9 * STEP}, "start.warmup_tokens must be between 0 and the branch's own 512"),
        ({}, {"upcycle": UpcycleConfig(noise=0.1)}, "no layer has more of them than in"),
        (
            {"model": {"experts": (0, 12, 0, 2)}},
            {},
            "a layer grows from 4 to 12 experts; allowed are multiples of 4, with",
        ),
        ({"model": {"experts": (0, 6, 0, 2)}}, {"upcycle": UpcycleConfig(noise=0.1)}, "grows from 4 to 6 experts"),
    ],
)
def test_branches_that_cannot_be_are_refused(own, start, part, trunk, short):
    model = replace(trunk.model, experts=(0, 4, 0, 2))
    trunk, branch = replace(trunk, model=model), replace(short, model=model)
    changed = {name: replace(getattr(branch, name), **fields) for name, fields in own.items()}
    with pytest.raises(ValueError) as error:
        replace(branch, **changed, start=Start(trunk, **{"tokens": 10 * STEP, **start}))
    assert str(error.value).startswith("spec: ") and part in str(error.value) and "\n" not in str(error.value)


def test_schedule_and_trunk_are_checked(trunk, short):
    late = replace(trunk, model=replace(trunk.model, dropout=0.0), start=Start(trunk, 20 * STEP))
    assert late.first_step == 20, "within the decay, with the same schedule"
    cosine = replace(trunk, train=replace(trunk.train, cooldown_tokens=0))
    with pytest.raises(ValueError, match=r"in the decay of .* which begins at 256"):
        replace(short, start=Start(cosine, 10 * STEP))
    with pytest.raises(ValueError, match="must be above 2560"):
        replace(short, start=Start(late, 10 * STEP))


def test_token_budgets(trunk):
    runs = token_budgets(trunk, [8 * STEP, 12 * STEP + 5, trunk.train.tokens])
    assert runs[-1] == trunk
    assert [(r.start.tokens, r.train.tokens, r.train.cooldown_tokens) for r in runs[:2]] == [
        (6 * STEP, 8 * STEP, 2 * STEP),
        (9 * STEP, 12 * STEP, 3 * STEP),
    ]
    assert all(run.model == trunk.model and run.train.lr == trunk.train.lr for run in runs)
    with pytest.raises(ValueError, match=r"needs train\.cooldown_tokens"):
        token_budgets(replace(trunk, train=replace(trunk.train, cooldown_tokens=0)), [STEP])
    for budget in (2 * STEP, 30 * STEP):
        with pytest.raises(ValueError, match="is constant from 256 to 2304"):
            token_budgets(trunk, [budget])


def test_a_shorter_run_whose_decay_begins_in_the_warm_up_begins_anew(trunk):
    """In whole steps; in tokens the warm-up ends just before."""
    train = replace(trunk.train, tokens=8000 * STEP, cooldown_tokens=1600 * STEP, warmup_tokens=50_200)
    trunk = replace(trunk, train=train)
    with pytest.raises(ValueError, match="decays from 50176 on"):
        token_budgets(trunk, [62_760])
    own = shorter(trunk, 62_760)
    assert own.start is None and own.train.tokens == 62_760
    assert shorter(trunk, 64_000).start is not None


def test_a_shorter_run_of_a_cosine_that_ends_early_keeps_its_share(trunk):
    train = replace(
        trunk.train, tokens=1000 * STEP, warmup_tokens=10 * STEP, cooldown_tokens=0, decay_tokens=800 * STEP
    )
    own = shorter(replace(trunk, train=train), 500 * STEP).train
    assert (own.warmup_tokens, own.decay_tokens, own.cooldown_tokens) == (5 * STEP, 400 * STEP, 0)
