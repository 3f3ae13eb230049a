"""A terminal of 80 columns breaks no word and no number of any table."""

import inspect
import io
import json
import textwrap
from pathlib import Path

import pytest
from rich.console import Console
from typer.main import get_command
from typer.testing import CliRunner

from moelab import paths, terminal
from moelab.bench import decode, exchange, gate, harness, layer, train
from moelab.cli import app
from moelab.slurm.rows import Overview, Row

ROOT = Path(__file__).resolve().parents[2]
NARROW = 80


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def both(monkeypatch):
    """Returns what is printed, at 80 columns and at 1,000: `both(function) -> (narrow, wide)`."""
    consoles = [Console(width=width, file=Terminal(), color_system=None) for width in (NARROW, 1000)]

    class Both:
        def print(self, *objects, **options):
            for console in consoles:
                console.print(*objects, **options)

    def say(*texts, file=None):
        for console, columns in zip(consoles, (str(NARROW), "1000"), strict=True):
            monkeypatch.setenv("COLUMNS", columns)
            terminal_say(*texts, file=console.file)

    terminal_say = terminal.say
    monkeypatch.setattr(terminal, "console", Both)
    monkeypatch.setattr(terminal, "say", say)

    def both(function):
        function()
        return [console.file.getvalue() for console in consoles]

    return both


def whole(narrow: str, wide: str) -> None:
    """Check that the narrow text has the words of the wide one, none broken, on lines of 80 characters at most."""
    words, known = ({word for word in text.split() if "─" not in word} for text in (narrow, wide))
    broken, left_out = sorted(words - known - {"·"}), sorted(known - words)
    # Stacked rows stand below no heading of the first column.
    assert len(words) > 10 and not broken[:9] and len(left_out) <= 1, left_out[:9]
    long = [line for line in map(str.strip, narrow.splitlines()) if len(line) > NARROW and " " in line]
    assert not long


def command(*words):
    def run():
        done = CliRunner().invoke(app, list(words), catch_exceptions=False)
        assert done.exit_code == 0, done.output

    return run


@pytest.mark.parametrize(
    "words",
    [
        *(
            "list",
            "list scaling",
            "list ladder",
            "claims",
            "power scaling --scale full",
            "power capacity --effect 0.02",
        ),
        *("plan 350M+PR-MoE-32/64 --gpus 16", "plan qwen3-235b --gpus 16", "predict 350M+MoE-16"),
        *("simulate decode deepseek-v3 --gpus 32", "simulate train 1.3B+MoE-128", "simulate clusters"),
        *("simulate score", "simulate score --public", "simulate score --group decode"),
        *("run scaling --scale full --dry-run -p seeds=3", "conform moelab.evaluation.conform:reference"),
    ],
)
def test_a_command(words, both, monkeypatch, tmp_path):
    monkeypatch.setenv("MOELAB_HOME", str(tmp_path))
    whole(*both(command(*words.split())))


def test_tries(both, monkeypatch, tmp_path):
    monkeypatch.setenv("MOELAB_HOME", str(tmp_path))
    row = {
        "scale": "quick",
        "seeds": 5,
        "difference": -0.0123,
        "verdict": "too few seeds to tell: 12 seeds would decide",
    }
    (paths.home() / "tries").mkdir(parents=True)
    rows = [{"idea": f"model.routing.z_loss={n}e-3 and more of the router", **row} for n in range(3)]
    (paths.home() / "tries" / "tries.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    whole(*both(command("try")))


def test_the_state_of_a_sweep_names_the_point_of_each_run(both):
    rows = tuple(
        Row(
            *(
                "scaling",
                f"350M+MoE-128 · seed {i} · train.lr={rate} model.top_k=2",
                f"350m-moe-128-twin-{i}ab34cd{i}f",
            ),
            *(
                "running",
                f"12_{i}",
                "RUNNING",
                "node-with-a-long-name-0012",
                120,
                2048,
                12345.6,
                5.432,
                4000.0,
                "Priority",
            ),
        )
        for i, rate in enumerate(("1e-3", "2e-3"))
    )
    narrow, wide = both(lambda: terminal.console().print(Overview(rows).table()))
    whole(narrow, wide)
    assert all(f"seed {i} · train.lr={rate}" in narrow for i, rate in enumerate(("1e-3", "2e-3")))


@pytest.mark.parametrize("bench", [train, gate, layer, decode, exchange], ids=lambda module: module.__name__[13:])
def test_a_recorded_session_of_a_benchmark(bench, both):
    own = [field for field in harness.Row.__dataclass_fields__ if field not in ("case", "numbers")]
    stored = (ROOT / "results" / "benchmarks" / f"{bench.__name__[13:]}.jsonl").read_text().splitlines()
    rows = [
        harness.Row(case=row, **{name: row.get(name, ()) for name in own}, numbers=row)
        for row in map(json.loads, stored[:12])
    ]
    if hasattr(bench, "show"):
        whole(*both(lambda: bench.show(rows)))
    else:
        whole(*both(lambda: harness.show(bench.__name__, rows, getattr(bench, "COLUMNS", None))))


def _commands(group, path=()):
    yield path, group
    for name, inner in getattr(group, "commands", {}).items():
        yield from _commands(inner, (*path, name))


def test_no_help_breaks_a_sentence():
    """Of a docstring, the line breaks of the source are not the help's."""
    for path, one in _commands(get_command(app)):
        shown = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": str(NARROW)}).stdout.splitlines()
        assert max(map(len, shown)) <= NARROW
        for paragraph in inspect.cleandoc(one.callback.__doc__ or "").split("\n\n") if one.callback else ():
            wrapped = textwrap.wrap(" ".join(paragraph.split()), NARROW - 2, break_on_hyphens=False)
            assert not set(wrapped) - set(map(str.strip, shown)), path
