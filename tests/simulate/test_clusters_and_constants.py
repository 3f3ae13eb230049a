import subprocess
import sys
from dataclasses import replace

import pytest

from moelab import simulate
from moelab.simulate import paper_figures
from moelab.simulate.constants import FREE, MODERN_FREE, PAPER_HAS_NONE, SOURCES, Constants
from moelab.simulate.hardware import ALIASES, parse

GOOD = """
name: mine
gpu: {name: X, memory_gib: 10, memory_gb_s: 100, tflops: 10}
gpus_per_node: 4
near_gb_s: 50
far_gb_s: 5
"""


def test_shipped_clusters_are_whole_and_cite_their_source():
    assert set(ALIASES.values()) < set(simulate.clusters())
    for name in simulate.clusters():
        cluster = simulate.cluster(name)
        assert cluster.name == name and cluster.source
        assert cluster.price_per_gpu_hour > 0 or "price unknown" in cluster.source
    assert simulate.cluster("a100") == simulate.cluster("A100-40GB")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (GOOD.replace("far_gb_s: 5", ""), "far_gb_s is missing"),
        (GOOD.replace("tflops: 10", "flops: 10"), "gpu.tflops is missing"),
        (GOOD + "colour: red", "unknown field colour"),
        (GOOD.replace("far_gb_s: 5", "far_gb_s: fast"), "far_gb_s must be a number, got 'fast'"),
        (GOOD.replace("far_gb_s: 5", "far_gb_s: -5"), "far_gb_s must be positive, got -5"),
        (GOOD + "price_per_gpu_hour: .nan", "price_per_gpu_hour must not be negative, got nan"),
        (GOOD.replace("gpus_per_node: 4", "gpus_per_node: 4.5"), "gpus_per_node must be a whole number, got 4.5"),
        ("name: [", "line 1: not valid YAML"),
        ("- a", "expected fields such as name and gpu, got list"),
        ("!!python/object/apply:os.system [true]", "not valid YAML"),
    ],
)
def test_a_bad_file_is_one_line(text, part):
    with pytest.raises(ValueError) as error:
        parse(text, "mine.yaml")
    assert part in str(error.value) and "\n" not in str(error.value) and "mine" in str(error.value)


def test_ones_own_cluster_and_unknown_names(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD)
    mine = simulate.cluster(str(file))
    assert (mine.gpu.memory_gib, mine.gpus_per_node, mine.price_per_gpu_hour) == (10.0, 4, 0.0)
    with pytest.raises(ValueError, match=r"no cluster 'a100-40'; did you mean a100-40gb\? allowed: "):
        simulate.cluster("a100-40")
    with pytest.raises(ValueError, match="No such file"):
        simulate.cluster(str(tmp_path / "none.yaml"))
    with pytest.raises(ValueError, match=r"no system 'pytroch'; did you mean pytorch\? allowed: "):
        simulate.system("pytroch")


def test_the_stored_fit_is_of_this_simulator():
    """That a fit gives it again: tests/cli/test_simulate.py."""
    stored = simulate.calibration()
    for name, value in stored["constants"].items():
        low, high, why = FREE[name]
        assert low <= value <= high and why
        assert (name in stored["at_bound"]) == (value in (low, high))
    assert {(b.system, b.gpus): b.simulate().latency_ms for b in paper_figures.fig10()} == pytest.approx(
        {(b["system"], b["gpus"]): b["simulated_ms"] for b in stored["bars"]}, rel=1e-3
    )
    assert set(stored) >= {"fitted_on", "method", "made"}
    worst = max(abs(b["simulated_ms"] / b["paper_ms"] - 1) for b in stored["bars"])
    assert worst < 0.10, "two constants for eight bars"


def test_the_fit_finds_constants_that_made_the_bars():
    """Bars made by the simulator from known constants: the fit gives what can be identified back."""
    truth = Constants().with_free({"eager_us": 18.0, "far_us": 9.0})
    made = [replace(b, paper_ms=b.simulate(constants=truth).latency_ms) for b in paper_figures.fig10()]
    found = simulate.fit(made)
    assert found["constants"]["eager_us"] == pytest.approx(18.0, rel=0.01)
    assert found["constants"]["far_us"] == pytest.approx(9.0, rel=0.05)


def test_no_bar_but_fig_10_is_fitted_and_every_constant_has_a_source():
    everything = (
        paper_figures.fig10()
        + paper_figures.fig11()
        + paper_figures.tutorial()
        + paper_figures.variants()
        + paper_figures.fig14()
        + paper_figures.fig15()
    )
    assert {b.figure for b in everything if b.fitted} == {"fig-10"}
    assert set(FREE) | set(SOURCES) | PAPER_HAS_NONE == set(Constants.__dataclass_fields__)
    modern = {name for names in MODERN_FREE.values() for name in names} | {"links_overlap"}
    assert PAPER_HAS_NONE <= modern


def test_paper_and_simulator_load_no_torch():
    code = (
        "import sys; from moelab import paper; paper.loss_curve('350M'); "
        "[read() for read in (paper.models, paper.claims, paper.all_training_settings, paper.zero_shot, "
        "paper.inference_results, paper.conflicts, paper.training_throughput)]; "
        "print({'torch', 'pandas', 'numpy'} & sys.modules.keys()); "
        "from moelab import simulate; simulate.plan('350M+MoE-32', 8); print({'torch', 'pandas'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["set()", "set()"]


def test_a_card_has_the_cluster_of_its_kind_and_memory():
    cards = {
        "NVIDIA A100-SXM4-40GB": "a100-40gb",
        "NVIDIA A100-SXM4-80GB": "a100-80gb",
        "NVIDIA H100 80GB HBM3": "h100",
    }
    assert {card: simulate.cluster_of_card(card).name for card in cards} == cards
    others = ("A100 80GB PCIe", "A100-PCIE-40GB", "H200 NVL", "H100 80GB HBM3 MIG 1g.10gb", "GeForce RTX 4090")
    assert [simulate.cluster_of_card(f"NVIDIA {card}") for card in others] == [None] * 5
