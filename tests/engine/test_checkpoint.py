"""Checkpoints of N ranks: any layout loads any other bit for bit; broken ones are found, failed writes told."""

import functools
import json
import os
import re
import resource
import shutil
import signal
import threading
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.tensor import DTensor, distribute_tensor

from moelab.config import ModelConfig
from moelab.config.parallel import ParallelConfig
from moelab.engine import checkpoint, parallel
from moelab.engine.checkpoint import format, loading, storage
from moelab.engine.checkpoint.format import CheckpointError
from moelab.engine.groups import Group
from moelab.engine.mesh import Mesh
from moelab.engine.tensor_slicing import ColumnLinear
from moelab.engine.testing import RankError

MODEL = ModelConfig(
    layers=3, hidden=16, heads=2, experts=(0, 4, 8), residual=True, vocab=37, context=8, init_std=0.02, name="tiny"
)
LAYOUTS = [
    ParallelConfig(),
    ParallelConfig(data=2, expert=1, shard=True),
    ParallelConfig(data=2, expert=2),
    ParallelConfig(tensor=2, expert=1),
    ParallelConfig(data=4, expert=1),
    ParallelConfig(data=4, expert=4, shard=True),
    ParallelConfig(data=4, expert=2, expert_slicing=2),
    ParallelConfig(data=2, tensor=2, expert=2),
    ParallelConfig(data=8, expert=2, shard=True),
    ParallelConfig(data=8, expert=4, expert_slicing=2),
    ParallelConfig(data=8, expert=8),  # the pyramid's layers at EP 4 and 8
    ParallelConfig(data=4, tensor=2, expert=4, expert_slicing=2),
]


@functools.cache
def truth(name, shape):
    """The whole tensor of a name: what every layout must agree on."""
    draw = torch.Generator().manual_seed(sum(ord(c) * 31**i for i, c in enumerate(name)) % 2**31)
    return torch.randn(shape, generator=draw)


def local_truth(name, tensor, placement):
    """This rank's part of it, cut here and not by the code under test."""
    whole = truth(name, placement.shape)
    if isinstance(tensor, DTensor):
        return distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
    mine = torch.full(tensor.shape, float("nan"))
    for shard in placement.shards:
        there = tuple(slice(a, a + n) for a, n in zip(shard.local_offset, shard.size, strict=True))
        mine[there] = whole[tuple(slice(a, a + n) for a, n in zip(shard.offset, shard.size, strict=True))]
    return mine


def local(tensor):
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor.detach()


def build(layout):
    built = parallel.build(MODEL, 0, Mesh(layout, MODEL.experts))
    optimizer = torch.optim.AdamW(built.module.parameters())
    return built, optimizer


def filled(layout):
    """A model and optimizer that hold the truth, after 7 steps."""
    built, optimizer = build(layout)
    with torch.no_grad():
        for name, p in built.module.named_parameters():
            local(p).copy_(local_truth(name, p, built.placements[name]))
            optimizer.state[p] = {"step": torch.tensor(7.0), "exp_avg": None, "exp_avg_sq": None}
            for key in ("exp_avg", "exp_avg_sq"):
                value = optimizer.state[p][key] = torch.zeros_like(p, requires_grad=False)
                local(value).copy_(local_truth(key + name, p, built.placements[name]))
    return built, optimizer


def differences(built, optimizer):
    """Names of what is not the truth."""
    found = []
    for name, p in built.module.named_parameters():
        placement, state = built.placements[name], optimizer.state[p]
        if not torch.equal(local(p), local_truth(name, p, placement)):
            found.append(name)
        found += [
            f"{key} of {name}"
            for key in ("exp_avg", "exp_avg_sq")
            if not torch.equal(local(state[key]), local_truth(key + name, p, placement))
        ]
        if not torch.equal(state["step"], torch.tensor(7.0)):
            found.append(f"step of {name}")
    return found


def write(root, steps, layout=LAYOUTS[0], keep=2):
    """Checkpoints of a model that holds the truth; each has its step as its state."""
    built, optimizer = filled(layout)
    with checkpoint.Writer(root, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, built.module, optimizer, {"at": step}, built.placements)
    built.mesh.close()


def write_at(layouts, root):
    for i, layout in layouts.items():
        write(root / str(i), [7], layout)


