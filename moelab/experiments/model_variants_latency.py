"""Serve PR-MoE and Mixture-of-Students (paper section 5.5.3, Figs 12 and 13).

Shows: memory per GPU of the 349B model and its variants over GPU counts, and with it the fewest GPUs that hold them;
latency of the three variants of every size.

Here: predictions. The paper's bars are not available, only its text. The PR-MoE variants of the large models are not
in the paper: 64 experts, 128 in the last two MoE layers, and an eighth of the layers cut for the student, as for the
1.3B base. For 349B the authors' script (`moelab.simulate.paper_figures.SCRIPT`) has the same; for other sizes it is
assumed.
"""

from __future__ import annotations

from functools import partial

from moelab import paper
from moelab.config import ModelConfig
from moelab.design.experiment import Experiment, Scale
from moelab.design.simulated import judge_simulated
from moelab.design.verdicts import Verdict
from moelab.experiments.decoding import check_file
from moelab.lazy import pd


def models() -> dict[str, ModelConfig]:
    """Return the 349B model as each variant, by the variant's name."""
    from moelab.simulate import paper_figures

    return {bar.label.split()[1]: bar.model for bar in paper_figures.variants(("8B",))}


def latency() -> pd.DataFrame:
    """Return the bars of Fig 13, simulated: `Bar.row`, with columns base and variant."""
    from moelab.simulate import paper_figures

    shown = paper_figures.variants()
    names = [bar.label.split() for bar in shown]
    return paper_figures.frame(shown).assign(
        base=[base for base, _ in names], variant=[variant for _, variant in names]
    )


def latency_headline(frame: pd.DataFrame) -> str:
    """Return how much faster the student is than its PR-MoE, in one line; from `latency`."""
    ms = frame.pivot(index="base", columns="variant", values="simulated_ms")
    gain = 100 * (1 - ms["PR-MoE+MoS"] / ms["PR-MoE"])
    return f"The student takes {gain.min():.1f} to {gain.max():.1f} % less time than its PR-MoE"


def verdicts(held: pd.DataFrame, latency: pd.DataFrame) -> list[Verdict]:
    """Judge the claims on Figs 12 and 13.

    Args:
        held: `moelab.simulate.frames.memory()`.
        latency: `latency()`.
    """
    from moelab.simulate import frames

    least = held[held["fits"]].groupby("variant")["gpus"].min()
    ms = latency.pivot(index="base", columns="variant", values="simulated_ms")
    student = ms["PR-MoE+MoS"]
    others = ms[["MoE", "PR-MoE"]].min(axis=1)
    base = (student / others).idxmax()  # the student is the fastest at every size if it is here
    behind = {other: [base for base in ms.index if student[base] >= ms.loc[base, other]] for other in ("PR-MoE", "MoE")}
    note = " ".join(
        f"Faster than the {name} at every size." if not sizes else f"Not faster than the {name} at {', '.join(sizes)}."
        for name, sizes in (("PR-MoE", behind["PR-MoE"]), ("standard MoE", behind["MoE"]))
    )
    note += f" Closest at {base}: {student[base]:.2f} ms against {others[base]:.2f}."
    few = frames.few_gpus().set_index(["base", "variant"])["simulated_ms"]["2.4B"]
    ours = {
        "half-the-gpus": (
            least["PR-MoE+MoS"] / least["MoE"],
            "Experts and the student's depth from the authors' script.",
        ),
        "pr-moe-mos-lowest-latency": (student[base] - others[base], note),
        "pr-moe-lower-latency": (
            None,
            "The released system is not modelled. On the full one and 8 GPUs, with experts 64/128 as in the authors' "
            f"larger models, PR-MoE takes {few['PR-MoE'] / few['MoE']:.3f} times as long as the standard MoE.",
        ),
    }
    return [
        judge_simulated(claim, ours[claim.id][0], against=others[base], note=ours[claim.id][1])
        for claim in paper.claims("model-variants-latency")
    ]


EXPERIMENT = Experiment(
    name="model-variants-latency",
    number=12,
    title="PR-MoE and students at inference",
    paper="Figs 12 and 13 (section 5.5.3)",
    question="How many GPUs, and how much time, do PR-MoE and Mixture-of-Students save?",
    paper_answer="PR-MoE with the staged student serves 349B quality on 16 GPUs instead of 32, and is the fastest "
    "variant at every size.",
    scales={
        "smoke": Scale("simulated cluster; tiny twins on 2 gloo ranks", "seconds"),
        "cpu": Scale("simulated cluster; twins on 2 gloo ranks", "a minute on two cores (estimated)"),
        "gpu": Scale("simulated cluster; twins of the 349B variants, 512 wide, on one GPU", "not yet run; one GPU"),
        "paper": Scale(
            "simulated cluster; 8B+MoE-128 and its variants as `srun moelab bench decode` measured them",
            "not yet run; A100 cluster",
        ),
    },
    check=partial(check_file, "model-variants-latency", "decode", ["model"]),
    measures=True,
    measures_on_gpu=("gpu",),
)
