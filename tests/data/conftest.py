"""A tiny corpus of two domains, prepared once per session."""

import random
from pathlib import Path

import pytest

from moelab.config import DataConfig
from moelab.data.preparation import prepare
from moelab.data.tokens import TokenData


def write_texts(root: Path, documents: int = 12, words: int = 150) -> None:
    """Reproducible nonsense in two domains with different words."""
    rng = random.Random(0)
    for domain, letters in {"north": "abcde", "south": "vwxyz"}.items():
        (root / domain).mkdir(parents=True)
        for i in range(documents):
            text = " ".join("".join(rng.choices(letters, k=rng.randint(1, 5))) for _ in range(words))
            (root / domain / f"{i:02d}.txt").write_text(text + "\n")


@pytest.fixture(scope="session")
def texts(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("texts")
    write_texts(root)
    return root


@pytest.fixture(scope="session")
def data(texts, tmp_path_factory) -> TokenData:
    config = DataConfig(corpus=f"folder:{texts}", tokenizer="bpe-300", context=16)
    return prepare(config, tmp_path_factory.mktemp("cache"))
