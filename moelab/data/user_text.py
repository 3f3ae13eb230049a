"""Texts of the user: a folder of files, or a Hugging Face data set."""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from moelab.config import DataConfig
from moelab.data.documents import Corpus, Document, Split, UnknownCorpus, hash_fraction
from moelab.data.packages import CorpusUnavailable
from moelab.terminal import one_line

SUFFIXES = (".txt", ".md", ".jsonl")  # of files of a folder, in any case
FOLDER_VALIDATION = 0.05
FOLDER_SHARES = (0.01, 0.5)  # of a domain's text: what whole texts of it may be validation
HF_VALIDATION = 0.01
MAX_DOMAINS = 500  # of a folder: each has a file of validation tokens that stays open, and a process may open 1024
_HF_NAME = re.compile(r"([A-Za-z0-9_][\w.-]*(?:/[A-Za-z0-9_][\w.-]*)?)(?::([^/:@]+))?(?:@([\w.-]+))?")


def folder(config: DataConfig, root: Path) -> Corpus:
    """Return the corpus of a folder; ValueError, one line, where it is none, has no text, or links lead out of it."""
    if not root.is_dir():
        raise ValueError(f"data: corpus {config.corpus!r} is no folder")
    paths = [path for path in _visible(root) if path.suffix.lower() in SUFFIXES or path.is_dir()]
    within = root.resolve()
    for path in filter(Path.is_symlink, paths):  # also linked folders, which nothing enters
        if not (path.exists() and path.resolve().is_relative_to(within)):
            raise ValueError(
                f"data: {path} is a link to {path.readlink()}, outside of {root} or not there; copy the file into it"
            )
    files = [path for path in paths if path.suffix.lower() in SUFFIXES and path.is_file()]
    if not files:
        raise ValueError(f"data: no .txt, .md or .jsonl file in {root}")
    if len({file.relative_to(root).parts[0] for file in files if file.parent != root}) > MAX_DOMAINS:
        raise ValueError(
            f"data: {root} has more than {MAX_DOMAINS} subfolders, each a domain; put them into fewer ones"
        )
    return Corpus(
        name=config.corpus,
        licence="as the owner of the folder states; not known here",
        source=f"{len(files)} files in {root}",
        state=_listing(root, files) + "\nsplit by text, or within one",  # another rule would give other documents
        documents=functools.partial(_folder_documents, root, files, config.text_field),
    )


def _folder_documents(root: Path, files: list[Path], field: str) -> Iterator[Document]:
    """About 5 % of each domain is validation, by the hash of the text; copies of a text are left out.

    A domain whose hashes are all above 5 % gives its lowest one. Where what is chosen so is less than 1 % of the domain
    or more than half of it, as of a book and a note, or of one text, the longest text gives its last 5 % instead.
    """
    found: dict[str, list[tuple[float, int]]] = {}
    for domain, _, text, place in _folder_texts(root, files, field):
        found.setdefault(domain, []).append((place, len(text)))
    last: dict[str, float] = {}  # of each domain, the last place that is validation
    cut_at: dict[str, float] = {}  # and that of the text that is cut
    for domain, texts in found.items():
        last[domain] = max(FOLDER_VALIDATION, min(texts)[0])
        held = sum(size for place, size in texts if place <= last[domain])
        if not FOLDER_SHARES[0] <= held / sum(size for _, size in texts) <= FOLDER_SHARES[1]:
            last[domain], cut_at[domain] = -1.0, max(texts, key=lambda text: text[1])[0]
    for domain, name, text, place in _folder_texts(root, files, field):
        if place == cut_at.get(domain) and (cut := _near_space(text)) < len(text):
            yield Document(domain, "train", text[:cut], f"{name}[:{cut}]")
            yield Document(domain, "validation", text[cut:], f"{name}[{cut}:]")
        else:
            yield Document(domain, "validation" if place <= last.get(domain, -1.0) else "train", text, name)


def _folder_texts(root: Path, files: list[Path], field: str) -> Iterator[tuple[str, str, str, float]]:
    """(domain, name, text, hash of the text from 0 to 1) of every text that is neither blank nor a copy of another."""
    there = set()
    for file in files:
        path = file.relative_to(root)
        domain = path.parts[0] if len(path.parts) > 1 else (root.resolve().name or "text")
        for name, text in _texts_of(file, path.as_posix(), field):
            if text.strip() and (place := hash_fraction(text)) not in there:
                there.add(place)
                yield domain, name, text, place


