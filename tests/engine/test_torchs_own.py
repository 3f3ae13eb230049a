"""What torch's launcher, store, mesh and checkpoints do not do, for which the engine has its own (docs/architecture.md).

A test that fails here says that a release of torch does it now: then look whether ours can go.
"""

import contextlib
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _world

from moelab.config.parallel import ParallelConfig
from moelab.engine.groups import time_limit
from moelab.engine.launch.process import STOPPED
from moelab.engine.mesh import Mesh

# -- launcher ----------------------------------------------------------------------------------------------------------


def torchrun(folder, script):
    (folder / "script.py").write_text(script)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "script.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.multiprocess
def test_torchrun_waits_for_a_rank_that_hangs_and_leaves_its_ranks_alive_when_it_is_killed(tmp_path):
    """Ours: tests/engine/test_launch.py, `test_the_rank_that_hangs…` and `test_no_rank_outlives_its_launcher`."""
    agent = torchrun(
        tmp_path,
        "import os, pathlib, time\npathlib.Path(os.environ['RANK']).write_text(str(os.getpid()))\ntime.sleep(600)",
    )
    files, deadline = [tmp_path / "0", tmp_path / "1"], time.monotonic() + 120
    while not all(file.exists() and file.read_text() for file in files) and time.monotonic() < deadline:
        time.sleep(0.1)
    ranks = [psutil.Process(int(file.read_text())) for file in files]
    try:
        time.sleep(3)
        assert agent.poll() is None, "there is no limit to how long a rank may be silent"
        agent.kill()
        agent.wait()
        time.sleep(3)
        assert all(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)
    finally:
        for rank in ranks:
            rank.kill()
        agent.stderr.close()


@pytest.mark.multiprocess
def test_torchrun_takes_a_rank_that_stopped_as_asked_for_failed(tmp_path):
    """A rank that has written its checkpoint ends with 75, so that its job is queued again. Ours: `test_stopping_is_no_failure`."""
    agent = torchrun(tmp_path, f"import sys; sys.exit({STOPPED})")
    _, said = agent.communicate(timeout=120)
    assert agent.returncode == 1 and "FAILED" in said


# -- rendezvous --------------------------------------------------------------------------------------------------------


def test_torchs_store_listens_on_all_addresses_of_the_machine():
    """It has no password. Ours: tests/engine/test_rendezvous.py, `test_local_ranks_meet_on_loopback_only`."""
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
    found = {
        c.laddr.ip
        for c in psutil.Process().net_connections("tcp")
        if c.laddr.port == store.port and c.status == psutil.CONN_LISTEN
    }
    assert found & {"0.0.0.0", "::"}


# -- groups ------------------------------------------------------------------------------------------------------------


def groups_of_layers_of_2_and_4_experts():
    """On a rank of 4: how many process groups our mesh makes, and a DeviceMesh for each of the layers; its time limit."""
    config, counts, made = ParallelConfig(data=4, expert=0), [2, 4], []
    before = len(_world.pg_map)
    mesh = Mesh(config, counts)
    made.append(len(_world.pg_map) - before)
    mesh.close()
    before = len(_world.pg_map)
    grids = [
        init_device_mesh("cpu", (layout.replicas, layout.parallel), mesh_dim_names=("replica", "expert"))
        for layout in map(config.experts, counts)
    ]
    made.append(len(_world.pg_map) - before)
    return (
        made,
        [time_limit(grid.get_group("expert")).total_seconds() for grid in grids],
        time_limit(dist.group.WORLD).total_seconds(),
    )


@pytest.mark.multiprocess
def test_a_device_mesh_shares_no_groups_with_another_and_has_a_time_limit_of_its_own(on_ranks):
    """Ours: tests/engine/test_groups.py, `test_every_group_has_the_default_groups_time_limit`."""
    for (ours, torchs), limits, default in on_ranks(4, groups_of_layers_of_2_and_4_experts):
        assert ours < torchs
        assert limits[0] > default, "half an hour"


# -- checkpoints -------------------------------------------------------------------------------------------------------


class Payload:
    """An object whose unpickling makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def test_dcps_metadata_is_a_pickle_which_runs_what_is_in_it(tmp_path):
    """Ours: tests/engine/test_checkpoint.py, `test_files_are_data_and_each_piece_is_written_once_in_turns`."""
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with contextlib.suppress(AttributeError):  # what was unpickled is no metadata
        dcp.FileSystemReader(tmp_path).read_metadata()
    assert (tmp_path / "ran").exists()


def test_dcps_safetensors_are_not_checked(tmp_path):
    """Ours: `test_a_broken_checkpoint_is_named_and_all_ranks_use_the_one_before`."""
    dcp.save({"w": torch.zeros(1000)}, storage_writer=dcp.HuggingFaceStorageWriter(tmp_path), no_dist=True)
    (file,) = tmp_path.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 0x40
    file.write_bytes(content)
    state = {"w": torch.ones(1000)}
    dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(tmp_path), no_dist=True)
    assert state["w"].count_nonzero() == 1


class Stretches(torch.Tensor):
    """A matrix whose rows are pieces of their own, as those are that a rank has of a tensor-sliced query-key-value weight."""

    def __create_write_items__(self, name, _):
        properties, sizes = TensorProperties.create_from_tensor(self), torch.Size((1, self.shape[1]))
        places = [torch.Size((row, 0)) for row in range(len(self))]
        return [
            WriteItem(
                index=MetadataIndex(name, at),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(ChunkStorageMetadata(at, sizes), properties, self.size()),
            )
            for at in places
        ]

    def __get_tensor_shard__(self, index):
        return self.as_subclass(torch.Tensor)[index.offset[0] :][:1]


def test_dcps_safetensors_keep_one_piece_of_a_tensor_for_each_rank(tmp_path):
    """Ours: `test_every_layout_loads_every_other_bit_for_bit`, with layouts of tensor slicing."""
    writer = dcp.HuggingFaceStorageWriter(tmp_path, save_distributed=True)
    dcp.save({"qkv": torch.arange(6.0).view(3, 2).as_subclass(Stretches)}, storage_writer=writer, no_dist=True)
    (file,) = tmp_path.glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        assert opened.get_tensor("qkv").shape == (1, 2), "of three rows"
