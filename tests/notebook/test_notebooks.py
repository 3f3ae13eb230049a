"""Executing notebooks through papermill: what they print shows at once, and every way to fail says where."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import nbformat
import pytest

from moelab import paths
from moelab.design.experiment import Experiment, Scale
from moelab.design.parameters import resolve
from moelab.experiments import pr_moe
from moelab.files import write_json
from moelab.notebook import execute as notebooks
from moelab.notebook.watch import execute_watched
from moelab.report.summary import compared
from moelab.runs import records
from moelab.runs.measurements import file_digest
from moelab.runs.store import RunStore

pytestmark = [pytest.mark.notebook, pytest.mark.slow]

PARAMETERS = """scale: str = "smoke"  # size
sizes: list[int] = [1]  # numbers
rates: dict[str, float] = {}  # by name
fail: str = ""  # how
"""
BODY = [
    "print('first', sizes, rates)",
    """import os
if fail == "raise":
    raise ValueError("no luck")
if fail == "runs":
    from moelab.runs.collection import NoResult, Runs
    raise NoResult("8 of 8 runs: no space", Runs([]))
if fail == "places":
    from moelab import paths
    paths.checkout = lambda: None
    print("home", paths.home(), "results", paths.results())
if fail == "stop":
    import time
    os.kill(os.getppid(), 2)
    time.sleep(60)
if fail.isdigit():
    os.kill(os.getpid(), int(fail))
if fail == "exit":
    os._exit(3)""",
    """import json
