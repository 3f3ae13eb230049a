"""`moelab check-cluster` on gloo ranks: a healthy machine, and faults that it must find."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from moelab import simulate
from moelab.engine.cluster import check, shared_folder
from moelab.engine.cluster.findings import LIMIT_S, Nodes
from moelab.engine.cluster.links import Links
from moelab.engine.launch.process import Place
from moelab.simulate.exchange import collective_us

pytestmark = pytest.mark.multiprocess
LINE = "MOELAB_TEST_LINE=here"
FAILS_ON_ONE_RANK = """
from pathlib import Path

import torch.distributed as dist

from moelab.engine.cluster import check


def rates():
    if dist.get_rank() == 1:
        raise ValueError("rank 1 cannot measure")
    return 1.0, 10.0


check.main(
    device="cpu", largest=1 << 20, out=None, links=None, rates=rates, commit=None, gpus_per_node=0, environment=(), folder=Path()
)
"""


def rows(folder, nodes, fault, links, options):
    """On a rank: the rows, with `nodes` made-up nodes and something broken."""
    rank, world = dist.get_rank(), dist.get_world_size()
    place = Place(rank, world, rank % (world // nodes), f"node{rank * nodes // world}")
    where = links and simulate.cluster(links)
    given = {
        "device": "cpu", "gpus_per_node": 0, "environment": (), "largest": 1 << 20, "commit": "a" * 40, **options,
        "links": where and Links(links, lambda *group: collective_us(*group, where, simulate.fitted())),
        "rates": lambda: (1e-3 if (fault, rank) == ("slow", 3) else 1.0, 10.0),
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check.os, "sched_getaffinity", lambda _: range(8), raising=False)
        if fault == "clock" and rank >= world // 2:
            now = time.time
            patch.setattr(check.time, "time", lambda: now() + 1000)
        if fault == "locks":
            patch.setattr(shared_folder.fcntl, "flock", lambda *_: None)
        if fault == "no locks" and rank == 0:
            patch.setattr(shared_folder.fcntl, "flock", no_locks)
        if fault == "error":
            patch.setattr(shared_folder, "_visible", unreadable)
        if fault == "stale":
            patch.setattr(shared_folder, "VISIBLE_S", 1.0)
        if fault == "stale" and rank == 3:
            read = Path.read_text
            patch.setattr(Path, "read_text", lambda path, *a: "old" if path.name == "seen.txt" else read(path, *a))
        return list(check.check(place, folder=folder, **given))


def no_locks(*_):
    raise OSError(37, "No locks available")


def unreadable(*_):
    raise OSError("cannot be read")


@pytest.fixture
def run(on_ranks, tmp_path):
    """The rows by name, of four ranks on so many nodes."""

    def go(nodes=1, fault="", links=None, **options):
        everyone = on_ranks(4, rows, tmp_path, nodes, fault, links, options)
        assert all(found == everyone[0] for found in everyone), "every rank has the same rows"
        return {row.check: row for row in everyone[0]}

    return go


def test_one_node_is_ok(run, tmp_path):
    found = run()
    assert not [row for row in found.values() if row.verdict in ("wrong", "slow")]
    links = [row for name, row in found.items() if name.startswith("all-")]
    assert len(links) == 4 and all(row.verdict == "note" for row in links), "nothing to compare gloo with"
    assert "GB/s" in found["all-to-all among all 4 ranks, 1 MiB"].measured
    assert found["checkpoint of 1 MiB a rank, written and hashed"].expected == "reads back equal"
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"
    assert check.verdict(list(found.values()), Place(0, 4, 0, "a"), 1) == "verdict: ok, 4 ranks on 1 node"


def test_groups_of_two_nodes_and_links_below_the_data_sheet(run):
    found = run(nodes=2, links="a100-40gb", gpus_per_node=8, environment=(LINE,))
    for among in ("all 4 ranks", "2 ranks of a node", "2 nodes, one rank each"):
        for operation in ("all-reduce", "all-to-all"):
            row = found[f"{operation} among {among}, 1 MiB"]
            assert row.verdict == "slow" and "by a100-40gb" in row.expected and row.remedy, "gloo is no InfiniBand"
    assert found["ranks of a node"].verdict == "wrong" and found["ranks of a node"].expected == "8, by the profile"
    assert LINE in found["environment of the profile"].measured
    assert found["clocks of the nodes against rank 0's"].verdict == "ok"
    assert "checks are not ok, 4 ranks on 2 nodes" in check.verdict(list(found.values()), Place(0, 4, 0, "a"), 2)


@pytest.mark.parametrize(
    ("fault", "checked", "says"),
    [
        ("clock", "clocks of the nodes against rank 0's", "+1e+06 ms (node1"),
        ("locks", "file locks in", "held by two at once, on node0, node1"),
        ("no locks", "file locks in", "cannot be taken, on node0; No locks available"),
        ("stale", "a file replaced by one rank, seen by the others", "not seen on node1"),
        ("slow", "matrix products, each rank", "rank 3 on node1"),
    ],
)
def test_faults_are_found(run, fault, checked, says):
    found = run(nodes=2, fault=fault)
    row = next(row for name, row in found.items() if name.startswith(checked))
    assert row.verdict in ("wrong", "slow") and says in row.measured and row.remedy


def test_a_folder_that_one_rank_does_not_see(on_ranks):
    with pytest.raises(Exception, match=r"is not one folder on all nodes|Permission|No such file"):
        on_ranks(4, rows, Path("/proc/nowhere"), 1, "", None, {})


def test_nodes_of_unequal_size_have_no_groups():
    nodes = Nodes.of(["a", "b", "a"])
    assert nodes.count == 2 and nodes.ranks.size == 0
    assert Nodes.of(["a", "b", "a", "b"]).ranks.tolist() == [[0, 2], [1, 3]]


def test_outside_of_ranks_it_says_how_to_start_it(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="no rank; start it with srun"):
        check.main(device="cpu", largest=1 << 20, out=None)


def test_what_fails_on_one_rank_is_said_before_the_others_time_out(tmp_path):
    """The others are in a collective then, and would be waited for."""
    (tmp_path / "script.py").write_text(FAILS_ON_ONE_RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "script.py"]
    started = time.monotonic()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=2 * LIMIT_S)
    assert done.returncode and "ValueError: rank 1 cannot measure" in done.stderr
    assert time.monotonic() - started < LIMIT_S


def test_an_error_leaves_no_folder_behind(on_ranks, tmp_path):
    with pytest.raises(Exception, match="cannot be read"):
        on_ranks(2, rows, tmp_path, 1, "error", None, {})
    assert not list(tmp_path.iterdir())
