"""Check what a cluster's profile may say."""

from dataclasses import fields

import pytest

from moelab import paths
from moelab.slurm import profiles


def test_profiles_that_ship_are_valid_and_the_example_shows_every_field():
    assert profiles.load("a100").gpus_per_node == 8 and profiles.load("local").partition == "debug"
    text = (paths.checkout() / "slurm" / "example.yaml").read_text()
    names = [f.name for f in fields(profiles.Profile) if f.name != "name"]
    assert [f for f in names if f"\n{f}:" not in text] == []
    documented = profiles.Profile.__doc__
    assert [f for f in names if f not in documented] == []


def test_a_bad_profile_is_one_line(tmp_path):
    (path := tmp_path / "site.yaml").touch()
    for text, part in (
        ("partiton: gpu", "unknown field partiton; did you mean partition? allowed: name, cluster, partition"),
        ("nodes: many", "profile site.nodes must be a whole number, got 'many'"),
        ("nodes: 0", "profile site.nodes must be greater than or equal to 1, got '0'"),
        ("failures: -1", "profile site.failures must be greater than or equal to 0, got '-1'"),
        ("time: soon", "time: expected minutes, H:M:S or D-H:M:S, got 'soon'"),
        ("memory_per_rank: 60", "memory_per_rank: expected a size such as 60G or 500M, got '60'"),
        ("time: 0:02:00", "lead_s must leave at least 30 s of the time limit 0:02:00, got 180"),
        ("environment: [NCCL]", "environment takes NAME=VALUE lines, got 'NCCL'"),
        ("sbatch: [-x node1]", "sbatch takes --name=value or --name, got '-x node1'"),
        ("setup: module load", "profile site.setup must be a list, got 'module load'"),
        ("lab_address: all", "lab_address must be 'loopback' or 'node', got 'all'"),
        ("name: other", "a profile is named by its file"),
        ('partition: "gpu\\n#SBATCH --uid=0"', "partition must be one line without control characters, got 'gpu"),
        ('account: "a\\nrm -rf /"', "account must be one line without control characters"),
        ('qos: "a\\rb"', "qos must be one line"),
        ('constraint: "a\\u2028b"', "constraint must be one line"),
        ('environment: ["A=1\\nB=2"]', "environment must be one line"),
        ('gpu_type: "a\\0"', "gpu_type must be one line"),
        ('sbatch: ["--comment=a\\nb"]', "sbatch must be one line"),
        ('sbatch: ["--signal=B:USR1@60"]', "sbatch may not have '--signal=B:USR1@60', which moelab itself sets"),
        *((f"sbatch: [--{o}=4]", f"may not have '--{o}=4'") for o in ("time", "nodes", "cpus-per-task", "job-name")),
        ("cluster: moon", "cluster must be 'slurm' or 'local', got 'moon'"),
        ("a: [", "not valid YAML"),
        ("- a", "expected `field: value` lines"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError) as error:
            profiles.load(str(path))
        assert part in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"no cluster profile 'a10'; did you mean a100\? allowed: a100, example, loca"):
        profiles.load("a10")


def test_texts_that_yaml_takes_for_numbers_stay_texts_and_a_profile_that_is_not_utf_8_is_named(tmp_path):
    path = tmp_path / "site.yaml"
    path.write_text("time: 24:00:00\naccount: no\nqos: 007\n")
    profile = profiles.load(str(path))
    assert (profile.time, profile.account, profile.qos) == ("24:00:00", "no", "007")
    path.write_bytes("# Größe".encode("latin-1"))
    with pytest.raises(ValueError, match=r"site\.yaml: not UTF-8"):
        profiles.load(str(path))


def test_time_limits():
    limits = {"90": 90, "1:30": 1.5, "2:00:00": 120, "1-12": 2160, "1-0:30": 1470, "1-00:00:30": 1440.5}
    assert {text: profiles.minutes(text, "time") for text in limits} == limits
