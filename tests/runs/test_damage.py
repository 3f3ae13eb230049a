"""Files of a stopped run that are cut short, emptied, changed in a byte or removed: never other numbers without a word.

`pytest tests/runs/test_damage.py --kills 20 -s` damages 1,000 files and prints each file with the outcome. A failure names
the seed; PYTEST_SEED draws the same again.
"""

import os
import random
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from moelab.runs.execute import execute
from moelab.runs.store import Run, RunStore
from moelab.training.loop import TrainingStopped
from tests.conftest import numbers, stop_after
from tests.runs.test_kills import ELSEWHERE

pytestmark = pytest.mark.slow


def damage(file: Path, draw: random.Random) -> str:
    """Damage a file in one of five ways, and return which."""
    content = file.read_bytes()
    how = draw.choice(["cut", "emptied", "changed", "zeroed", "removed"]) if content else "removed"
    at = draw.randrange(len(content)) if content else 0
    if how == "removed":
        file.unlink()
    elif how == "changed":
        file.write_bytes(content[:at] + bytes([content[at] ^ 1 << draw.randrange(8)]) + content[at + 1 :])
    elif how == "zeroed":  # what some file systems leave of a file after a power failure
        file.write_bytes(content[:at] + bytes(len(content) - at))
    else:
        file.write_bytes(content[: at if how == "cut" else 0])
    return how


def files(run: Run) -> list[Path]:
    """Return what a stopped run goes on from; its logs and its spec, whose digest is its name, are not drawn."""
    found = (file for file in sorted(run.path.rglob("*")) if file.is_file() and not file.is_symlink())
    return [file for file in found if file.name not in ELSEWHERE | {"spec.json"}]


def test_a_damaged_run_ends_with_the_same_numbers_or_says_what_is_damaged(tiny_spec, tmp_path, request):
    seed = int(os.environ.get("PYTEST_SEED") or random.SystemRandom().randrange(2**32))
    draw, outcomes = random.Random(seed), Counter()
    # Half of the steps of `tiny_spec`: a stopped run still has two checkpoints, rows of both kinds, and steps to come.
    train = replace(tiny_spec.train, tokens=12 * 4 * 32, checkpoint_every=3, eval_every=5, eval_tokens=128)
    spec = replace(tiny_spec, train=train)
    whole = RunStore(tmp_path / "whole").run(spec)
    execute(whole)
    wanted = numbers(whole.path)
    stopped = []
    for step in draw.sample(range(5, 11), 5):
        stopped.append(RunStore(tmp_path / f"stopped-{step}").run(spec))
        with pytest.raises(TrainingStopped):
            execute(stopped[-1], should_stop=stop_after(step))
    for round in range(50 * request.config.getoption("--kills")):
        run = RunStore(tmp_path / str(round)).run(spec)
        shutil.copytree(draw.choice(stopped).path, run.path, dirs_exist_ok=True)
        file = draw.choice(files(run))
        how = damage(file, draw)
        where = f"seed {seed}, round {round}: {file.relative_to(run.path)} {how}"
        try:
            execute(run)
        except (ValueError, RuntimeError, OSError) as error:
            outcome = "said"
            assert "\n" not in str(error), (where, error)
        else:
            outcome = "same numbers"
            assert numbers(run.path) == wanted, where
        outcomes[outcome] += 1
        print(f"{where}: {outcome}")
        shutil.rmtree(tmp_path / str(round))
    print(f"seed {seed}: {dict(outcomes)}")
