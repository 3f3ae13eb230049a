"""moelab: every experiment of the DeepSpeed-MoE paper (arXiv 2201.05596), rerun, questioned and extended.

Importing this package loads neither torch nor anything else heavy; import what you need from its subpackages. A copied
source tree works without installation: `python -m moelab.cli` in its folder is the command `moelab`.
"""

import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path

__version__ = "0.2.0"

_TREE = Path(__file__).resolve().parents[1]


class _Kernels:
    """Finds `moelab.kernels` in the folder `kernels` of this source tree, installed or not."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Return the spec of `moelab.kernels`, None for other modules."""
        if name != "moelab.kernels":
            return None
        folder = _TREE / "kernels"
        return spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])


if (_TREE / "pyproject.toml").is_file() and (_TREE / "kernels" / "__init__.py").is_file():
    sys.meta_path.insert(0, _Kernels)  # before an installation of another tree