def _texts_of(file: Path, name: str, field: str) -> Iterable[tuple[str, str]]:
    """(name, text) of each text in a file, UTF-8 with or without a byte order mark."""
    if file.suffix.lower() != ".jsonl":
        try:
            yield name, file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"data: {file} is not UTF-8 text (byte {error.start})") from None
        return
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise ValueError(f"data: {file} line {number} is not UTF-8 text (byte {error.start})") from None
            except (ValueError, RecursionError) as error:
                raise ValueError(f"data: {file} line {number} is not JSON: {error}") from None
            if not isinstance(record, dict) or not isinstance(record.get(field), str):
                raise ValueError(f"data: {file} line {number} has no text under {field!r} (text_field)")
            yield f"{name}#{number}", _valid(record[field])


def _valid(text: str) -> str:
    """JSON may hold halves of surrogate pairs, which are no Unicode text; they become "?"."""
    return text.encode("utf-8", "replace").decode()


def _near_space(text: str) -> int:
    """Return where the last 5 % of a text begin, or the last white space before it if there is one close by."""
    cut = round(len(text) * (1 - FOLDER_VALIDATION))
    return next((i for i in range(cut, max(0, cut - 1000), -1) if text[i : i + 1].isspace()), cut)


def _visible(root: Path) -> list[Path]:
    """Return what is below a folder, sorted, without hidden files and folders (.git, .venv, .ipynb_checkpoints)."""
    paths: list[Path] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]  # those that it goes on to
        paths += [Path(folder, name) for name in (*folders, *files) if not name.startswith(".")]
    return sorted(paths)


def _listing(root: Path, files: Iterable[Path]) -> str:
    """Return a text that changes when a file is added, removed or rewritten."""
    rows = ((file, file.stat()) for file in files)
    return "\n".join(f"{file.relative_to(root)} {stat.st_size} {stat.st_mtime_ns}" for file, stat in rows)


def hugging_face(config: DataConfig, where: str) -> Corpus:
    """Return the corpus of a data set: of a folder or of a published name, with a configuration after a colon.

    After an @, a name may have a revision of the data set: a commit, a tag or a branch.

    Raises:
        ValueError: one line: it is neither (`UnknownCorpus`), or it is streamed without a bound.
    """
    name, _, subset = where.partition(":")
    revision, state = "", "remote"
    if (local := Path(os.path.expanduser(name))).is_dir():
        name = str(local.resolve())  # `datasets` knows neither ~ nor .
        state = _listing(local, (file for file in _visible(local) if file.is_file()))  # `datasets` reads no hidden ones
    else:
        match = _HF_NAME.fullmatch(where)
        if match is None or ".." in where or "--" in where:
            raise UnknownCorpus(
                f"data: corpus {config.corpus!r}: {where!r} is neither a folder nor the name of a Hugging Face data "
                "set (OWNER/NAME[:CONFIG][@REVISION])"
            )
        if not (config.max_documents or config.max_bytes):
            raise ValueError(
                f"data: corpus {config.corpus!r} is streamed and needs a bound: set max_documents or max_bytes"
            )
        name, subset, revision = (part or "" for part in match.groups())
    given = {"configuration": subset, "revision": revision, "split": "train"}
    return Corpus(
        name=config.corpus,
        licence="as stated on the data set's page",
        source=", ".join([f"Hugging Face data set {name}", *(f"{k} {v}" for k, v in given.items() if v)]),
        state=state,
        documents=functools.partial(_hf_documents, config, name, subset or None, revision or None),
        slow=state == "remote",
    )


def _hf_documents(config: DataConfig, name: str, subset: str | None, revision: str | None) -> Iterator[Document]:
    """About 1 % is validation, by the hash of the text: copies of a document end up on the same side."""
    domain = Path(name).name
    size = 0
    for number, record in enumerate(_hf_records(name, subset, revision)):
        if (config.max_documents and number >= config.max_documents) or (config.max_bytes and size >= config.max_bytes):
            return
        text = record.get(config.text_field, 0)
        if not isinstance(text, str | None):
            raise ValueError(f"data: {name} has no text field {config.text_field!r}; its fields are {sorted(record)}")
        if text and text.strip():
            text = _valid(text)
            size += len(text.encode())
            split: Split = "validation" if hash_fraction(text) < HF_VALIDATION else "train"
            yield Document(domain, split, text, f"{number}")


def _hf_records(name: str, subset: str | None, revision: str | None) -> Iterator[dict]:
    try:
        import datasets
    except ImportError:
        raise CorpusUnavailable("hf: corpora need the package datasets: pip install 'moelab[hf]'") from None
    try:
        yield from datasets.load_dataset(name, subset, revision=revision, split="train", streaming=True)
    except Exception as error:  # the library raises many kinds, most of them pages long
        raise CorpusUnavailable(
            f"cannot read Hugging Face data set {name!r}: {type(error).__name__}: {one_line(error)}"
        ) from error
