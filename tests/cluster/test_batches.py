"""Submitting, watching and reading back, as users do it."""

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from moelab.config.parallel import ParallelConfig
from moelab.engine.launch.process import FINISHED
from moelab.files import read_json
from moelab.runs.store import RunStore
from moelab.runs.supervisor import supervise
from moelab.slurm import attempt, queue, submit
from moelab.slurm.status import overview
from tests.cluster.conftest import EVERY, ROOT, find_process, until
from tests.conftest import numbers

pytestmark = pytest.mark.slow


def moelab(*arguments: str, code: int = 0) -> str:
    done = subprocess.run([sys.executable, "-m", "moelab.cli", *arguments], capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def slurm(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def until_all_is_over() -> dict:
    until(lambda: all(row.over for row in overview(everything=True).rows), "the submissions to end", limit_s=1800)
    return {row.what if row.what.startswith("notebook") else row.id: row for row in overview(everything=True).rows}


def test_the_pr_moe_notebook_and_its_array_of_two_node_runs(workplace, tmp_path):
    text = (ROOT / "slurm" / "local.yaml").read_text().replace("gpus_per_node: 8", "gpus_per_node: 1")
    (tmp_path / "two.yaml").write_text(text)
    command = ("submit", "pr-moe", "--scale", "smoke", "--profile", str(tmp_path / "two.yaml"), "-p", "parallel.data=2")
    command = (*command, "-p", 'arms=["Dense","MoE-128"]')
    out = moelab(*command)
    assert "2 runs" in out and "notebook, after its runs" in out and "moelab status" in out
    assert "nothing to submit; 2 are queued already and so is the notebook" in moelab(*command)
    (array, notebook) = submit.submissions()[0].parts
    assert array.job in {job.id.partition("_")[0] for job in queue.jobs().values() if job.part == "runs-0"}
    script = (submit.submissions()[0].folder / f"{array.job}_submission.sh").read_text()
    assert "#SBATCH --nodes=2" in script and "#SBATCH --array=0-1%2" in script
    # The notebook is killed while it runs, and runs again.
    until((submit.submissions()[0].folder / "notebook-0.progress.json").exists, "the notebook")
    os.kill(find_process(notebook.job, workplace.cluster, "moelab.slurm.notebook_job"), signal.SIGKILL)
    rows = until_all_is_over()
    assert {row.state for row in rows.values()} == {"finished"}, rows
    (result,) = (workplace.home / "results" / "pr-moe" / "smoke").iterdir()
    summary = read_json(result / "summary.json")
    assert len(summary["runs"]) == 2 and not summary["missing"]
    assert {run["provenance"]["parallel"]["data"] for run in summary["runs"]} == {2}
    assert {run["provenance"]["commit"] for run in summary["runs"]} == {summary["provenance"]["commit"]} != {None}
    log = moelab("logs", f"{submit.submissions()[0].id}/{notebook.name}", "-n", "0")
    assert log.count("cell 1 of ") == 2 and "all 2 runs have a result" in log
    # A second time: finished runs and notebooks are left alone.
    assert "nothing to submit; 2 runs are finished" in moelab(*command)
    assert "pr-moe" in moelab("status") and len(submit.submissions()) == 1


def test_a_sweep_loses_only_the_points_of_a_lost_run(workplace, tmp_path):
    grid = ("-g", 'arms=["Dense","MoE-32"];["Dense","MoE-128"]', "-g", "train.tokens=1024,2048")
    command = ("sweep", "pr-moe", "--scale", "smoke", "--profile", "local", *grid)
    out = moelab(*command)
    assert "6 runs" in out and out.count("notebook, after") == 4, "runs that points share are trained once"
    (submission,) = submit.submissions()
    lost = next(run for run in submission.parts[0].runs if run.startswith("350m-moe-32"))
    queue.cancel([f"{submission.parts[0].job}_{submission.parts[0].runs.index(lost)}"])
    rows = until_all_is_over()
    states = sorted(row.state for name, row in rows.items() if name.startswith("notebook"))
    assert states == ["finished"] * 3 + ["incomplete"]
    (row,) = [row for row in rows.values() if row.state == "incomplete"]
    assert lost in row.reason
    results = (workplace.home / "results" / "pr-moe" / "smoke").iterdir()
    (published,) = (p for p in results if lost in read_json(p / "summary.json")["missing"])
    outputs = (o for c in nbformat.read(published / "notebook.ipynb", 4).cells for o in c.get("outputs", []))
    shown = "".join(o.get("text", "") for o in outputs)
    assert "MoE-32, seed 0" in shown, "the notebook says what is missing"
    (compared,) = (workplace.home / "results" / "pr-moe" / "smoke-sweep").iterdir()
    assert read_json(compared / "summary.json")["missing"] == [lost], "the last notebook compares the points"
    assert len((compared / "points.jsonl").read_text().splitlines()) == 7 and (compared / "points.svg").exists()
    out = moelab(*command, "--dry-run")
    assert out.count(", 1 of them to train") == 1, "only the lost run is left"
    assert out.count(", 0 of them to train") == 3


def test_a_run_on_two_nodes_is_interrupted_loses_a_rank_and_ends_with_the_same_numbers(workplace, spec, tmp_path):
    two = replace(spec, train=replace(spec.train, micro_batch=2), parallel=ParallelConfig(data=2, expert=2, gpus_per_node=1))  # fmt: skip
    local = RunStore(tmp_path / "local").run(two)
    assert supervise(local) == FINISHED
    (run,) = workplace.submit(two, halt=[30, 70])
    workplace.halted(run, 30)
    job = workplace.job(run)
    assert len(slurm("scontrol", "show", "hostnames", job.node).split()) == 2
    slurm("scontrol", "requeue", job.id)
    until(lambda: attempt.newest_checkpoint(run) >= 30, "the checkpoint")
    first = workplace.halted(run, 70)
    os.kill(workplace.rank(run, 1), signal.SIGKILL)
    os.kill(first, signal.SIGCONT)
    until(lambda: attempt.history(run), "the attempt's record")
    assert [(a.kind, a.checkpoint, a.again) for a in attempt.history(run)] == [("killed", EVERY, True)]
    workplace.until_over(run)
    assert numbers(run.path) == numbers(local.path)


def test_steps_start_in_a_container(workplace, spec, undisturbed, tmp_path):
    """The development cluster's containers see as /mnt what is in their rootfs; the interpreter's path is one that only exists inside."""
    (tmp_path / "image" / "rootfs").mkdir(parents=True)
    (tmp_path / "image" / "rootfs" / "env").symlink_to(sys.prefix)
    (tmp_path / "image" / "config.json").write_text('{"ociVersion": "1.0.0", "root": {"path": "rootfs"}}')
    may = subprocess.run(["unshare", "--mount", "mount", "--bind", tmp_path, "/mnt"], capture_output=True, text=True)
    if may.returncode:
        pytest.skip(f"containers need mounts: {may.stderr.strip()}")
    inside = {"container": (f"--container={tmp_path}/image",), "python": "/mnt/env/bin/python"}
    assert not Path("/mnt/env").exists()
    bad = replace(spec, data=replace(spec.data, corpus=f"folder:{tmp_path}/nothing"))
    (lost,) = workplace.submit(bad, **inside)
    run, pid = workplace.halts(spec, **inside)
    assert Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"/mnt/env/bin/python\0")
    slurm("scontrol", "requeue", workplace.job(run).id)
    workplace.until_over(run, lost)
    assert numbers(run.path) == numbers(undisturbed.path)
    assert [a.kind for a in attempt.history(lost)] == ["failed", "failed"]
    (row,) = overview([bad.id]).rows
    assert row.state == "failed" and row.reason.startswith("failed twice the same way: ") and "nothing" in row.reason


def test_from_a_notebook_on_the_login_node(workplace, spec, tmp_path, monkeypatch):
    """In a kernel: submits, shows live how it goes, reads back."""
    monkeypatch.setenv("MOELAB_PROFILE", "local")
    (tmp_path / "spec.json").write_text(json.dumps(spec.to_json()))
    cells = [
        f"""import json
from pathlib import Path
from moelab.lab import Lab, RunSpec
spec = RunSpec.from_json(json.loads(Path({str(tmp_path / "spec.json")!r}).read_text()))
lab = Lab()
print(list(lab.submit([spec]).frame()["state"]))""",
        """(run,) = lab.run([spec], executor="slurm")
print(run.finished, run.result["validation_loss"])""",
        "lab.status()",
    ]
    notebook = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, cells)))
    NotebookClient(notebook, timeout=1800, kernel_name="python3").execute()
    asked, ran, status = (cell.outputs for cell in notebook.cells)
    (run,) = (workplace.home / "runs").iterdir()
    assert asked[-1].text.strip() in ("['waiting']", "['starting']")
    assert f"True {read_json(run / 'result.json')['validation_loss']}" in ran[-1].text
    # One table, renewed in place until all is over; then the progress bar of what was read back.
    table = next(output.data["text/html"] for output in ran if "text/html" in output.get("data", {}))
    assert "finished" in table and "waiting" not in table
    assert "finished" in status[0].data["text/html"]


