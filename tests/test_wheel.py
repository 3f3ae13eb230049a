"""The wheel, installed in an empty environment: what a user without a checkout has."""

import os
import site
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

CONTENT = """
from pathlib import Path
import moelab, moelab.kernels
from moelab import paper, paths, simulate
from moelab.experiments import EXPERIMENTS
from moelab.design.parameters import parameters
assert paths.checkout() is None and "site-packages" in moelab.__file__
assert simulate.plan("350M+MoE-32", 8, "h100").best.fits, "clusters and calibration come along"
assert {path.suffix for path in (Path(moelab.kernels.__file__).parent / "_cpp").iterdir()} >= {".cpp", ".h"}
assert paper.models() and paper.claims() and "seeds" in parameters(EXPERIMENTS["pr-moe"])
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An environment with the wheel alone; what it depends on is read from the tests' own environment."""
    root = tmp_path_factory.mktemp("wheel")
    # The wheel is made from the source distribution, which leaves no build/ in the checkout for a later wheel.
    command = [sys.executable, "-m", "build", "--outdir", str(root), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = root.glob("*.whl")
    venv.create(root / "venv", with_pip=False, symlinks=True)
    python = root / "venv" / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, str(wheel)], check=True)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(root / "venv")}))
    (own / "dependencies.pth").write_text("\n".join(site.getsitepackages()))  # not those folders' own .pth files
    return root


@pytest.fixture
def call(installed):
    def call(program, *arguments):
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MOELAB_RESULTS")}
        env |= {"MOELAB_HOME": str(installed / "home"), "OMP_NUM_THREADS": "1"}
        env["JUPYTER_PATH"] = (
            f"{sys.prefix}/share/jupyter"  # nbconvert's templates, which pip puts outside site-packages
        )
        command = [str(installed / "venv" / "bin" / program), *arguments]
        done = subprocess.run(command, env=env, cwd=installed, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr + done.stdout
        return done.stdout

    return call


@pytest.mark.slow
def test_a_wheel_brings_notebooks_kernels_and_the_papers_numbers(call):
    call("python", "-c", CONTENT)
    assert "pr-moe" in call("moelab", "list")


@pytest.mark.slow
@pytest.mark.notebook
def test_an_installed_wheel_runs_an_experiment_and_shows_it(call, installed):
    call("moelab", "run", "expert-count", "--scale", "smoke")
    call("moelab", "browse", "--no-serve")
    assert list((installed / "home" / "pages" / "expert-count" / "smoke").glob("*/notebook.html"))
    assert "expert-count/smoke" in (installed / "home" / "pages" / "figures.html").read_text()