from pathlib import Path
from ipykernel.connect import get_connection_info
print(get_connection_info(unpack=True)["transport"])
said = {"experiment": "x", "scale": "smoke", "title": "Found", "finished": "2026-12-03T00:00:00", "missing": []}
Path(os.environ["MOELAB_PUBLICATION"], "summary.json").write_text(json.dumps(said))""",
]
EXPERIMENT = Experiment(
    name="x", number=1, title="X", paper="none", question="?", paper_answer="!", scales={"smoke": Scale("w", "c")}
)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    cells = [
        nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]}),
        *map(nbformat.v4.new_code_cell, BODY),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "01_x.ipynb")
    monkeypatch.setenv("MOELAB_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MOELAB_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(paths, "notebooks", lambda: tmp_path)
    return tmp_path


@pytest.fixture
def interrupts(monkeypatch):
    """The kernels that were interrupted. One that has just replied would log a KeyboardInterrupt, on a good run."""
    from jupyter_client.manager import AsyncKernelManager

    seen, interrupt = [], AsyncKernelManager._async_interrupt_kernel

    async def noted(self):
        seen.append(self)
        await interrupt(self)

    monkeypatch.setattr(AsyncKernelManager, "_async_interrupt_kernel", noted)
    return seen


def given(**texts: str):
    return resolve(EXPERIMENT, texts).values


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"sizes": "[1.5]"}, r"x: parameter sizes\.0 must be a whole number, got 1\.5; allowed: "),
        ({"rates": '{"a": "b"}'}, r"x: parameter rates\.a must be a number, got 'b'; allowed: "),
        ({"fail": "raise\udc80"}, r"x: .*not valid Unicode text: .*\\udc80"),
        ({"rates": '{"\\ud800": 1}'}, r"x: .*not valid Unicode text: .*\\ud800"),
    ],
)
def test_a_parameter_of_another_type_or_that_is_no_text_is_refused_before_anything_is_made(place, texts, message):
    """What is read as which type: tests/config."""
    with pytest.raises(ValueError, match=message) as error:
        given(**texts)
    assert "\n" not in str(error.value) and not (place / "home").exists()


def test_a_path_is_one_from_the_folder_of_the_command(place, monkeypatch):
    (place / "here").mkdir()
    monkeypatch.chdir(place)
    assert given(fail="./here")["fail"] == str(place / "here"), "the kernel works in another folder"
    assert (given(fail="here")["fail"], given(fail="no/such")["fail"]) == ("here", "no/such")


def test_what_it_prints_shows_while_it_runs_and_which_cell_it_is_at(place, interrupts):
    log, progress = io.StringIO(), place / "progress.json"
    values = given(sizes="[1, 2]", rates='{"a": 1}')
    result = notebooks.execute(EXPERIMENT, values, place / "plan.json", log=log, progress=progress)
    lines = log.getvalue().splitlines()
    assert [line.partition("] ")[2] for line in lines if "cell" in line] == [f"cell {i} of 5" for i in range(1, 6)]
    assert "first [1, 2] {'a': 1.0}" in lines, "parameters keep their types"
    assert "ipc" in lines, "no ports, so no race for them"
    assert json.loads(progress.read_text())["cell"] == 5
    assert result.parent == place / "home" / "results" / "x" / "smoke"
    assert not (place / "results").exists(), "publishing is asked for"
    public = notebooks.execute(EXPERIMENT, values, place / "plan.json", publish=True)
    assert public.parent == place / "results" / "x" / "smoke" and not interrupts


def test_what_failed_stays_a_week_and_a_clock_that_went_back_is_named(place, capsys):
    publishing, week = place / "home" / "publishing", 7 * 24 * 3600
    for name, age in (("x-old", week + 60), ("x-new", week - 3600)):
        (publishing / name).mkdir(parents=True)
        for entry in (publishing / f"{name}.log", publishing / name):
            entry.touch()
            os.utime(entry, (time.time() - age,) * 2)
    (place / "home" / "results" / "x" / "smoke" / "20990101-000000").mkdir(parents=True)
    notebooks.execute(EXPERIMENT, given(), place / "plan.json")
    assert {entry.name for entry in publishing.iterdir()} == {"x-new", "x-new.log"}, "a result needs no log"
    assert "dated by this machine's clock, before the result 20990101-000000" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fail", "why"),
    [
        ("raise", "ValueError: no luck"),
        ("9", r"the kernel was killed by SIGKILL( \(out of memory\?\))? \("),
        ("7", r"the kernel was killed by SIGBUS \("),
        ("exit", r"the kernel ended with exit code 3 \("),
    ],
)
def test_a_failure_leaves_the_executed_copy_with_the_error_on_top(place, interrupts, fail, why):
    with pytest.raises(notebooks.NotebookFailed, match=f"01_x.ipynb, cell .: {why}") as error:
        notebooks.execute(EXPERIMENT, given(fail=fail), place / "plan.json")
    copy = Path(str(error.value).partition("executed copy: ")[2].rstrip(")"))
    cells = nbformat.read(copy, as_version=4).cells
    assert cells[0].cell_type == "markdown" and ("Exception" in cells[0].source or "the kernel" in cells[0].source)
    assert any("first [1]" in str(cell.get("outputs", "")) for cell in cells), "what was done is kept"
    assert not (place / "home" / "results").exists()
    assert "first [1]" in copy.parent.with_name(f"{copy.parent.name}.log").read_text()
    assert fail != "raise" or not interrupts


def test_a_kernel_that_dies_before_it_is_ready_says_how(place, monkeypatch):
    (place / "sitecustomize.py").write_text(
        "import os, sys\nif 'ipykernel_launcher' in sys.orig_argv:\n    os.write(2, b'no luck\\n')\n    os._exit(4)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(place))
    with pytest.raises(notebooks.NotebookFailed, match=r"cell 0: the kernel ended with exit code 4 \("):
        notebooks.execute(EXPERIMENT, given(), place / "plan.json")
    (log,) = (place / "home" / "publishing").glob("*.log")
    assert log.read_text() == "no luck\n", "and not in the terminal, where it would come after the last line"


@pytest.mark.parametrize("noted", [True, False])
def test_a_kernel_that_works_is_interrupted_also_before_its_request_is_noted(place, monkeypatch, interrupts, noted):
    from jupyter_client.asynchronous import AsyncKernelClient

    send = AsyncKernelClient.execute

    def sent_then_stopped(self, code, **options):
        send(self, code, **options)
        raise KeyboardInterrupt

    if not noted:
        monkeypatch.setattr(AsyncKernelClient, "execute", sent_then_stopped)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            notebooks.execute(EXPERIMENT, given(fail="stop"), place / "plan.json")
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(interrupts) == 1


def test_an_interrupt_does_not_come_again_as_the_loop_goes_on():
    """One that ended a task waits in each task that waits for it: the next notebook ended there, one time in fifty."""
    import asyncio

    from jupyter_core.utils import ensure_event_loop

    async def interrupted():
        raise KeyboardInterrupt

    async def waiting():
        await asyncio.wait_for(asyncio.ensure_future(interrupted()), 60)

    loop = ensure_event_loop()
    for settle in (False, True):
        with pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(waiting())
        if settle:
            notebooks._settle()
        with contextlib.nullcontext() if settle else pytest.raises(KeyboardInterrupt):
            loop.run_until_complete(asyncio.sleep(0.01))


def test_failed_runs_are_the_reason_not_the_cell(place):
    with pytest.raises(notebooks.NotebookFailed, match=r"^8 of 8 runs: no space \(executed copy: "):
        notebooks.execute(EXPERIMENT, given(fail="runs"), place / "plan.json")


def test_the_kernel_of_an_installed_copy_has_the_commands_folders(place, monkeypatch):
    """Outside a checkout both follow from the current folder, which is another one in the kernel."""
    monkeypatch.chdir(place)
    monkeypatch.delenv("MOELAB_HOME")
    monkeypatch.delenv("MOELAB_RESULTS")
    monkeypatch.setattr(paths, "checkout", lambda: None)
    log = io.StringIO()
    notebooks.execute(EXPERIMENT, given(fail="places"), place / "plan.json", log=log)
    assert f"home {place / '.moelab'} results {place / 'results'}" in log.getvalue()


def _execute(place: str) -> str:
    paths.notebooks = lambda: Path(place)
    return str(notebooks.execute(EXPERIMENT, given(), Path(place) / "plan.json"))


def test_many_at_once_keep_to_themselves(place):
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        results = list(pool.map(_execute, [str(place)] * 2))
    assert len(set(results)) == 2 and all((Path(r) / "summary.json").exists() for r in results)


def test_a_reply_whose_signal_was_taken_is_found():
    """jupyter_client's own channel waits forever here."""
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    import zmq.asyncio
    from jupyter_client.session import Session

    manager = notebooks._kernel_manager([])()
    channel_class, session = type(manager.client().shell_channel), Session(key=b"key")

    async def wait():
        with zmq.Context() as far, zmq.asyncio.Context() as near:
            kernel, client = far.socket(zmq.ROUTER), near.socket(zmq.DEALER)
            try:
                client.connect(f"tcp://127.0.0.1:{kernel.bind_to_random_port('tcp://127.0.0.1')}")
                channel = channel_class(client, session)
                channel.send(session.msg("execute_request"))
                identity = kernel.recv_multipart()[0]
                reply = asyncio.ensure_future(channel.get_msg())
                await asyncio.sleep(0.1)  # it waits
                session.send(kernel, "execute_reply", ident=identity)
                while not client.getsockopt(zmq.EVENTS) & zmq.POLLIN:  # the reply is here, and its signal gone
                    pass
                return await asyncio.wait_for(reply, 60)
            finally:
                kernel.close(0)
                client.close(0)

    with ThreadPoolExecutor(1) as own:  # the browser's tests leave a loop running in this thread
        assert own.submit(lambda: asyncio.run(wait())).result()["msg_type"] == "execute_reply"