def load_at(layouts, sources, root):
    """(layout, source, differences), and how much was read beside how much there is to fill."""
    read, read_part = 0, storage._read_part

    def counted(*args):
        nonlocal read
        part = read_part(*args)
        read += part.numel()
        return part

    patch = pytest.MonkeyPatch()
    patch.setattr(storage, "_read_part", counted)
    wrong, needed = [], 0
    for i, layout in layouts.items():
        built, optimizer = build(layout)
        parts = [local(p).numel() for p in built.module.parameters()]
        for source in sources:
            last = checkpoint.latest(root / str(source))
            assert last.state == {"at": 7} and last.step == 7
            with torch.no_grad():
                for p in built.module.parameters():
                    local(p).fill_(float("nan"))
            checkpoint.load(last, built.module, optimizer, built.placements)
            wrong += [(i, source, name) for name in differences(built, optimizer)]
            needed += sum(parts) * 3 + len(parts)
        built.mesh.close()
    patch.undo()
    return wrong, read, needed


@pytest.fixture(scope="module")
def pools(on_ranks):
    """size -> run a function on so many ranks; on one, here."""
    return lambda size, function, *args: on_ranks(size, function, *args) if size > 1 else [function(*args)]


@pytest.fixture(scope="module")
def saved(pools, tmp_path_factory):
    """A checkpoint of every layout: the folder, and size -> {index: layout}."""
    root = tmp_path_factory.mktemp("checkpoints")
    sizes = {n: {i: x for i, x in enumerate(LAYOUTS) if x.ranks == n} for n in (1, 2, 4, 8)}
    for size, layouts in sizes.items():
        pools(size, write_at, layouts, root)
    return root, sizes


@pytest.mark.multiprocess
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_every_layout_loads_every_other_bit_for_bit(size, pools, saved):
    root, sizes = saved
    for wrong, read, needed in pools(size, load_at, sizes[size], range(len(LAYOUTS)), root):
        assert not wrong
        assert read == needed, "a rank reads its part and no more"


@pytest.mark.multiprocess
def test_files_are_data_and_each_piece_is_written_once_in_turns(saved):
    root, sizes = saved
    whole = sum(p.numel() for p in filled(ParallelConfig())[0].module.parameters()) * 3 * 4
    for i, layout in enumerate(LAYOUTS):
        folder = root / str(i) / "step-00000007"
        sums = dict.fromkeys(range(layout.ranks), 0)
        for file in folder.iterdir():
            if file.name in ("index.json", "state.json"):
                json.loads(file.read_text())
                continue
            _, rank = re.fullmatch(r"(model|optimizer)-(\d{5})\.safetensors", file.name).groups()
            with safe_open(file, "pt") as f:
                sums[int(rank)] += sum(f.get_tensor(k).nbytes for k in f.keys())  # noqa: SIM118
        assert whole <= sum(sums.values()) <= whole * 1.02, "once"
        assert max(sums.values()) <= 1.3 * whole / layout.ranks, f"{layout}: {sums}"


def test_any_checkpoint_loads_in_one_process_and_keeps_the_models_dtype(saved):
    root, sizes = saved
    built, _ = build(ParallelConfig())
    model = built.module.to(torch.bfloat16)
    for i in (0, len(LAYOUTS) - 1):
        checkpoint.load_model(checkpoint.latest(root / str(i)), model)
        for name, p in model.named_parameters():
            assert p.dtype == torch.bfloat16 and torch.equal(p, truth(name, p.shape).to(torch.bfloat16))


def test_moments_get_the_dtype_of_the_models_weights(tmp_path):
    write(tmp_path, [7])
    model = build(ParallelConfig())[0].module.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    checkpoint.load(checkpoint.latest(tmp_path), model, optimizer)
    for name, p in model.named_parameters():
        assert torch.equal(optimizer.state[p]["exp_avg"], truth("exp_avg" + name, p.shape).to(torch.bfloat16))
        assert optimizer.state[p]["step"].dtype == torch.float32
        p.grad = torch.zeros_like(p)
    optimizer.step()


def test_a_block_may_leave_the_ranks(tmp_path):
    with checkpoint.Writer(tmp_path) as checkpoints:
        checkpoints._group = Group((0, 1), 0, "destroyed")


