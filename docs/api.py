"""The API reference, from the docstrings: `make api` writes it as pages that need no network.

python docs/api.py .moelab/api                     # everything: half a minute of CPU time
python docs/api.py .moelab/api moelab.config       # some modules
"""

import pkgutil
import sys
import warnings
from importlib import import_module
from pathlib import Path

import pdoc


def modules() -> list[str]:
    """Names of all public modules; the packages first that a reader needs first."""
    found = ["moelab"]
    for package in ("moelab", "moelab.kernels"):  # kernels/ is mapped there by the installation
        paths = import_module(package).__path__
        found += [package, *(m.name for m in pkgutil.walk_packages(paths, f"{package}."))]
    hidden = ("moelab.notebooks", "moelab.report.templates")
    return [name for name in dict.fromkeys(found) if "._" not in name and not name.startswith(hidden)]


def main(out: str, *names: str) -> None:
    # Packages that import their names on demand have them in the modules they come from; pdoc warns about each.
    warnings.filterwarnings("ignore", message="Found .* but it does not resolve")
    pdoc.render.configure(docformat="google", show_source=False, footer_text="moelab")
    pdoc.pdoc(*(names or modules()), output_directory=Path(out))
    print(f"{Path(out) / 'index.html'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
