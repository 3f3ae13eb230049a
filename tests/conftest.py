"""Fixtures shared by all tests: a tiny text, prepared once."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moelab.config import DataConfig, ModelConfig, RoutingConfig, TrainConfig
from moelab.data.preparation import prepare
from moelab.data.tokens import TokenData
from moelab.engine import checkpoint
from moelab.files import read_json
from moelab.lab import Lab
from moelab.runs.spec import RunSpec
from moelab.runs.store import Run
from moelab.training.metrics import TRAIN, VALIDATION, read_rows

with contextlib.suppress(ImportError):  # it is not installed on every machine with a GPU
    import matplotlib

    matplotlib.use("Agg")  # in this process alone: the kernels of notebooks choose their own
os.environ.pop("COLUMNS", None)  # xdist sets it to 80 in its processes
HERE = Path(__file__).parent
# `make test` hands out whole files to processes, in this order: what takes long must not come last and leave the others idle.
LONGEST = [
    "notebook/test_all_notebooks.py",
    "cluster/test_batches.py",  # tests of clusters wait most of the time: not all at once
    "cli/test_cli.py",
    "cluster/test_losses.py",
    "runs/test_kills.py",
    "cluster/test_faults.py",
    "browser/test_jupyterlab.py",
    "kernels/test_interpreter.py",
    "runs/test_branching.py",
    "browser/test_results_pages.py",
    "engine/test_launch.py",
    "runs/test_specs_and_store.py",
    "engine/test_parallel.py",
    "runs/test_ranks.py",
    "engine/test_checkpoint.py",
    "docs/test_examples.py",
    "slurm/test_local.py",
    "evaluation/test_imported.py",
    "kernels/test_cpp.py",
    "kernels/test_experts.py",
    "evaluation/test_zero_shot.py",
    "engine/test_exchange.py",
    "training/test_loop.py",
]


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=2, help="how often tests/runs/test_kills.py kills each run")


def pytest_configure(config):
    """Compile the CPU kernels before any test process starts, so that no rank waits for it beyond its first sign of life."""
    if not hasattr(config, "workerinput"):
        from moelab import kernels

        kernels.cpp_available()


def pytest_collection_modifyitems(items):
    place = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.relative_to(HERE).as_posix(), len(place)))


@pytest.fixture(autouse=True)
def _one_thread():
    """Sums in one order, and no fight over cores between test processes."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory) -> Path:
    """Two domains of made-up sentences with a structure that a small model can learn."""
    root = tmp_path_factory.mktemp("text")
    draw = random.Random(0)
    for domain, words in (
        ("sea", "wave salt ship mast wind gull tide"),
        ("field", "corn plough barn wheat ox rain mill"),
    ):
        vocabulary = words.split()
        folder = root / domain
        folder.mkdir()
        for i in range(40):
            sentences = []
            for _ in range(60):
                at = draw.randrange(len(vocabulary))
                # Each word is followed by its neighbour: predictable from the one before.
                sentences.append(
                    " ".join(vocabulary[(at + j) % len(vocabulary)] for j in range(draw.randint(4, 9))) + "."
                )
            (folder / f"{i}.txt").write_text("\n".join(sentences))
    return root


@pytest.fixture(scope="session")
def data_config(text_folder) -> DataConfig:
    return DataConfig(corpus=f"folder:{text_folder}", tokenizer="bpe-300", context=32)


@pytest.fixture(scope="session")
def data(data_config, tmp_path_factory) -> TokenData:
    return prepare(data_config, tmp_path_factory.mktemp("cache"))


@pytest.fixture
def tiny_model() -> ModelConfig:
    """PR-MoE in small: 4 layers, 2 and 4 experts."""
    return ModelConfig(
        layers=4, hidden=32, heads=2, experts=(0, 2, 0, 4), residual=True, vocab=320, context=32, init_std=0.02,
        routing=RoutingConfig(drop_tokens=True), dropout=0.1, name="tiny",
    )  # fmt: skip


