"""The `moelab` command: one file per group of commands.

Heavy modules are imported inside the commands, so that `moelab --help` is quick. May import every room.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

import moelab
from moelab import environment, paths
from moelab.cli import (
    bench,
    cluster,
    experiments,
    kernels,
    models,
    predict,
    routing,
    runs,
    simulate,
    slurm,
    tries,
    view,
)
from moelab.cli._options import BENCHMARKS, CLUSTER, EXPERIMENTS, RUNS, SIMULATOR
from moelab.files import REFUSED
from moelab.terminal import one_line, plain, say

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Reproduce, question and extend the DeepSpeed-MoE paper (arXiv 2201.05596).",
)
# The help shows groups and commands in this order, which is the order of use.
_COMMANDS: tuple[tuple[str, tuple[Callable[..., None], ...]], ...] = (
    (EXPERIMENTS, (experiments.list_, experiments.run, experiments.claims, experiments.power, tries.try_)),
    (EXPERIMENTS, (view.browse, view.lab, view.tensorboard, view.doctor)),
    (RUNS, (models.generate, models.eval_, models.import_, models.export, routing.trace, routing.conform)),
    (CLUSTER, (slurm.prepare, slurm.submit, slurm.sweep, slurm.status, slurm.logs, slurm.cancel)),
    (SIMULATOR, (simulate.plan, predict.predict)),
    (BENCHMARKS, (cluster.check_cluster,)),
)
for _panel, _functions in _COMMANDS:
    for _function in _functions:
        # What `moelab lab` does not know it passes on.
        _more = {"allow_extra_args": True, "ignore_unknown_options": True} if _function is view.lab else None
        _name = _function.__name__.rstrip("_").replace("_", "-")
        app.command(_name, context_settings=_more, rich_help_panel=_panel)(_function)
app.add_typer(runs.app, name="runs", rich_help_panel=RUNS)
app.add_typer(simulate.app, name="simulate", rich_help_panel=SIMULATOR)
app.add_typer(bench.bench, name="bench", rich_help_panel=BENCHMARKS)
app.add_typer(kernels.kernels, name="kernels", rich_help_panel=BENCHMARKS)


def _unwrap(group: typer.Typer) -> None:
    """Join the lines of each paragraph of the docstrings, which the help would break where the source does."""
    for command in group.registered_commands:
        paragraphs = inspect.cleandoc(getattr(command.callback, "__doc__", None) or "").split("\n\n")
        command.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    for inner in group.registered_groups:
        if inner.typer_instance is not None:
            _unwrap(inner.typer_instance)


_unwrap(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"moelab {moelab.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


# Typer exports only `BadParameter`; the class above all such errors is click's, or that of Typer's own copy of click.
_UsageError: Any = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "ClickException")


def main() -> None:
    """Run the command line.

    Errors that a user can mend become one line on standard error. The exit code is 2 for bad input and for a text or a
    checkpoint that could not be read, and 1 for what the system refuses (a read-only folder, a full disk). It is
    130 after Ctrl-C, and 141 where what reads the output has ended.
    """
    try:
        code = app(standalone_mode=False)  # else Typer prints usage errors itself, as a box
        sys.stdout.flush()  # here, where a reader that has gone is noticed
        if code:
            sys.exit(code)
    except SystemExit as error:
        if isinstance(error.__context__, BrokenPipeError):  # for which click exits with 1
            _end_without_reader()
        raise
    except BrokenPipeError:
        _end_without_reader()
    except _UsageError as error:
        if message := _one_line(error):
            _complain(message)
        sys.exit(error.exit_code)
    except typer.Abort:
        sys.exit(130)
    except ValueError as error:
        _complain(str(error))
        sys.exit(2)
    except OSError as error:
        places = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        reason = error.strerror or one_line(error)
        refused = error.errno in REFUSED and _variable_of(str(error.filename))
        help = f"; {refused} names another folder" if refused else ""
        _complain(f"{reason}{': ' if places else ''}{places}{help}")
        sys.exit(1)
    except Exception as error:
        from moelab.data.packages import CorpusUnavailable
        from moelab.engine.checkpoint import CheckpointError  # loads torch, which the help does without

        if not isinstance(error, CorpusUnavailable | CheckpointError):
            raise
        _complain(str(error))
        sys.exit(2)


def _end_without_reader() -> NoReturn:
    """End as shells expect of a program that is killed by SIGPIPE: what reads the output, `head` say, wants no more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else the interpreter fails to write the rest as it ends
    sys.exit(128 + 13)


