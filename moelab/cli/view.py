"""`moelab lab`, `browse`, `tensorboard`, `doctor`: open notebooks and results, check the installation."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from moelab import environment, paths
from moelab.cli._options import AsJson, OwnProfile, print_json, run_names


def lab(
    context: typer.Context,
    profile: OwnProfile = None,
    originals: Annotated[
        bool, typer.Option("--originals", help="the notebooks themselves instead of copies in the workspace")
    ] = False,
) -> None:
    """Open JupyterLab on copies of the notebooks.

    On 127.0.0.1, or with --profile on a node of a cluster. Further arguments are JupyterLab's.
    """
    from moelab.notebook import copies

    folder = paths.notebooks() if originals else copies.update()
    if profile is not None:
        from moelab.slurm import jupyter, profiles

        raise typer.Exit(jupyter.start(profiles.load(profile), folder, context.args))
    if os.geteuid() == 0 and "--allow-root" not in context.args:
        raise ValueError("lab: JupyterLab refuses to run as root; use another account, or: moelab lab --allow-root")
    # Outside a checkout, a kernel would take its own current folder for these.
    places = {environment.HOME.name: str(paths.home()), environment.RESULTS.name: str(paths.results())}
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={folder}", *context.args]
    os.execve(sys.executable, command, {**os.environ, **places})


def browse(
    port: Annotated[int, typer.Option(help="port on 127.0.0.1")] = 8800,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="open a browser window")] = False,
    serve: Annotated[bool, typer.Option("--serve/--no-serve", help="serve the pages, or only build them")] = True,
    publish: Annotated[
        bool, typer.Option("--publish", help="build the pages of the published results alone, in results/")
    ] = False,
) -> None:
    """Build the results pages and serve them on this machine."""
    import webbrowser

    from moelab.report import site
    from moelab.report.site.server import ResultsServer
    from moelab.terminal import say, working

    with working("building the pages"):
        built = site.update(publish=publish)
    for line in built.unreadable:
        say(f"not readable: {line}", file=sys.stderr)
    if not serve:
        say(f"{built.results} results, {built.written} files written: {built.index}")
        return
    with ResultsServer(built.index.parent, port) as server:
        say(f"results of {server.folder} at {server.address} (Ctrl-C ends)")
        if open_browser:
            webbrowser.open(server.address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def tensorboard(
    run: Annotated[
        list[str] | None,
        typer.Argument(help="run ids or prefixes; default: all", autocompletion=run_names),
    ] = None,
    port: Annotated[int, typer.Option(help="port on 127.0.0.1")] = 6006,
) -> None:
    """Show runs in TensorBoard, also while they train.

    Losses, speed, and the experts' load by layer.
    """
    from moelab.runs import tensorboard as board

    raise typer.Exit(board.serve(board.select(run or []), port))


def doctor(
    rates: Annotated[
        bool, typer.Option("--rates", help="measure what matrix products and memory reach here, too")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check this machine and this installation: what works and what is missing."""
    from moelab.cli.doctor import checks, report

    if as_json:
        lines = [{"ok": ok, "text": text} for ok, text in checks(rates)]
        print_json(lines)
        good = all(row["ok"] is not False for row in lines)
    else:
        good = report(rates)
    if not good:
        raise typer.Exit(1)