@pytest.fixture
def tiny_train() -> TrainConfig:
    """24 steps of 4 x 32 tokens, a checkpoint every 5."""
    return TrainConfig(
        tokens=24 * 4 * 32, batch_size=4, lr=3e-3, min_lr=3e-4, warmup_tokens=256, eval_every=8, eval_tokens=512, log_every=3,
        checkpoint_every=5,
    )  # fmt: skip


@pytest.fixture
def tiny_spec(tiny_model, tiny_train, data_config) -> RunSpec:
    return RunSpec(model=tiny_model, train=tiny_train, data=data_config, label="tiny")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """MOELAB_HOME of `trained`."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture
def trained(tiny_spec, workspace, monkeypatch) -> Run:
    """The finished run of `tiny_spec`, trained once a module."""
    monkeypatch.setenv("MOELAB_HOME", str(workspace))
    return Lab().run([tiny_spec], executor="inline")[0]


CLOCK = ("time_s", "tokens_per_s", "seconds")
"""Numbers that differ between equal trainings."""


def numbers(folder: Path, after: int = -1) -> dict:
    """All that a training left in its folder but the clock's numbers: two equal ones were the same bit for bit.

    These are the rows of metrics after a step, the result where there is one, and the tensors of the last checkpoint.
    """
    rows = {file: [row for row in read_rows(folder / file) if row["step"] > after] for file in (TRAIN, VALIDATION)}
    rows["result.json"] = [read_json(folder / "result.json") or {}]
    found = {file: [{k: v for k, v in row.items() if k not in CLOCK} for row in part] for file, part in rows.items()}
    return found | tensors(checkpoint.latest(folder / "checkpoints").path)


def tensors(folder: Path) -> dict:
    """The tensors in a checkpoint's files."""
    return {
        f"{folder.name}/{file.name} {name}": (tensor.shape, hashlib.sha256(tensor.numpy()).hexdigest())
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def until(condition: Callable[[], object], what: str = "it", limit_s: float = 300) -> None:
    """Wait for a condition; fail after a time that only something wrong takes."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {limit_s} s for {what}"
        time.sleep(0.02)


def stop_after(steps: int):
    """A `should_stop` of `train` and `execute` that says yes when it is asked the nth time, after n steps."""
    asked = itertools.count(1)
    return lambda: next(asked) >= steps


@pytest.fixture
def ax():
    """Axes in the notebooks' theme, which puts titles left."""
    from matplotlib import pyplot as plt

    from moelab.plotting import figures

    with plt.rc_context():
        figures.theme()
        fig, ax = plt.subplots()
        yield ax
        plt.close(fig)


@pytest.fixture(scope="session")
def result():
    """Makes up the result of a run: `result(loss, **others)`."""
    numbers = {
        "tokens": 8, "steps": 1, "bits_per_byte": 2.0, "unigram_loss": 6.0, "parameters": 10, "active_parameters": 5,
        "flops_per_token": 60.0, "seconds": 2.0,
    }  # fmt: skip
    return lambda loss=4.5, **others: {**numbers, "validation_loss": loss, **others}


PICTURE = (  # a PNG
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)


@pytest.fixture(scope="session")
def publish(tmp_path_factory, result):
    """Publishes made-up results: `publish(results, experiment, scale, name, …)` writes one through `Publication`, with an executed notebook.

    Equalities are judged by `gain`, in nats per token; without one the runs cannot tell.
    """
    import nbformat
    import nbformat.v4 as nb
    import pandas as pd
    from matplotlib import pyplot as plt

    from moelab import paper
    from moelab.design.judging import judge
    from moelab.files import write_json
    from moelab.plotting import figures
    from moelab.report.publication import Publication
    from moelab.runs.collection import Runs
    from moelab.runs.store import RunStore

    def verdict(claim, values, gain=0.0):
        if not gain or claim.direction != "equal":
            return judge(claim, values)
        arms = {claim.right: [0.0] * len(values), claim.left: values}  # the better arm is one of them
        arms |= {claim.gain_over: [arms[claim.gain_of][0] + gain] * len(values)}
        return judge(claim, arms={name: dict(enumerate(of)) for name, of in arms.items()})

    def publish(
        results: Path,
        experiment: str = "pr-moe",
        scale: str = "cpu",
        name: str = "20260101-000000",
        *,
        losses: tuple[float, ...] = (3.0, 3.1, 3.05),
        claims: dict[str, tuple[float, ...]] | None = None,
        gain: float | None = None,
        parameters: dict | None = None,
        finished: str = "",
        curves: list[dict] | None = None,
    ) -> Path:
        folder = results / experiment / scale / name
        folder.mkdir(parents=True)
        store = RunStore(tmp_path_factory.mktemp("runs"))
        specs = [
            RunSpec(model=ModelConfig.parse(model).shrink(), train=TrainConfig(seed=seed), label=model)
            for seed in range(len(losses))
            for model in ("350M", "350M+MoE-128")
        ]
        for spec in specs:
            run = store.run(spec)
            loss = losses[spec.train.seed] - 0.1 * any(spec.model.experts)
            write_json(run.path / "result.json", result(loss, parameters=1000, seconds=60.0))
            write_json(
                run.path / "provenance.json",
                {"commit": "a" * 40, "modified": False, "hardware": {"cpu": "Test", "cores": 2}},
            )
        figures.theme()
        publication = Publication(experiment, scale, {"scale": scale, **(parameters or {})}, folder, interactive=False)
        fig, (ax,) = figures.panels()
        figures.our_points(ax, [1, 2, 3], list(losses) if len(losses) == 3 else [3, 2, 1])
        figures.paper_points(ax, [1, 2, 3], [3, 2.5, 2], [2.9, 2.4, 1.9], [3.1, 2.6, 2.1])
        ax.set(xlabel="tokens (millions)", ylabel="loss (nats per token)")
        title = f"Loss falls with tokens, {experiment} at {scale}"
        data = pd.DataFrame({"arm": ["350M", "350M+MoE-128"], "loss": [3.05, 2.95]})
        publication.figure(fig, "curves", title=title, caption="Made up for a test.", data=data)
        plt.close(fig)
        if curves:
            fig, _ = figures.panels()
            publication.figure(fig, "loss-curves", title="Curves", data=pd.DataFrame(curves))
            plt.close(fig)
        publication.table(data, "final", title="final losses")
        publication.claims([verdict(paper.claim(id), values, gain or 0.0) for id, values in (claims or {}).items()])
        publication.finish(Runs([store.run(spec) for spec in specs]), title=title)
        if finished:
            summary = json.loads((folder / "summary.json").read_text())
            write_json(folder / "summary.json", {**summary, "finished": finished})
        table = data.style.format(precision=2)._repr_html_()
        outputs = [
            nb.new_output("stream", name="stderr", text="a warning\n"),
            nb.new_output("execute_result", data={"text/html": table, "text/plain": "a table"}),
            nb.new_output("display_data", data={"image/png": PICTURE, "text/plain": "<Figure>"}),
            nb.new_output("display_data", data={"application/vnd.jupyter.widget-view+json": {"model_id": "0"}, "text/plain": "a slider"}),
        ]  # fmt: skip
        cells = [
            nb.new_markdown_cell(f"# Notebook of {experiment}\n\nA loss in $\\log$ units, and `code`."),
            nb.new_code_cell(
                "for i in range(3):  # a comment\n    print('text', i)", outputs=outputs, execution_count=1
            ),
        ]
        (folder / "notebook.ipynb").write_text(nbformat.writes(nb.new_notebook(cells=cells)))
        return folder

    return publish
