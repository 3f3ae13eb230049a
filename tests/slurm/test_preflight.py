"""What a submission is refused for before anything is queued."""

from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from moelab.cli import app
from moelab.config.parallel import ParallelConfig
from moelab.files import write_json
from moelab.lab import Lab
from moelab.runs.store import RunStore
from moelab.slurm import preflight, profiles, submit

PROFILE = profiles.Profile("site", nodes=2, gpus_per_node=4)
HERE = profiles.Profile("here", cluster="local")


@pytest.fixture(autouse=True)
def home(workshop, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return workshop


def call(*arguments, **options):
    return CliRunner().invoke(app, [*arguments], **options)


@pytest.fixture
def queued(monkeypatch):
    """The experiments that would have been queued."""
    names = []
    plan = SimpleNamespace(scripts={}, finished=0, queued=0, submission=None)
    monkeypatch.setattr(submit, "submit", lambda name, *_, **__: names.append(name) or plan)
    return names


def on_cuda(spec, ranks=1, **layout):
    train = replace(spec.train, device="cuda", batch_size=16, micro_batch=1)
    return replace(spec, train=train, parallel=ParallelConfig(data=ranks, **layout))


def test_what_fits_passes_without_a_gpu_here_and_writes_nothing(tiny_spec, tmp_path):
    preflight.check([tiny_spec, on_cuda(tiny_spec, 8)], PROFILE)
    assert not list(tmp_path.iterdir())


def test_a_time_limit_in_which_a_run_may_not_start_is_named(tiny_spec, capsys):
    preflight.check([tiny_spec], replace(PROFILE, time="0:03:00", lead_s=60))
    assert capsys.readouterr().err == ""
    preflight.check([tiny_spec], replace(PROFILE, time="1", lead_s=25))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("profile site: with time 1 and lead_s 25, a run has 0 to 35 s until it is told to stop")


def test_runs_that_do_not_fit_the_profile_are_refused(tiny_spec, home):
    wide = on_cuda(tiny_spec, 16)
    with pytest.raises(ValueError, match="tiny: 16 ranks in nodes of 8 need 4 nodes; profile site allows 2"):
        preflight.check([tiny_spec, wide], PROFILE)
    preflight.check([wide], replace(PROFILE, nodes=4))
    write_json(home / "runs" / wide.id / "result.json", {})
    preflight.check([wide], PROFILE)  # finished


def test_measuring_needs_a_gpu_which_is_this_machines_without_slurm(tiny_spec):
    preflight.check([tiny_spec], HERE)
    for given in ({"specs": [on_cuda(tiny_spec)]}, {"specs": [], "measuring": ["throughput"]}):
        with pytest.raises(ValueError, match="no CUDA device is available here"):
            preflight.check(profile=HERE, **given)
    preflight.check([], replace(PROFILE, notebook_gpus=1), measuring=["throughput"])
    preflight.check([], replace(PROFILE, sbatch=("--gres=gpu:1",)), measuring=["throughput"])


def test_texts_that_do_not_work_are_refused_unless_the_runs_see_other_folders_or_packages(tiny_spec, monkeypatch):
    monkeypatch.setattr("moelab.runs.preflight.find_spec", lambda name: None)
    inside, elsewhere = replace(PROFILE, container=("--container-image=x",)), replace(PROFILE, python="/shared/python")
    for change, part, passes in (
        ({"corpus": "mix6"}, "unknown corpus 'mix6'", []),
        ({"corpus": "folder:/nowhere"}, "'folder:/nowhere' is no folder", [inside]),
        ({"corpus": "hf:somebody/something", "max_documents": 10}, "package datasets", [inside, elsewhere]),
    ):
        spec = replace(tiny_spec, data=replace(tiny_spec.data, **change))
        for profile in (PROFILE, inside, elsewhere):
            with nullcontext() if profile in passes else pytest.raises(ValueError, match=part):
                preflight.check([spec], profile)


def test_a_dry_run_says_what_would_be_refused(queued, monkeypatch):
    submission = ("submit", "pr-moe", "--scale", "gpu", "--profile", "example")
    monkeypatch.setattr("moelab.runs.preflight.shutil.disk_usage", lambda _: SimpleNamespace(free=1 << 50))
    assert "refused" not in call(*submission, "--dry-run").output or not find_spec("datasets")
    monkeypatch.setattr("moelab.runs.preflight.find_spec", lambda name: None)
    for command in (submission, ("run", "pr-moe", "--scale", "gpu")):
        done = call(*command, "--dry-run")
        assert done.exit_code == 0 and "as things are, it would be refused: data: hf:monology" in done.output
    for command in (submission, ("run", "pr-moe", "--scale", "quick")):
        failed = call(*command, "-p", "data.corpus=nope", "--dry-run")
        assert str(failed.exception).startswith("data: unknown corpus 'nope'") and "to train" not in failed.output


def test_a_dry_run_tells_budgets_of_an_arm_apart():
    done = call("submit", "scaling", "--scale", "cpu", "--profile", "example", "--dry-run")
    lines = [line for line in done.output.splitlines() if line.startswith("#      ") and " 350m-twin-s0-" in line]
    assert len(lines) > 3 and any(line.endswith("  350M, 1.0 M tokens") for line in lines)
    assert len({line.partition("  350M")[2] for line in lines}) == len(lines)


def test_a_dry_run_of_a_sweep_is_a_line_a_point():
    grid = ("-g", "train.tokens=1024,2048,1024", "-g", 'arms=["Dense"];["Dense","MoE-32"]')
    done = call("sweep", "pr-moe", "--scale", "smoke", "--profile", "local", *grid, "--dry-run")
    *points, last = done.output.splitlines()
    assert points == [
        f"train.tokens={tokens} arms={arms}: {n} runs, {n} of them to train"
        for tokens in (1024, 2048)
        for n, arms in ((1, '["Dense"]'), (2, '["Dense","MoE-32"]'))
    ]
    assert last.startswith("# nothing was queued: 4 runs and 4 notebooks would be"), done.output


def test_a_dry_run_tells_the_rates_of_an_arm_apart():
    said = call("run", "learning-rate", "--scale", "smoke", "--dry-run", "-p", "seeds=2").output
    rates = (0.004, 0.008, 0.016)
    assert all(f"Dense · 350M twin, rate {rate:g} · seeds 100-101 · new" in said for rate in rates), said
    assert "rate" not in call("run", "half-moe", "--scale", "smoke", "--dry-run").output


def test_a_dry_run_rounds_no_hour_to_zero():
    done = call("run", "half-moe", "--scale", "gpu", "--dry-run", env={"COLUMNS": "300"})
    said = done.output.replace("\n", " ")
    assert "FLOPs, under 1 A100 hour" in said and " 0 A100 hours" not in said
    assert "under 1 A100 hour at the paper's 46 TFLOP/s a GPU (Table 3); small models reach far less; " in said


def test_a_folder_that_cannot_be_written_is_refused_if_it_is_published_into(tiny_spec, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOELAB_RESULTS", str(tmp_path / "file" / "below"))
    preflight.check([tiny_spec], PROFILE)
    with pytest.raises(ValueError, match="file is not a folder; MOELAB_RESULTS names another"):
        preflight.check([tiny_spec], PROFILE, publish=True)


@pytest.mark.parametrize("command", ["submit", "sweep"])
def test_nothing_is_queued_if_anything_is_wrong(command, queued, tmp_path):
    (tmp_path / "site.yaml").write_text("nodes: 1\ngpus_per_node: 2\n")
    more = ["-p", "parallel.data=2"] if command == "submit" else ["-g", "parallel.data=1,2"]
    asked = [command, "pr-moe", "--scale", "smoke", "--profile", str(tmp_path / "site.yaml"), *more]
    assert call(*asked).exit_code == 0 and queued
    queued.clear()
    failed = call(*asked, "-p", "data.corpus=folder:/nowhere")
    assert isinstance(failed.exception, ValueError) and "is no folder" in str(failed.exception) and not queued


@pytest.mark.parametrize(
    ("names", "scale"),
    [
        (["pr-moe", "throughput"], "gpu"),  # the second is checked before the first is queued
        (["gating-kernels"], "paper"),
        (["zero-shot"], "gpu"),
        (["imported-model"], "gpu"),
    ],
)
def test_a_notebook_that_works_on_a_gpu_is_refused_where_it_gets_none(names, scale, queued, tmp_path):
    (tmp_path / "site.yaml").write_text("nodes: 16\ngpus_per_node: 8\n")
    failed = call("submit", *names, "--scale", scale, "--profile", str(tmp_path / "site.yaml"))
    assert str(failed.exception).startswith(f"{names[-1]}: its notebook measures on a GPU") and not queued


@pytest.mark.parametrize(("name", "scale"), [("gating-kernels", "paper"), ("imported-model", "gpu")])
def test_a_notebook_that_works_on_a_gpu_is_refused_here(name, scale):
    assert str(call("run", name, "--scale", scale).exception).startswith("no CUDA device is available here")
    dry = call("run", name, "--scale", scale, "--dry-run")
    assert dry.exit_code == 0 and dry.output.startswith("nothing to train")


def test_what_needs_slurm_is_refused_for_a_profile_without(monkeypatch):
    monkeypatch.setattr("moelab.slurm.jupyter.executor.for_jupyter", lambda *_: 1 / 0)
    failed = call("lab", "--profile", "processes")
    assert str(failed.exception).endswith("needs Slurm; profile processes has cluster: local")


def test_an_experiment_that_only_measures_queues_its_notebook_alone():
    done = call("submit", "throughput", "--scale", "smoke", "--profile", "example", "--dry-run")
    assert done.exit_code == 0 and "1 notebook" in done.output, done.output
    assert " run" not in done.output.splitlines()[-1]


def test_a_notebook_is_told_before_it_queues(tiny_spec, queued):
    spec = replace(tiny_spec, data=replace(tiny_spec.data, corpus="mix6"))
    with pytest.raises(ValueError, match="unknown corpus 'mix6'"):
        Lab(store=RunStore()).submit([spec], cluster="local")
    assert not queued