def test_a_writer_that_would_keep_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"^checkpoint: keep must be at least 1, got 0$"):
        checkpoint.Writer(tmp_path, keep=0)


def test_a_ranks_part_without_placements_is_refused(tmp_path):
    """The other ranks' experts would be missing, and no shape would tell."""
    built, optimizer = filled(ParallelConfig())
    mlp = built.module.blocks[0].ffn
    mlp.up = ColumnLinear(16, 64, Group((0, 1), 0, None))
    with checkpoint.Writer(tmp_path) as checkpoints, pytest.raises(ValueError, match="a rank's part of one; give its"):
        checkpoints.save(7, built.module, optimizer, {})
    write(tmp_path, [7])
    with pytest.raises(ValueError, match="a rank's part of one; give its placements, too"):
        checkpoint.load_model(checkpoint.latest(tmp_path), built.module)


def test_state_of_another_shape_than_its_parameter_is_refused(tmp_path):
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.Adafactor(model.parameters())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    with (
        checkpoint.Writer(tmp_path) as checkpoints,
        pytest.raises(ValueError, match="col_var of weight has another sha"),
    ):
        checkpoints.save(1, model, optimizer, {})


def test_another_model_is_refused(saved):
    root, _ = saved
    last = checkpoint.latest(root / str(len(LAYOUTS) - 1))
    for change, words in (
        ({"experts": (0, 4, 4)}, r"is \(8, .*\), the model has \(4"),
        ({"layers": 2, "experts": (0, 4)}, "not a checkpoint of this model; differing parameters: blocks.2"),
    ):
        model = parallel.build(replace(MODEL, **change), 0, Mesh(ParallelConfig(), (4,))).module
        before = [p.clone() for p in model.parameters()]
        with pytest.raises(checkpoint.CheckpointError, match=words):
            checkpoint.load_model(last, model)
        assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def save_after_forward(root):
    built, optimizer = filled(ParallelConfig(data=2, expert=1, shard=True))
    with torch.no_grad():
        built.module(torch.zeros(1, 4, dtype=torch.long))
    with checkpoint.Writer(root / "0") as checkpoints:
        checkpoints.save(7, built.module, optimizer, {"at": 7}, built.placements)


@pytest.mark.multiprocess
def test_weights_that_a_validation_left_gathered_are_saved_with_their_state(pools, tmp_path):
    pools(2, save_after_forward, tmp_path)
    ((wrong, read, needed),) = pools(1, load_at, {0: ParallelConfig()}, [0], tmp_path)
    assert not wrong and read == needed


def flip(folder):
    file = folder / "optimizer-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def truncate(folder):
    os.truncate(folder / "model-00002.safetensors", 500)


def edit_state(folder):
    text = (folder / "state.json").read_text()
    (folder / "state.json").write_text(text.replace('"step": 9', '"step": 8'))


DAMAGE = {
    "flip": (flip, "optimizer-00001.safetensors: content does not match its SHA-256"),
    "truncate": (truncate, "model-00002.safetensors: content does not match its SHA-256"),
    "lose": (lambda folder: (folder / "model-00003.safetensors").unlink(), "unreadable"),
    "no-state": (lambda folder: (folder / "state.json").unlink(), "no state.json"),
    "torn-state": (lambda folder: os.truncate(folder / "state.json", 30), "not valid JSON"),
    "edited-state": (edit_state, "state.json: content does not match its SHA-256"),
    "no-index": (lambda folder: (folder / "index.json").unlink(), "unreadable"),
    "old-format": (lambda folder: (folder / "state.json").write_text('{"step": 9, "sha256": {}}'), "does not match"),
}


def latest_of(folders):
    lines = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading.log, "warning", lambda text, *args: lines.append(text % args))
        return [checkpoint.latest(folder) for folder in folders], lines


