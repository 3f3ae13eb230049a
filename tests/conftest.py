"""Fixtures shared by all tests: a tiny text, prepared once."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from moelab.config import DataConfig, ModelConfig, RoutingConfig, TrainConfig
from moelab.data import TokenData, prepare
from moelab.workbench.specs import RunSpec


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