def test_jupyterlab_in_an_allocation(workplace):
    command = [sys.executable, "-m", "moelab.cli", "lab", "--profile", "local", "--allow-root"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if "then open" in line:
                break
        (tunnel,) = [line for line in said if "ssh -N -L" in line]
        address = said[-1].split()[-1]
        assert "127.0.0.1:" in tunnel and "@node" in tunnel
        with urllib.request.urlopen(address.replace("/lab?", "/api/status?")) as response:
            assert response.status == 200
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(address.split("/lab?")[0] + "/api/status")
        (folder,) = (workplace.home / "lab").iterdir()
        (record,) = folder.glob("node*/jpserver-*.json")
        assert (record.stat().st_mode | folder.stat().st_mode) & 0o077 == 0
        written = [path.read_bytes() for path in folder.glob("*_sub*")]
        assert len(written) == 2 and not any(address.split("=")[1].encode() in text for text in written)
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(300) == 0
    assert not slurm("squeue", "-h", "-n", "moelab-lab", "-t", "RUNNING")


@pytest.mark.parametrize(
    ("profile", "part"),
    [
        ("partition: nope\n", "invalid partition specified: nope"),
        ("partition: debug\nmemory_per_rank: 900G\n", "not available"),
    ],
)
def test_what_slurm_refuses_is_one_line_and_queues_nothing(workplace, tmp_path, profile, part):
    (tmp_path / "wrong.yaml").write_text(profile)
    before = set(queue.jobs())
    said = moelab("submit", "pr-moe", "--scale", "smoke", "--profile", str(tmp_path / "wrong.yaml"), code=2)
    assert part in said and len(said.strip().splitlines()) == 1
    assert set(queue.jobs()) <= before, "ended jobs may have been forgotten meanwhile"
    assert not [*(workplace.home / "submissions").glob("2*"), *(workplace.home / "runs").glob("*")]
