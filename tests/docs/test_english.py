"""Habits of speech that trip a reader, counted over the README, the pages of docs/, help texts and errors."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST = 10
"""Of all idioms together."""

IDIOMS = {  # what to write instead
    r"without a word": "say how the process died",
    r"cannot be had": "could not be downloaded",
    r"begins? so\b": "starts with ...",
    r"that is to be seen": "to detect",
    r"at most so many|for so many|so many (?:seconds|tokens|pairs|GPUs|processes)": "maximum number of ...",
    r"until all is over": "until all jobs have ended",
    r"by the beginning of": "prefixes",
    r"is none of\b": "is not in ..., has no ...",
    r"\bit makes no\b": "could not create",
    r"\(\d+ such\)": "and 2 more",
    r"\bis told by\b|\bare told by\b": "reports",
    r"\b(?:says?|line says|said) so\b": "name what is printed",
    r"\bat hand\b": "available, installed, already trained",
    r"\btold apart\b": "distinguished by",
    r"\b(?:by|for) (?:itself|themselves)\b|\bof (?:its|their) own\b": "alone, on its own, separate",
    r"\bbeside\b": "next to, alongside, compared with, in addition to",
    r"\bin no bit\b": "bit for bit the same",
    r"\bnone of the others\b": "say which",
    r"\bnot so (?:at|for|with)\b": "At ..., however",
    r"\btimes its base's size\b": "matches a dense model so many times the size of its base",
    r"\bits base takes\b": "the dense base needs",
    r"\bcopying (?:does not give|would give)\b": "tokens that can(not) be copied from the context",
    r"\bfutile for good\b": "no affordable number of seeds would decide it",
    r"\bcannot tell\b": "too few seeds to tell",
    r"(?:^|[.!?] )(?:Nor|Of the|Not (?!all|yet|every))": "begin with the subject",
}


def prose(path: Path) -> str:
    """The text of a page without code, quotations and generated tables; lines joined."""
    text = path.read_text()
    text = re.sub(r"```.*?```", "", text, flags=re.S)
    text = "\n".join(line for line in text.splitlines() if not line.startswith(("|", ">")))
    return re.sub(r"\s+", " ", unquoted(re.sub(r"`[^`]*`", "", text)))


def unquoted(text: str) -> str:
    return re.sub(r'"[^"]*"|“[^”]*”|\*[^*]+\*', "", text)


def strings(node: ast.AST) -> str:
    return "".join(
        part.value for part in ast.walk(node) if isinstance(part, ast.Constant) and isinstance(part.value, str)
    )


def spoken(path: Path) -> str:
    """The errors that a module raises, texts it returns or prints and, in the commands, help texts and docstrings."""
    found, tree = [], ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and node.exc is not None:
            found.append(strings(node.exc))
        if isinstance(node, ast.Return) and isinstance(node.value, ast.JoinedStr):  # such as reasons in a status
            found.append(strings(node.value))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
            found += map(strings, node.args)
        if isinstance(node, ast.keyword) and node.arg == "help":
            found.append(strings(node.value))
        if path.parent.name == "cli" and isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            found.append(ast.get_docstring(node) or "")
    return re.sub(r"\s+", " ", "\n".join(map(unquoted, found)))


def texts() -> dict[str, str]:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "slurm" / "README.md", *(ROOT / "docs").glob("*.md")]
    modules = [*(ROOT / "moelab").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    read = {str(path.relative_to(ROOT)): prose(path) for path in pages}
    return read | {str(path.relative_to(ROOT)): spoken(path) for path in modules}


def idioms(text: str) -> list[str]:
    return [
        text[max(0, m.start() - 40) : m.end() + 30]
        for i in IDIOMS
        for m in re.finditer(i, text, re.I if i[0] != "(" else 0)
    ]


def test_few_idioms_are_left():
    found = [f"{name}: {where}" for name, text in texts().items() for where in idioms(text)]
    assert len(found) <= MOST, "\n".join([str(Counter(line.split(":")[0] for line in found)), *found])


@pytest.mark.parametrize(
    "text", ["figures stand beside it", "one line says so", "None is at hand.", "Done. Nor is it."]
)
def test_an_idiom_is_seen(text):
    assert len(idioms(text)) == 1 and not idioms('the figures are next to it: "beside"'.replace('"beside"', ""))
