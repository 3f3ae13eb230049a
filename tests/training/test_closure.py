"""What a reader of the training loop has to open: the files of moelab that importing it loads."""

import subprocess
import sys

FILES, LINES = 67, 8505

COUNT = """
import sys
import moelab.training.loop
for name, module in sorted(sys.modules.items()):
    if name.partition(".")[0] == "moelab" and getattr(module, "__file__", None):
        print(name, len(open(module.__file__).read().splitlines()))
"""


def test_the_training_loop_imports_few_files():
    """A number above the limit: import what only some trainings need in the function that needs it."""
    out = subprocess.run([sys.executable, "-c", COUNT], capture_output=True, text=True, check=True).stdout
    lines = {name: int(count) for name, count in map(str.split, out.splitlines())}
    assert "moelab.training.trainer" in lines and "moelab.kernels" in lines, "this test sees what is imported"
    assert len(lines) <= FILES and sum(lines.values()) <= LINES, (len(lines), sum(lines.values()))
    elsewhere = ("moelab.runs", "moelab.data.preparation", "moelab.engine.cluster", "moelab.engine.launch.launcher")
    assert not [name for name in lines if name.startswith(elsewhere)]