@pytest.mark.multiprocess
def test_a_broken_checkpoint_is_named_and_all_ranks_use_the_one_before(pools, tmp_path):
    pools(4, write, tmp_path / "whole", (5, 9), ParallelConfig(data=4, expert=4))
    folders = [shutil.copytree(tmp_path / "whole", tmp_path / name) for name in DAMAGE]
    for (damage, _), folder in zip(DAMAGE.values(), folders, strict=True):
        damage(folder / "step-00000009")
    for size in (1, 4, 2):
        answers = pools(size, latest_of, [tmp_path / "whole", *folders, tmp_path / "none"])
        for found, _ in answers:
            assert found[0].step == 9 and found[-1] is None
            assert [(c.step, c.state) for c in found[1:-1]] == [(5, {"at": 5})] * len(DAMAGE)
        lines = answers[0][1]
        assert len(lines) == 2 * len(DAMAGE) and not any(more for _, more in answers[1:])
        for line, other, folder, (_, words) in zip(lines[::2], lines[1::2], folders, DAMAGE.values(), strict=True):
            assert str(folder / "step-00000009") in line and words in line and "\n" not in line
            assert other == f"step 5 is used in place of the newest checkpoint: {folder / 'step-00000005'}"


def full(tensors, path):
    """In place of `save_file`: a disk that is full."""
    path.write_bytes(b"half")
    raise OSError(28, "No space left on device", str(path))


def no_thread(*_):
    """In place of `Thread.start`."""
    raise RuntimeError("can't start new thread")


def full_on_rank_1(root):
    built, optimizer = filled(ParallelConfig(data=2, expert=2))
    real = storage.save_file
    errors = []
    with checkpoint.Writer(root) as checkpoints:
        for step in (1, 2, 3, 4):
            if dist.get_rank() == 1:
                storage.save_file = full if step == 2 else real
            try:
                checkpoints.save(step, built.module, optimizer, {}, built.placements)
                checkpoints.wait()
            except OSError as error:
                errors.append((step, str(error)))
            if step == 2:
                dist.barrier()
                seen = sorted(os.listdir(root))
                dist.barrier()
    return errors, seen


@pytest.mark.multiprocess
def test_a_full_disk_on_one_rank_is_told_on_all(pools, tmp_path):
    for errors, seen in pools(2, full_on_rank_1, tmp_path):
        ((step, text),) = errors
        assert step == 2 and "rank 1: No space left on device" in text and "\n" not in text
        assert seen == ["step-00000001"], "the older one stays, nothing half-written does"
    assert sorted(os.listdir(tmp_path)) == ["step-00000003", "step-00000004"]


def die_while_writing(root, ranks):
    built, optimizer = filled(ParallelConfig(data=2, expert=2))
    real = storage.save_file
    with checkpoint.Writer(root) as checkpoints:
        checkpoints.save(1, built.module, optimizer, {}, built.placements)
        checkpoints.wait()

        def die(tensors, path):
            real(tensors, path)
            if dist.get_rank() in ranks:
                os.kill(os.getpid(), signal.SIGKILL)

        storage.save_file = die
        checkpoints.save(2, built.module, optimizer, {}, built.placements)


def write_again(root):
    last = checkpoint.latest(root).step
    write(root, [3], ParallelConfig(data=2, expert=2))
    return last


@pytest.mark.multiprocess
@pytest.mark.parametrize("ranks", [(1,), (0, 1)])
def test_ranks_killed_while_they_write_leave_the_one_before(ranks, pools, tmp_path):
    with pytest.raises(RankError):
        pools(2, die_while_writing, tmp_path, ranks)
    if 0 in ranks:  # rank 0, if it lives long enough to see the other die, tidies up itself
        assert (tmp_path / ".step-00000002.partial").is_dir()
    assert pools(2, write_again, tmp_path) == [1, 1]
    assert sorted(os.listdir(tmp_path)) == ["step-00000001", "step-00000003"], "what was left is swept away"


def test_saving_copies_and_returns(tmp_path, monkeypatch):
    """Weights may change while a checkpoint of them is written."""
    built, optimizer = filled(ParallelConfig())
    go, real = threading.Event(), storage.save_file

    def slow(tensors, path):
        assert go.wait(30)
        real(tensors, path)

    monkeypatch.setattr(storage, "save_file", slow)
    with checkpoint.Writer(tmp_path) as checkpoints:
        checkpoints.save(1, built.module, optimizer, {})
        assert checkpoint.latest(tmp_path) is None
        for p in built.module.parameters():
            p.detach().zero_()
            optimizer.state[p]["exp_avg"].zero_()
        go.set()
    checkpoint.load(checkpoint.latest(tmp_path), built.module, optimizer)
    assert not differences(built, optimizer)


