"""`moelab check-cluster` on gloo ranks: a healthy machine, and faults that it must find."""

import pytest
import torch.distributed as dist
from typer.testing import CliRunner

from moelab import simulate
from moelab.cli import app
from moelab.engine import cluster
from moelab.engine.launch.process import Place
from moelab.simulate.exchange import collective_us

pytestmark = pytest.mark.multiprocess


def rows(folder, nodes, fault, links):
    """On a rank: the rows, with `nodes` made-up nodes and something broken."""
    rank, world = dist.get_rank(), dist.get_world_size()
    place = Place(rank, world, rank % (world // nodes), f"node{min(rank * nodes // world, nodes - 1)}")
    where = simulate.cluster(links) if links else None
    expected = where and (lambda *group: collective_us(*group, where, simulate.fitted()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster.process, "find", lambda: place)
        if fault == "no locks":
            patch.setattr(cluster.fcntl, "flock", lambda *_: None)
        if fault == "refused" and rank == 0:
            patch.setattr(cluster.fcntl, "flock", refuse)
        if fault == "torch" and rank == 1:
            patch.setattr(cluster.torch, "__version__", "0.1")
        if fault == "interface":
            patch.setattr(cluster.rendezvous, "own_address", lambda _: "127.0.0.1")
        return list(cluster.check("cpu", expected, folder, 1 << 20))


def refuse(*_):
    raise OSError(37, "No locks available")


@pytest.fixture
def run(on_ranks, tmp_path):
    """The rows by name, of four ranks on so many nodes."""

    def go(nodes=1, fault="", links=None):
        everyone = on_ranks(4, rows, tmp_path, nodes, fault, links)
        assert all(found == everyone[0] for found in everyone), "every rank has the same rows"
        assert list(tmp_path.iterdir()) == [], "nothing is left behind"
        return {row.check: row for row in everyone[0]}

    return go


def test_one_node_is_ok(run):
    found = run()
    assert not [row for row in found.values() if row.verdict in ("wrong", "slow")]
    links = [row for name, row in found.items() if name.startswith("all-")]
    assert len(links) == 2 and all(row.verdict == "note" for row in links), "nothing to compare gloo with"
    assert "GB/s" in found["all-to-all among all 4 ranks, 1 MiB"].measured


def test_groups_of_two_nodes_and_links_below_the_data_sheet(run):
    found = run(nodes=2, links="a100-40gb")
    for among in ("all 4 ranks", "2 ranks of a node", "2 nodes, one rank each"):
        for operation in ("all-reduce", "all-to-all"):
            row = found[f"{operation} among {among}, 1 MiB"]
            assert row.verdict == "slow" and "GB/s" in row.expected and row.remedy, "gloo is no InfiniBand"


@pytest.mark.parametrize(
    ("fault", "checked", "says"),
    [
        ("no locks", "file locks in", "held on node0, held on node1"),
        ("refused", "file locks in", "No locks available on node0"),
        ("torch", "software", "torch 0.1 and "),
        ("interface", "network interface", "(loopback)"),
    ],
)
def test_faults_are_found(run, fault, checked, says):
    found = run(nodes=2, fault=fault)
    row = next(row for name, row in found.items() if name.startswith(checked))
    assert row.verdict == "wrong" and says in row.measured and row.remedy


def test_nodes_of_unequal_size(run):
    found = run(nodes=3)
    assert found["ranks of a node"].verdict == "wrong" and found["ranks of a node"].measured == "1 or 2, 3 nodes"
    assert len([name for name in found if name.startswith("all-")]) == 2, "groups of equal nodes only"


def test_outside_of_ranks_it_says_how_to_start_it(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    done = CliRunner().invoke(app, ["check-cluster", "--device", "cpu"])
    assert "no rank; start it with srun" in str(done.exception)
