"""Process groups, their time limit, and observers of collectives."""

import contextlib
import datetime
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _world

from moelab.config import ModelConfig
from moelab.config.parallel import ParallelConfig
from moelab.engine import checkpoint, parallel
from moelab.engine.collectives import KINDS, Traffic, all_gather_json, all_reduce, broadcast_json, observe
from moelab.engine.differentiable import copy_to_group, reduce_from_group
from moelab.engine.gradients import GradientSync, clip
from moelab.engine.groups import Group, ProcessGroups, gloo_group, time_limit
from moelab.engine.mesh import Mesh
from moelab.engine.testing import START_S

pytestmark = pytest.mark.multiprocess
MODEL = ModelConfig(layers=2, hidden=16, heads=4, experts=(2, 4), vocab=32, context=8)


def limits_of_all_groups(layout, directory):
    """On a rank: the time limit of every process group that a training has, those that torch made for itself included."""
    mesh = Mesh(layout, MODEL.experts)
    parallel.build(MODEL, 0, mesh)
    with checkpoint.Writer(directory):
        found = [time_limit(handle) for handle in _world.pg_map if handle is not dist.group.WORLD]
    mesh.close()
    return found


@pytest.mark.parametrize(
    ("layout", "groups"),
    [
        (ParallelConfig(tensor=2, data=4, gpus_per_node=4, expert_slicing=2, exchange="coordinated-hierarchical"), 5),
        (ParallelConfig(data=8, gpus_per_node=2, exchange="hierarchical"), 4),
        (ParallelConfig(data=8, shard=True, expert=2), 2),
    ],
    ids=lambda value: value.exchange if isinstance(value, ParallelConfig) else "",
)
def test_every_group_has_the_default_groups_time_limit(on_ranks, tmp_path, layout, groups):
    for found in on_ranks(8, limits_of_all_groups, layout, tmp_path):
        assert len(found) >= groups
        assert set(found) == {datetime.timedelta(seconds=START_S)}


class SlowStore(dist.Store):
    """A store whose answers take a while: its rank looks at its connections long after the others have opened them."""

    def __init__(self, store):
        super().__init__()
        self.store = store

    def get(self, key):
        time.sleep(0.1)
        return self.store.get(key)

    def set(self, key, value):
        self.store.set(key, value)

    def wait(self, keys, timeout=datetime.timedelta(seconds=START_S)):
        self.store.wait(keys, timeout)


def groups_that_are_destroyed_at_once(slow):
    """On a rank: make groups and destroy them without using them, while one rank is slow."""
    world = dist.group.WORLD
    backend, store = _world.pg_map[world]
    if dist.get_rank() == slow:
        _world.pg_map[world] = backend, SlowStore(store)
    try:
        group, groups = gloo_group(), ProcessGroups()
        dist.destroy_process_group(group.handle)
        groups.make(np.array([[0, 1, 2], [3, 4, 5]]))
        groups.close()
    finally:
        _world.pg_map[world] = backend, store
    return group.size


def test_a_rank_may_destroy_its_groups_while_a_slow_one_still_connects(on_ranks):
    for slow in range(6):
        assert on_ranks(6, groups_that_are_destroyed_at_once, slow) == [6] * 6


def calls_of_a_step(layout):
    """On a rank: what an observer sees of a training step, and that nothing else communicates."""
    mesh = Mesh(layout, MODEL.experts)
    model = parallel.build(MODEL, 0, mesh)
    sync = GradientSync(model)
    seen, open_calls, made = [], [], []

    @contextlib.contextmanager
    def observer(call):
        open_calls.append(call)
        yield
        seen.append(open_calls.pop())

    def counted(call):
        def run(*args, **kwargs):
            assert len(open_calls) == 1, "a collective that no observer sees"
            made.append(1)
            return call(*args, **kwargs)

        return run

    tokens = torch.arange(16).view(2, 8) % 32
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_to_all_single", "all_reduce"):
            patch.setattr(dist, name, counted(getattr(dist, name)))
        with observe(observer):
            sync.arm()
            model.module(tokens, targets_BT=tokens).loss.backward()
            sync.finish()
            clip(model, 1.0)
            assert checkpoint.finite(model.module, torch.optim.SGD(model.module.parameters()))
    before = len(seen)
    with torch.no_grad():
        model.module.eval()(tokens)
    assert len(seen) == before, "an observer sees nothing after its context"
    mesh.close()
    assert sum(call.operation != "wait" for call in seen) == len(made) > 0
    return [(call.operation, call.kind, call.group.rank, call.backward) for call in seen]


def test_observers_see_every_collective_of_a_step(on_ranks):
    layout = ParallelConfig(tensor=2, data=2, exchange="coordinated")
    for rank, seen in enumerate(on_ranks(4, calls_of_a_step, layout)):
        kinds = {kind for _, kind, _, _ in seen}
        parts = {"counts", "check", "dispatch", "combine", "tensor", "activations", "gradients", "norm", "control"}
        assert kinds == parts <= set(KINDS)
        assert {r for _, _, r, _ in seen} == {rank}
        assert ("all_to_all", "dispatch", rank, True) in seen and ("wait", "gradients", rank, False) in seen


def ring_and_identity():
    """On a rank: traffic of an all-reduce; values and gradients of Megatron's two operators."""
    world, traffic = Group.world(), Traffic(2)
    with observe(traffic):
        all_reduce(torch.ones(8), world, "norm")
    x = torch.full((3,), 1.0 + world.index, requires_grad=True)
    copied = copy_to_group(x, world)
    (copied * (world.index + 1)).sum().backward()
    f = copied.detach(), x.grad.clone()
    x.grad = None
    total = reduce_from_group(x, world)
    (total * 2).sum().backward()
    return traffic.sent["norm", "forward"], f, (total.detach(), x.grad)


def test_all_reduce_counts_as_a_ring_and_operators_are_megatrons(on_ranks):
    for rank, (sent, (copied, copied_grad), (total, total_grad)) in enumerate(on_ranks(4, ring_and_identity)):
        assert (sent.messages, sent.bytes) == (6, 6 * 8 * 4 // 4)
        assert sent.inter_node_messages == (6 if rank in (1, 3) else 0), "the next rank is on the other node"
        assert copied.tolist() == [1.0 + rank] * 3 and copied_grad.tolist() == [10.0] * 3
        assert total.tolist() == [10.0] * 3 and total_grad.tolist() == [2.0] * 3


def json_values():
    rank = dist.get_rank()
    value = {"rank": rank, "text": "é" * 1000 * rank, "none": None}
    return all_gather_json(value), broadcast_json(value if rank == 0 else None)


def test_json_values_travel_without_pickles(on_ranks):
    expected = [{"rank": r, "text": "é" * 1000 * r, "none": None} for r in range(4)]
    for gathered, first in on_ranks(4, json_values):
        assert gathered == expected and first == expected[0]


def test_one_process_needs_no_process_group():
    assert all_gather_json([1, "a"]) == [[1, "a"]] and broadcast_json({"a": 1}) == {"a": 1}
    assert Group.world().size == 1 and Mesh(ParallelConfig(), [4]).experts(4).expert.size == 1