def save_without_threads(root, threadless):
    """Ranks that can start no thread, beside others that can; their training goes on to the next collective."""
    built, optimizer = filled(ParallelConfig(data=2, expert=2))
    with checkpoint.Writer(root) as checkpoints:
        for step in (1, 2):
            with pytest.MonkeyPatch.context() as patch:
                if dist.get_rank() in threadless:
                    patch.setattr(threading.Thread, "start", no_thread)
                checkpoints.save(step, built.module, optimizer, {}, built.placements)
            dist.barrier()
    for p in built.module.parameters():
        local(p).zero_()
    checkpoint.load(checkpoint.latest(root), built.module, optimizer, built.placements)
    return differences(built, optimizer), checkpoint.latest(root).step


@pytest.mark.multiprocess
@pytest.mark.parametrize("threadless", [(1,), (0, 1)])
def test_ranks_without_a_thread_write_before_they_go_on(threadless, pools, tmp_path):
    assert pools(2, save_without_threads, tmp_path, threadless) == [([], 2), ([], 2)]


def test_without_a_thread_it_is_said_and_a_failed_write_is_told_as_usual(tmp_path, monkeypatch, caplog):
    built, optimizer = filled(ParallelConfig())
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    checkpoints = checkpoint.Writer(tmp_path)
    checkpoints.save(1, built.module, optimizer, {})
    assert checkpoint.latest(tmp_path).step == 1, "it is written when `save` returns"
    assert "step 1: can't start new thread; training waits until it is written" in caplog.text
    monkeypatch.setattr(storage, "save_file", full)
    checkpoints.save(2, built.module, optimizer, {})
    with pytest.raises(OSError, match="No space left"):
        checkpoints.wait()


def test_a_disk_without_room_is_one_line_at_the_next_call(tmp_path):
    """A real limit on file size stands for the full disk: safetensors reports it as it reports that one."""
    built, optimizer = filled(ParallelConfig())
    checkpoints = checkpoint.Writer(tmp_path)
    checkpoints.save(1, built.module, optimizer, {})
    checkpoints.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        checkpoints.save(2, built.module, optimizer, {})
        with pytest.raises(OSError, match="File too large") as error:
            checkpoints.save(3, built.module, optimizer, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value) and os.listdir(tmp_path) == ["step-00000001"]
    checkpoints.save(4, built.module, optimizer, {})
    checkpoints.wait()
    assert checkpoint.latest(tmp_path).step == 4


def test_an_error_of_the_block_goes_before_one_of_the_write(tmp_path, monkeypatch, caplog):
    built, optimizer = filled(ParallelConfig())
    monkeypatch.setattr(storage, "save_file", full)
    with pytest.raises(KeyError, match="mine"), checkpoint.Writer(tmp_path) as checkpoints:
        checkpoints.save(1, built.module, optimizer, {})
        raise KeyError("mine")
    assert "No space left on device" in caplog.text


def test_the_newest_are_kept_and_a_broken_newer_one_does_not_count(tmp_path):
    (tmp_path / "step-00000099").mkdir()  # broken, so training went back
    for mine in ("step-00000001-mine", "step-before-lr-change"):
        (tmp_path / mine).mkdir()  # a user's copy is neither removed nor resumed from
    write(tmp_path, range(1, 6), keep=3)
    assert [int(p.name[5:]) for p in format.directories(tmp_path)] == [3, 4, 5, 99]
    assert checkpoint.latest(tmp_path).step == 5 and (tmp_path / "step-00000001-mine").is_dir()


@pytest.mark.multiprocess
def test_a_step_of_more_digits_is_found_and_counts_as_newer(tmp_path):
    write(tmp_path, [99_999_998, 99_999_999, 100_000_000])
    assert sorted(os.listdir(tmp_path)) == ["step-100000000", "step-99999999"]
    assert checkpoint.latest(tmp_path).step == 100_000_000


def test_a_state_that_is_no_json_is_one_line_with_the_checkpoint(tmp_path):
    built, optimizer = build(ParallelConfig())
    checkpoints = checkpoint.Writer(tmp_path)
    checkpoints.save(1, built.module, optimizer, {"loss": torch.tensor(1.0)})
    with pytest.raises(CheckpointError, match=r"step-00000001: not written \(.*Tensor is not JSON serializable\)$"):
        checkpoints.wait()


