"""Execute an experiment's notebook by papermill, and publish the whole result or nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import Empty
from typing import Any, TextIO

from traitlets import Type, Unicode, default

from moelab import environment, paths
from moelab.engine.launch import postmortem
from moelab.experiments import Experiment
from moelab.files import read_json, sweep, write_json
from moelab.report.publication import SUMMARY
from moelab.report.site import convert
from moelab.report.summary import parse
from moelab.runs.collection import NoResult
from moelab.terminal import one_line

_KEPT_S = 7 * 24 * 3600.0


class NotebookFailed(RuntimeError):
    """A notebook stopped at an error; the message names the cell, the error and the executed copy."""


class KernelDied(RuntimeError):
    """A notebook's kernel ended before its notebook; the message says how, with the signal or the exit code."""


def execute(
    experiment: Experiment,
    values: Mapping[str, Any],
    plan: Path,
    *,
    log: TextIO | None = None,
    progress: Path | None = None,
    publish: bool = False,
) -> Path:
    """Execute the notebook with these parameter values; returns the folder of the result.

    Everything is made in `.moelab/publishing/` and moved into the user's own results in one step, so a failed or killed
    notebook publishes nothing.

    Args:
        values: parameters, the scale among them, see `moelab.design.parameters.Request`.
        plan: file in which the notebook lists the runs it waits for, for whoever shows progress.
        log: where what the notebook prints goes while it runs, cell by cell; by default a file beside the executed
            copy, which is removed when there is a result.
        publish: move it into the published results instead.
        progress: file that says which cell runs: ``{"cell": 3, "cells": 12, "started": seconds since the epoch}``.

    Raises:
        NotebookFailed: a cell raised, or the kernel died; the executed copy, with the error on top, stays in
            `.moelab/publishing/` for a week.
        KeyboardInterrupt: stopped; the executed copy says where.
    """
    import papermill
    from nbclient.exceptions import CellTimeoutError

    scale = values["scale"]
    name = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    (publishing := paths.home() / "publishing").mkdir(parents=True, exist_ok=True)
    _clear_out(publishing)
    # Notebooks of a sweep start in the same second, on several machines.
    staging = Path(tempfile.mkdtemp(prefix=f"{experiment.name}-{scale}-{name}-", dir=publishing))
    staging.chmod(0o755)
    copy = staging / "notebook.ipynb"
    at = [0]

    own_log = log is None
    with contextlib.ExitStack() as stack:
        if log is None:
            log = stack.enter_context(
                open(staging.parent / f"{staging.name}.log", "w", encoding="utf-8", errors="replace")
            )
        places = {
            # The kernel works in the staging folder, where an installed copy would make a home of its own.
            environment.HOME.name: str(paths.home()),
            environment.RESULTS.name: str(paths.results()),
            environment.PUBLICATION.name: str(staging),
            environment.PLAN.name: str(plan),
        }
        stack.enter_context(environment.overridden(places))

        def on_cell(cell: int, cells: int) -> None:
            at[0] = cell
            print(f"[{time.strftime('%H:%M:%S')}] cell {cell} of {cells}", file=log, flush=True)
            if progress:
                write_json(progress, {"cell": cell, "cells": cells, "started": time.time()})

        try:
            run(paths.notebooks() / experiment.notebook, copy, values, log=log, on_cell=on_cell)
        except papermill.PapermillExecutionError as error:
            why = (str(error.evalue).splitlines() or [""])[0]
            if error.ename != NoResult.__name__:  # which cell asked for the runs is not what went wrong
                why = f"{experiment.notebook}, cell {error.exec_count}: {error.ename}: {why}"
            raise NotebookFailed(f"{why} (executed copy: {copy})") from None
        except (KernelDied, CellTimeoutError) as error:
            why = one_line(error)
            _error_on_top(copy, f"Stopped in cell {at[0]}: {why}")
            raise NotebookFailed(f"{experiment.notebook}, cell {at[0]}: {why} (executed copy: {copy})") from None
        except KeyboardInterrupt:
            _error_on_top(copy, f"Interrupted in cell {at[0]}")
            raise
    if not (staging / SUMMARY).exists():
        raise NotebookFailed(f"{experiment.notebook} ended without publishing a result (executed copy: {copy})")
    _forget_places(copy)
    if publish:  # pages of own results are made in the workspace, see moelab.report.site.workspace
        convert(copy, parse(read_json(staging / SUMMARY)).figures)
    place = Path(experiment.name, scale)
    while any((root / place / name).exists() for root in paths.all_results()):
        name += "x"
    target = paths.results_for(publish) / place / name
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target.parent)
    # Moved beside its place first: results may be on another disk than the home folder, and only a rename is one step.
    beside = target.with_name(f".{staging.name}")
    shutil.move(staging, beside)
    while True:
        try:
            os.rename(beside, target)  # fails where there is a folder with something in it: nothing is overwritten
            break
        except OSError:
            if not target.exists():
                raise
            target = target.with_name(target.name + "x")
    if own_log:
        (publishing / f"{staging.name}.log").unlink(missing_ok=True)  # the executed notebook has all that it has
    later = [path.name for path in target.parent.glob("[0-9]*") if path.name > target.name]
    if later:
        print(
            f"{target}: dated by this machine's clock, before the result {max(later)}; has the clock gone back? The "
            "later date counts as the newer result",
            file=sys.stderr,
        )
    return target


