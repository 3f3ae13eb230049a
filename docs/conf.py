"""The documentation as a site with the API reference and a search, in pages that need no network: `make docs`.

Sphinx reads a copy of the checkout's pages, to which this adds a page a package, from the docstrings.
"""

import os
import pkgutil
import posixpath
import re
from importlib import import_module
from pathlib import Path

from docutils import nodes

ROOT = Path(__file__).resolve().parents[1]

project = "moelab"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "README"
exclude_patterns = ["results/**", "docs/examples/**"]
html_theme = "furo"
html_title = "moelab"
html_copy_source = False
myst_heading_anchors = 4
myst_url_schemes = {"http": None, "https": None, "checkout": None}
napoleon_use_ivar = True
autodoc_typehints = "none"  # they stand in the signature
autodoc_member_order = "bysource"
default_role = "literal"
autodoc_mock_imports = ["deepspeed", "llama_cpp"]  # peers of the benchmarks, which may be missing
suppress_warnings = [
    "myst.header",
    "myst.xref_missing",
    "docutils",
    "ref",
]  # headings that begin at ##; docstrings are Markdown

PAGES = """

```{toctree}
:hidden:
:caption: Guides
docs/README
docs/explore
docs/browse
docs/experiments
docs/reviewer
docs/extend
docs/try
docs/trace
docs/conform
slurm/README
docs/commands
docs/environment
docs/read-in-an-hour
docs/architecture
docs/performance
docs/simulator
docs/full-length
docs/prediction
docs/gpu
CONTRIBUTING
CHANGELOG
```

```{toctree}
:hidden:
:caption: Reference
api/index
```

```{toctree}
:hidden:
:caption: Log
:glob:
LOG
docs/log/*
```
"""


def packages() -> list[str]:
    """Names of all public packages; `lab` first, which readers need first."""
    found = ["moelab.lab", "moelab", "moelab.kernels"]
    for package in ("moelab", "moelab.kernels"):  # kernels/ is mapped there by the installation
        paths = import_module(package).__path__
        found += [m.name for m in pkgutil.walk_packages(paths, f"{package}.") if m.ispkg]
    return [name for name in dict.fromkeys(found) if "._" not in name and name != "moelab.notebooks"]


def modules(package: str) -> list[str]:
    """Names of the public modules that a package's page describes: its own, not those of packages below it."""
    paths = getattr(import_module(package), "__path__", [])
    own = [m.name for m in pkgutil.iter_modules(paths, f"{package}.") if not m.ispkg and "._" not in m.name]
    return [package, *(name for name in own if name != "moelab.lab" and not name.endswith("__"))]


def write_reference(app) -> None:
    """Write a page a package below `api/`; `-D moelab_api=NAME,NAME` writes these only."""
    folder = Path(app.srcdir) / "api"
    folder.mkdir(exist_ok=True)
    names = app.config.moelab_api.split(",") if app.config.moelab_api else packages()
    for name in names:
        parts = [f"# {name}\n"]
        for module in modules(name):
            parts.append(f"\n## {module}\n" if module != name else "")
            parts.append(f"```{{eval-rst}}\n.. automodule:: {module}\n   :members:\n   :ignore-module-all:\n```\n")
        (folder / f"{name}.md").write_text("\n".join(parts))
    listed = "\n".join(names)
    (folder / "index.md").write_text(
        f"# API reference\n\nA page a package.\n\n```{{toctree}}\n:maxdepth: 1\n{listed}\n```\n"
    )


def link(app, docname, source) -> None:
    """Lead links to files that are no pages of the site to the checkout; show diagrams as their text."""
    folder = posixpath.dirname(docname)

    def outside(found: re.Match) -> str:
        path = posixpath.normpath(posixpath.join(folder, found[2]))
        page = path.endswith(".md") and path.removesuffix(".md") in app.env.found_docs
        return f"{found[1]}({'/' if page else 'checkout:'}{path}{found[3] or ''})"

    text = re.sub(r"((?<!!)\[[^\[\]]*\])\(([^)#:\s]+)(#[^)\s]*)?\)", outside, source[0])
    text = re.sub(r"\[(!\[[^\]]*\]\([^)]*\))\]\([^)]*\)", r"\1", text.replace("```mermaid", "```text"))
    source[0] = text + PAGES if docname == root_doc else text


def resolve(app, doctree, docname) -> None:
    """Write the way from a page to a file of the checkout."""
    place = Path(app.outdir, app.builder.get_target_uri(docname)).parent
    for node in doctree.findall(nodes.reference):
        if node.get("refuri", "").startswith("checkout:"):
            path, _, rest = node["refuri"].removeprefix("checkout:").partition("#")
            node["refuri"] = os.path.relpath(ROOT / path, place) + (f"#{rest}" if rest else "")


def literal_blocks(app, what, name, thing, options, lines) -> None:
    """Keep the form of what stands indented below a line of a docstring, as Markdown would."""
    for i in range(len(lines) - 2):
        deeper = len(lines[i + 2]) - len(lines[i + 2].lstrip()) - (len(lines[i]) - len(lines[i].lstrip()))
        if lines[i].strip() and not lines[i + 1].strip() and lines[i + 2].strip() and deeper >= 4:
            lines[i] = lines[i].rstrip().removesuffix(":") + "::"


def setup(app) -> None:
    app.add_config_value("moelab_api", "", "env")
    app.connect("builder-inited", write_reference)
    app.connect("source-read", link)
    app.connect("doctree-resolved", resolve)
    app.connect("autodoc-process-docstring", literal_blocks, priority=400)