def test_pieces_that_leave_a_gap_are_not_a_checkpoint(pools, tmp_path):
    for text in pools(2, save_with_a_gap, tmp_path):
        assert "not written" in text and "blocks.1.ffn.experts.up" in text and "\n" not in text
    assert not os.listdir(tmp_path)


def save_with_a_gap(root):
    built, optimizer = filled(ParallelConfig(data=2, expert=2))
    name = "blocks.1.ffn.experts.up"
    placement = built.placements[name]
    shard = replace(placement.shards[0], offset=(0, 0, 0))  # both ranks claim the first experts
    built.placements[name] = replace(placement, shards=(shard,), replicas=(0,))
    checkpoints = checkpoint.Writer(root)
    checkpoints.save(1, built.module, optimizer, {}, built.placements)
    try:
        checkpoints.wait()
    except checkpoint.CheckpointError as error:
        return str(error)


@pytest.mark.parametrize("name", ["pipe", "../pipe", "/dev/zero"])
def test_a_file_list_that_names_a_fifo_or_a_device_is_refused_at_once(tmp_path, name):
    write(tmp_path, [1])
    path = checkpoint.latest(tmp_path).path
    for where in (path, tmp_path):
        os.mkfifo(where / "pipe")
    record = json.loads((path / "state.json").read_text())
    format.write_state(path, 1, {}, {**record["sha256"], name: "0" * 64})
    with pytest.raises(CheckpointError, match="is not a regular file of the checkpoint"):
        format.verify(path, name, "0" * 64)
    assert checkpoint.latest(tmp_path) is None
    index = {key: {**entry, "pieces": [{**p, "file": name} for p in entry["pieces"]]}
             for key, entry in format.read_index(path).items()}  # fmt: skip
    (path / "index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="is not a regular file of the checkpoint"):
        checkpoint.load_model(checkpoint.Checkpoint(path, 1, {}), build(ParallelConfig())[0].module)


@pytest.mark.parametrize(
    "change",
    [
        {"sha256": None}, {"sha256": {"index.json": None}}, {"sha256": []}, {"step": "1"}, {"step": None}, {"state": 3},
    ],
)  # fmt: skip
def test_a_state_of_the_wrong_types_is_refused(tmp_path, change):
    path = tmp_path / "step-00000001"
    path.mkdir()
    content = {"step": 1, "state": {}, "sha256": {}} | change
    format.write_state(path, content["step"], content["state"], content["sha256"])
    with pytest.raises(CheckpointError, match=rf"unreadable \(_?State\.{next(iter(change))}"):
        format.read_state(path)
    assert checkpoint.latest(tmp_path) is None


@pytest.mark.parametrize(
    "entry",
    [
        None, [], {"dtype": "float32", "shape": [1]}, {"dtype": "Tensor", "shape": [1], "pieces": []},
        {"dtype": None, "shape": [1], "pieces": []}, {"dtype": "float32", "shape": 3, "pieces": []},
        {"dtype": "float32", "shape": [1], "pieces": [None]},
        {"dtype": "float32", "shape": [1], "pieces": [{"at": [0, 0], "size": [1], "file": "a"}]},
        {"dtype": "float32", "shape": [1], "pieces": [{"at": ["0"], "size": [1], "file": "a"}]},
        {"dtype": "float32", "shape": [1], "pieces": [{"at": [0], "size": [1], "file": 3}]},
    ],
)  # fmt: skip
def test_an_index_of_the_wrong_types_is_refused(tmp_path, entry):
    (tmp_path / "index.json").write_text(json.dumps({"model/x": entry}))
    with pytest.raises(CheckpointError, match=r"index\.json: model/x is no tensor"):
        format.read_index(tmp_path)


@pytest.mark.parametrize("file", ["index.json", "state.json"])
def test_an_index_or_state_that_is_a_fifo_is_refused_at_once(tmp_path, file):
    path = tmp_path / "step-00000001"
    path.mkdir()
    os.mkfifo(path / file)
    with pytest.raises(CheckpointError, match="is not a regular file"):
        (format.read_index if file == "index.json" else format.read_state)(path)
    assert checkpoint.latest(tmp_path) is None