def _clear_out(publishing: Path) -> None:
    """Remove what notebooks that failed or were killed left more than a week ago."""
    before = time.time() - _KEPT_S
    for entry in publishing.iterdir():
        with contextlib.suppress(OSError):
            if entry.stat().st_mtime < before:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def run(
    notebook: Path,
    copy: Path,
    values: Mapping[str, Any] | None = None,
    *,
    log: TextIO | None = None,
    on_cell: Callable[[int, int], None] = lambda cell, cells: None,
) -> None:
    """Execute any notebook by papermill, with our kernels, in the folder of the executed copy.

    Args:
        values: parameters.
        log: where what the notebook prints goes while it runs.
        on_cell: called before each code cell with its number, from 1, and their count.

    Raises:
        KernelDied: the kernel ended, or could not be started.
        papermill's and nbclient's exceptions.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError

    codes: list[int] = []
    oom_kills = postmortem.oom_kills()

    # Sockets belong on this machine's own disk: a home folder on a network has no room for them, or a path too long.
    with tempfile.TemporaryDirectory(prefix="moelab-") as sockets:
        jupyter = {"JUPYTER_PREFER_ENV_PATH": "1", "JUPYTER_RUNTIME_DIR": sockets}
        with environment.overridden(jupyter):
            try:
                papermill.execute_notebook(
                    str(notebook),
                    str(copy),
                    parameters=dict(values or {}),
                    engine_name=_engine(),
                    kernel_name="python3",
                    kernel_manager_class=_kernel_manager(codes, log),
                    progress_bar=False,
                    start_timeout=600,  # the first start compiles every module, on a network's disk perhaps
                    iopub_timeout=120,  # a cell's last output may come late on a busy machine; the default gives it 4 s
                    cwd=str(copy.parent),
                    stdout_file=log,
                    stderr_file=log,
                    on_cell=on_cell,
                )
            except KeyboardInterrupt:
                _settle()
                raise
            except RuntimeError as error:  # what says that the kernel died before it was ready has no class of its own
                if not isinstance(error, DeadKernelError) and not codes:
                    raise
                raise KernelDied(_death(codes, postmortem.oom_kills() > oom_kills)) from None


def _settle(timeout_s: float = 10.0) -> None:
    """End the tasks that a KeyboardInterrupt left in this thread's event loop.

    asyncio hands the interrupt of a task to each task that waits for it, and each raises it again as the loop goes on:
    out of the kernel's shutdown, and out of the next notebook.
    """
    import asyncio

    from jupyter_core.utils import ensure_event_loop

    loop, end = ensure_event_loop(), time.monotonic() + timeout_s
    while (tasks := asyncio.all_tasks(loop)) and (left := end - time.monotonic()) > 0:
        with contextlib.suppress(KeyboardInterrupt):
            loop.run_until_complete(asyncio.wait(tasks, timeout=left))
        for task in tasks:
            if task.done() and not task.cancelled():
                task.exception()  # one that nobody looks at is printed


def _death(codes: list[int], oom_kill: bool) -> str:
    """Say in one line how the kernel ended.

    Args:
        codes: exit codes of the kernel, of which the last counts; negative for a signal.
        oom_kill: whether the operating system has killed a process for lack of memory meanwhile.
    """
    if not codes:
        return "the kernel died"
    how = postmortem.End.of(codes[-1], "", oom_kill).how
    unknown = how == "was killed by SIGKILL"  # the operating system gives no reason
    return f"the kernel {how}" + " (out of memory?)" * unknown


def _forget_places(notebook: Path) -> None:
    """Papermill notes where it read and wrote on this machine; a published copy lies elsewhere."""
    import nbformat

    content = nbformat.read(notebook, as_version=4)
    for key in ("input_path", "output_path"):
        content.metadata["papermill"][key] = Path(content.metadata["papermill"][key]).name
    nbformat.write(content, notebook)


def _error_on_top(notebook: Path, message: str) -> None:
    """Write papermill's error banner of a failed cell, for ends that papermill does not notice."""
    import nbformat

    if notebook.exists():
        content = nbformat.read(notebook, as_version=4)
        content.cells.insert(0, nbformat.v4.new_markdown_cell(f"**{message}**"))
        nbformat.write(content, notebook)