def _variable_of(file: str) -> str:
    """Return the variable that names the home or results folder in which a file is; empty for other files."""
    folders = {environment.HOME.name: paths.home(), environment.RESULTS.name: paths.results()}
    return next((name for name, folder in folders.items() if Path(file).is_relative_to(folder)), "")


def _complain(line: str) -> None:
    say(f"moelab: {plain(line)}", file=sys.stderr)


_MEANT = {
    "train": "run",
    "start": "run",
    "experiments": "list",
    "evaluate": "eval",
    "results": "browse",
    "queue": "status",
}
"""Names that other programs give to commands."""


def _one_line(error: Any) -> str:
    """Return a usage error in one line, with what helps; empty where the help has been printed instead."""
    message = " ".join(error.format_message().split()).rstrip(".")
    if not message or type(error).__name__ == "NoArgsIsHelpError":
        return ""
    names: list[str] = []
    context = getattr(error, "ctx", None)
    takes_parameters = context and any(parameter.name == "parameter" for parameter in context.command.params)
    at = context
    while at and at.parent:
        names.insert(0, at.info_name)
        at = at.parent
    hint = f"see `{' '.join(['moelab', *names])} --help`" if context else ""
    if context and (command := re.match(r"No such command '(.*?)'", message)):
        known = getattr(context.command, "commands", {})
        meant = _MEANT.get(command[1])
        if meant in known:  # before a name that is only spelt alike, which Typer suggests
            message, hint = command[0], f"did you mean {meant}? {hint}"
    if type(error).__name__ == "NoSuchOption":
        message = f"no option {error.option_name}"
        options = {option for parameter in context.command.params for option in parameter.opts} if context else set()
        # Of one hyphen and a word, click reads the first letter as the option.
        words = [word.partition("=")[0] for word in sys.argv[1:] if word.startswith(error.option_name)]
        if len(error.option_name) == 2 and (long := [word for word in words if f"-{word}" in options]):
            message, hint = f"no option {long[0]}", f"did you mean -{long[0]}?"
        elif error.possibilities:
            hint = f"did you mean {' or '.join(sorted(error.possibilities))}?"
        elif takes_parameters:
            hint = f"parameters are given as {_as_parameter(error.option_name, sys.argv[1:])}"
    elif takes_parameters and (pair := re.search(r"\((\w[\w.]*=\S*)\)$", message)):
        hint = f"parameters are given as -p {pair[1]}"
    where = f"{' '.join(names)}: " if names else ""
    return where + message[0].lower() + message[1:] + (f"; {hint}" if hint and not message.endswith("?") else "")


def _as_parameter(option: str, arguments: Sequence[str]) -> str:
    """Return an option of the command line, such as ``--first-seed 3``, as a parameter: ``-p first_seed=3``.

    What follows an option of one letter may be the parameter already: ``-y seeds=3`` is ``-p seeds=3``.
    """
    value = "VALUE"
    for argument, after in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument.startswith(f"{option}="):
            value = argument.partition("=")[2]
        elif argument == option and after and not after.startswith("-"):
            value = after
    if len(option) == 2:
        return f"-p {value}" if "=" in value else "-p NAME=VALUE"
    return f"-p {option.lstrip('-').replace('-', '_')}={value}"
