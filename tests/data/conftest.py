"""A tiny corpus of two domains, prepared once per session."""

import random
from pathlib import Path

import pytest

from moelab.config import DataConfig
from moelab.data.preparation import prepare
from moelab.data.tokens import TokenData


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    """Reproducible nonsense in two domains with different words: 12 documents of 150 words each."""
    root, rng = tmp_path_factory.mktemp("texts"), random.Random(0)
    for domain, letters in {"north": "abcde", "south": "vwxyz"}.items():
        (root / domain).mkdir()
        for i in range(12):
            text = " ".join("".join(rng.choices(letters, k=rng.randint(1, 5))) for _ in range(150))
            (root / domain / f"{i:02d}.txt").write_text(text + "\n")
    return root


@pytest.fixture(scope="session")
def data(texts, tmp_path_factory) -> TokenData:
    config = DataConfig(corpus=f"folder:{texts}", tokenizer="bpe-300", context=16)
    return prepare(config, tmp_path_factory.mktemp("cache"))