def _engine() -> str:
    """Papermill's own engine, telling `on_cell` (number from 1, of all) before each code cell."""
    from papermill.engines import NBClientEngine, papermill_engines

    class CellEngine(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man, kernel_name, *, on_cell: Callable[[int, int], None], **options):
            code = [i for i, cell in enumerate(nb_man.nb.cells) if cell.cell_type == "code"]
            start = nb_man.cell_start

            def cell_start(cell, cell_index=None, **more):
                if cell_index in code:
                    on_cell(code.index(cell_index) + 1, len(code))
                return start(cell, cell_index, **more)

            nb_man.cell_start = cell_start
            return super().execute_managed_notebook(nb_man, kernel_name, **options)

    papermill_engines.register("moelab", CellEngine)
    return "moelab"


def _kernel_manager(codes: list[int], log: TextIO | None = None) -> type:
    """Return a kernel manager that uses Unix sockets where possible: no races for ports, nothing on the network.

    Its clients look for a reply every second besides waiting for it. A widget's output makes nbclient send to the
    kernel while it waits; jupyter_client sends past the event loop, which can take the signal of a reply that has just
    come, and the wait would never end (nbclient issue 312).

    The shutdown interrupts only a kernel that works: one that has just replied would log a KeyboardInterrupt.

    Args:
        codes: gets the exit code of a kernel that is found dead; negative for a signal.
        log: gets what the kernel's process prints outside of cells, as it starts and ends; without a file behind it,
            this process's own output does.
    """
    from jupyter_client.asynchronous import AsyncKernelClient
    from jupyter_client.channels import AsyncZMQSocketChannel
    from jupyter_client.manager import AsyncKernelManager

    unanswered: set[str] = set()

    class PatientChannel(AsyncZMQSocketChannel):
        async def get_msg(self, timeout: float | None = None) -> dict[str, Any]:  # type: ignore[override]  # as theirs
            while timeout is None:
                with contextlib.suppress(Empty):
                    return self._noted(await super().get_msg(1.0))
            return self._noted(await super().get_msg(timeout))

        def _noted(self, message: dict[str, Any]) -> dict[str, Any]:
            unanswered.discard(message["parent_header"].get("msg_id"))
            return message

    class Client(AsyncKernelClient):
        shell_channel_class = Type(PatientChannel)

        def execute(self, *arguments: Any, **options: Any) -> str:
            # The kernel can be at work, and a signal end this call, before the request's id is known here.
            unanswered.add("being sent")
            unanswered.add(request := super().execute(*arguments, **options))
            unanswered.discard("being sent")
            return request

    sockets = os.environ.get("JUPYTER_RUNTIME_DIR", "")

    class Manager(AsyncKernelManager):
        client_factory = Type(klass=AsyncKernelClient, default_value=Client)
        # The name of a socket has at most 107 bytes.
        transport = Unicode("ipc" if os.name == "posix" and len(sockets) < 80 else "tcp")

        @default("connection_file")
        def _place(self) -> str:
            """Return where the sockets lie as well: by default that is the kernel's working folder."""
            return str(Path(sockets) / "kernel.json")

        async def _async_launch_kernel(self, kernel_cmd: list[str], **options: Any) -> None:
            with contextlib.suppress(OSError, AttributeError):  # no file: io.UnsupportedOperation is an OSError
                options |= {"stdout": log.fileno(), "stderr": log.fileno()} if log else {}
            await super()._async_launch_kernel(kernel_cmd, **options)

        async def _async_is_alive(self) -> bool:
            alive = await super()._async_is_alive()
            process = getattr(self.provisioner, "process", None)
            if not alive and process is not None:
                codes.append(process.returncode)
            return alive

        is_alive = _async_is_alive

        async def _async_interrupt_kernel(self) -> None:
            if unanswered:
                await super()._async_interrupt_kernel()

    return Manager