def test_a_run_is_compared_with_its_published_loss(tmp_path, monkeypatch):
    def summary(losses, cpu):
        spec, machine = {"train": {"seed": 3}}, {"hardware": {"cpu": cpu}}
        runs = [(f"r{i}", {} if loss is None else {"validation_loss": loss}) for i, loss in enumerate(losses)]
        rows = [{"id": i, "label": "Dense", "spec": spec, "result": r, "provenance": machine} for i, r in runs]
        return {"experiment": "start", "runs": rows}

    folder = tmp_path / "start" / "cpu" / "1"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary([5.76, 5.68, 5.0], "Zen")))
    monkeypatch.setenv("MOELAB_RESULTS", str(tmp_path))
    said = "Dense, seed 3: published 5.760, yours 5.774 nats per token, "
    assert compared(summary([5.774], "Xeon")) == said + "another processor (expected within 0.02)"
    same = compared(summary([5.774, 5.681, None, 1.0], "Zen"))
    assert same == said + "the same processor; the farthest apart of 2 runs"
    assert compared(summary([], "Zen")) == "" == compared(summary([5.0], "Zen") | {"experiment": "x"})


def test_who_publishes_hears_of_runs_whose_records_lack_numbers(tmp_path, monkeypatch, capsys, result):
    """Scores, say, that the notebook measured after the runs were exported."""
    monkeypatch.setenv("MOELAB_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MOELAB_RESULTS", str(tmp_path / "results"))
    old, new = (RunStore().run(spec) for spec in pr_moe.EXPERIMENT.specs("smoke", 2, arms=["Dense"]))
    for run in (old, new):
        write_json(run.path / "result.json", result())
    runs = [{"id": run.spec.id} for run in (old, new, new)]
    write_json(tmp_path / "summary.json", {"title": "Found", "figures": [], "missing": [], "runs": runs})
    monkeypatch.setattr(notebooks, "execute", lambda *_, **__: tmp_path)

    def said():
        assert execute_watched(EXPERIMENT, {}, publish=True, page=False)
        return [line for line in capsys.readouterr().out.splitlines() if "runs export --publish" in line]

    records.write([old], records.folder())
    (line,) = said()
    assert line.startswith("1 of its 2 runs are not in") and line.endswith(f"--publish {new.spec.id}` packs them")
    records.write([new], records.folder())
    assert not said()
    there = {"format": 1, "result": file_digest(old.path / "result.json"), "code": "", "value": 1}
    write_json(old.path / "measured" / "score-0.json", there)
    (line,) = said()
    assert f"--publish {old.spec.id}`" in line
    records.write([old], records.folder())
    write_json(old.path / "measured" / "score-0.json", there | {"code": "later"})
    assert not said(), "the same value, measured again"


def test_an_interrupt_while_commands_are_imported_leaves_no_traceback():
    code = (
        "import sys; name = sys.argv[1]\n"
        "class Interrupt:\n"
        "    def find_spec(self, found, path=None, target=None):\n"
        "        if found == name: raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from moelab.__main__ import main\n"
        "sys.argv[1:] = ['list']; main()"
    )
    for name in ("moelab.cli", "typer", "moelab.experiments"):
        done = subprocess.run([sys.executable, "-c", code, name], capture_output=True, text=True)
        assert (done.returncode, done.stderr.strip()) == (130, ""), name
