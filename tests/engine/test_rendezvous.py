"""How ranks find each other: whose connections the store accepts, and where it says that it listens."""

import datetime
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import psutil
import pytest

from moelab.engine.launch import rendezvous
from moelab.engine.launch.rendezvous import gloo_interface, own_address

LIMIT = datetime.timedelta(seconds=30)


def other_address():
    """An address of this machine that is not loopback."""
    for name, addresses in psutil.net_if_addrs().items():
        for a in addresses:
            if a.family == socket.AF_INET and not a.address.startswith("127.") and psutil.net_if_stats()[name].isup:
                return a.address
    pytest.skip("this machine has the loopback interface only")


@pytest.fixture
def environment(monkeypatch):
    for name in [*os.environ]:
        if name.startswith(("SLURM_", "MASTER_", "MOELAB_", "GLOO_", "NCCL_")) or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)
    return lambda **values: [monkeypatch.setenv(name, str(value)) for name, value in values.items()]


def meet(size, folder=None):
    with ThreadPoolExecutor(size) as pool:
        ranks = pool.map(lambda rank: rendezvous.meet(rank, size, LIMIT, folder), reversed(range(size)))
        return [*ranks][::-1]


def test_local_ranks_meet_on_loopback_only(environment, tmp_path):
    elsewhere = other_address()
    places = {"MOELAB_RENDEZVOUS": tmp_path / "rendezvous.json", "MASTER_ADDR": elsewhere, "MASTER_PORT": 1}
    environment(MOELAB_LAUNCHER=os.getppid(), **places)
    stores = meet(3)
    stores[0].set("key", "value")
    assert stores[2].get("key") == b"value"
    port = stores[0].port
    socket.create_connection(("127.0.0.1", port), 5).close()
    with pytest.raises(OSError):
        socket.create_connection((elsewhere, port), 5)
    rendezvous.met(0)
    assert list(tmp_path.iterdir()) == []


def test_ranks_of_a_slurm_step_meet_through_a_file_at_the_jobs_address(environment, tmp_path):
    address = other_address()
    environment(SLURM_JOB_ID=7, SLURM_STEP_ID=0, SLURM_LAUNCH_NODE_IPADDR=address)
    first = meet(2, tmp_path)
    assert (tmp_path / ".rendezvous-7-0-0.json").exists()
    environment(SLURM_STEP_ID=1)
    second = meet(2, tmp_path)  # two at once
    assert first[0].port != second[0].port and first[1].host == second[1].host == address
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", first[0].port), 5)
    rendezvous.met(0, tmp_path)
    rendezvous.met(1, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [".rendezvous-7-0-0.json"]


def test_an_interface_that_was_chosen_is_where_rank_0_listens(environment):
    name, address = next(
        (name, a.address) for name, own in psutil.net_if_addrs().items() for a in own if a.address == other_address()
    )
    environment(SLURM_LAUNCH_NODE_IPADDR="127.0.0.1", NCCL_SOCKET_IFNAME=name)
    assert own_address(os.environ) == address


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        ({"GLOO_SOCKET_IFNAME": "bond0", "NCCL_SOCKET_IFNAME": "ib"}, "bond0"),
        ({"NCCL_SOCKET_IFNAME": "ib"}, "ib0"),
        ({"NCCL_SOCKET_IFNAME": "hsn,eth"}, "eth0"),
        ({"NCCL_SOCKET_IFNAME": "=eth1"}, "eth1"),
        ({"NCCL_SOCKET_IFNAME": "=eth"}, None),
        ({"NCCL_SOCKET_IFNAME": "^docker,eth"}, "ib0"),
        ({"NCCL_SOCKET_IFNAME": "^=docker0,eth0"}, "eth1"),
    ],
)
def test_gloo_follows_the_interface_chosen_for_nccl(given, expected):
    assert gloo_interface(given, ["lo", "docker0", "eth0", "eth1", "ib0"]) == expected


def test_only_interfaces_that_carry_traffic_are_chosen(environment, monkeypatch):
    """A port without a cable, and one that reaches its own link only, come first on many nodes."""

    def ip(address):
        return [SimpleNamespace(family=socket.AF_INET, address=address)]

    port = [SimpleNamespace(family=psutil.AF_LINK, address="fe:e4:bc:7f:83:57")]
    addresses = {"lo": "127.0.0.1", "down0": "10.0.0.1", "usb0": "169.254.3.1", "ib0": "10.1.0.7"}
    own = {"eno1": port, **{name: ip(address) for name, address in addresses.items()}}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: own)
    monkeypatch.setattr(psutil, "net_if_stats", lambda: {n: SimpleNamespace(isup=n != "down0") for n in own})
    monkeypatch.setattr(socket, "if_nameindex", lambda: list(enumerate(own)))
    assert rendezvous.interfaces() == {"lo": "127.0.0.1", "ib0": "10.1.0.7"}
    environment(SLURM_LAUNCH_NODE_IPADDR="127.0.0.1", NCCL_SOCKET_IFNAME="^lo,docker")
    assert own_address(os.environ) == "10.1.0.7" and gloo_interface(os.environ, rendezvous.interfaces()) == "ib0"


def test_nowhere_to_meet_is_one_line(environment):
    with pytest.raises(RuntimeError, match="MASTER_ADDR and MASTER_PORT are not set, and this is no step of Slurm"):
        rendezvous.meet(0, 2, LIMIT)


def test_rank_0_that_does_not_come_is_one_line(environment, tmp_path):
    environment(SLURM_JOB_ID=7, SLURM_STEP_ID=0)
    with pytest.raises(RuntimeError, match="rank 1 of 2: rank 0 did not come within 0 s"):
        rendezvous.meet(1, 2, datetime.timedelta(seconds=0.1), tmp_path)
