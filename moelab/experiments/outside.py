"""Carry laws of our twins to the routed models of Clark et al. (`moelab.paper.routed_models`), and score them.

The first prediction, made before any of its cells was opened, lies in `first_prediction.csv`; `write_first` made it.

Its input are twins that were published already, of one expert a token in every second layer, in two groups that are
fitted apart, each with one number of training tokens for every size:

- "full": 101.6 M tokens of mix15; 32 wide with 16, 32, 64 and 128 experts, 64 wide with 128, 128 wide dense alone.
- "cpu": 16.4 M tokens of mix5; 32 to 128 wide with 128 experts, 32 wide with 16, 32 and 64 too.

And Clark's dense models, which are no part of the sealed data: along their curve a factor of parameters becomes nats.
That is the only correction for the other text. The main prediction is the law `effective` fitted to "full".
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import replace
from pathlib import Path

from moelab import paper
from moelab.config import DecoderConfig, ExpertConfig, ModelConfig, RoutingConfig
from moelab.config.names import BASES
from moelab.design import settings
from moelab.design.expert_laws import FORMS, DenseCurve, Fit, Form, Law, fit, fit_dense
from moelab.lazy import np, pd
from moelab.runs import records
from moelab.statistics import ALPHA

FIRST = Path(__file__).with_name("first_prediction.csv")

TWINS = FIRST.with_name("first_twins.csv")
"""The runs that it was fitted to, as `published_twins` returned them then: later runs do not change it."""

MAIN: tuple[str, Form] = ("full", "effective")
"""Twins and law of the main prediction."""

FIG_1, NO_CHANGE, SMALLEST = "Fig 1 of the paper alone", "no change with size", "Clark's law at 15M alone"
SIMPLER = (FIG_1, NO_CHANGE, SMALLEST)
"""Predictions without a law of the twins: they have values and no intervals."""

_PACKS = ("350m-twin", "350m-moe-", "1.3b-twin", "1.3b-moe-128-twin", "6.7b-twin")
_KEYS = ["size", "experts"]


def published_twins() -> pd.DataFrame:
    """Return the published runs that the first prediction is fitted to, from their records.

    Columns: twins ("full" or "cpu"), width, parameters (of the dense model, without embeddings), experts, seed, loss.
    """
    rates = {"full": [r.shared for r in settings.FULL_RATES.values()], "cpu": [settings.PEAK_RATES["cpu"]]}
    rows = []
    for name, record in records.published().items():
        if not name.startswith(_PACKS):
            continue
        spec, result = records.glance(record)
        for twins, shared in rates.items():
            like, train = settings.TRAINS[twins], spec.train
            alike = (train.tokens, train.batch_size, spec.data) == (like.tokens, like.batch_size, settings.DATA[twins])
            if alike and train.lr in shared and not spec.start and not spec.distill and _plain(spec.model):
                experts, dense = max(1, *spec.model.experts), dense_parameters(spec.model)
                rows.append([twins, spec.model.hidden, dense, experts, train.seed, result["validation_loss"]])
    return pd.DataFrame(rows, columns=["twins", "width", "parameters", "experts", "seed", "loss"])


def _plain(model: ModelConfig) -> bool:
    """Return whether a model is dense or has experts in every second layer, one a token and none dropped."""
    count = max(model.experts)
    every_second = tuple(count * (i % 2) for i in range(model.layers))
    like = replace(model, experts=every_second, top_k=1, residual=False, expert=ExpertConfig(), decoder=DecoderConfig())
    return model == replace(like, routing=RoutingConfig(drop_tokens=False))


def dense_parameters(model: ModelConfig) -> int:
    """Return the parameters without embeddings of the dense model that a model with experts grows from."""
    return replace(model, experts=(), top_k=1, residual=False, expert=ExpertConfig()).non_embedding_parameters()


def dense_curve() -> DenseCurve:
    """Return the curve through Clark's dense models, seeds of a size averaged."""
    by_size = _frame("Dense").groupby("parameters")["loss"].mean()
    return fit_dense(list(by_size.index), list(by_size))


ROUTERS = ("S-Base", "RL-R", "Hash")


def _frame(*routers: str, arms: bool = False) -> pd.DataFrame:
    """Return Clark's settings of some routers: one expert a token in every second layer, with `arms` others too."""
    frame = paper.routed_models().frame()
    plain = (frame["k"] == 1) & (frame["frequency"] == 0.5) & (frame["flop_increase"] == 1)
    return frame[(plain | arms) & frame["router"].isin(routers)]


def cells(seal: str, *, arms: bool = False) -> pd.DataFrame:
    """Return the sizes and numbers of experts of Clark's settings of a kind of seal, all routers together.

    Columns: size, parameters, experts, settings (how many routers have it), by size; with `arms` also those of other
    shares of routed layers and of more experts a token, in columns frequency and k.
    """
    frame = _frame(*ROUTERS, arms=arms)
    keys = ["parameters", "size", "experts", *(["frequency", "k"] if arms else [])]
    return frame[frame["seal"] == seal].groupby(keys).size().rename("settings").reset_index()


def factor(parameters: object, gain: object, curve: DenseCurve) -> np.ndarray:
    """Return by which factor of parameters a dense model is larger that ends a gain (nats) below one of `parameters`.

    Infinite where no dense model of the curve ends as low.
    """
    size = np.asarray(parameters, dtype=float)
    return curve.parameters(curve.loss(size) - np.asarray(gain, dtype=float)) / size


def predict(runs: pd.DataFrame, forms: tuple[Form, ...], at: pd.DataFrame, draws: int = 0) -> pd.DataFrame:
    """Return what laws fitted to runs predict for Clark's settings, over their dense curve.

    Columns: size, experts, law, gain, low, high (nats, 95 % of a single setting), times, times_low, times_high (factors
    of parameters). A law that has too few settings is left out.

    Args:
        runs: columns parameters, experts, loss, as `published_twins` of one group.
        at: from `cells`.
        draws: refits, see `moelab.design.expert_laws.fit`.
    """
    curve, parts = dense_curve(), []
    for form in forms:
        try:
            gains = fit(runs, form, draws).predict(at["parameters"], at["experts"], curve)
        except ValueError:
            continue
        part = at[_KEYS].assign(law=form)
        for i, name in enumerate(("", "_low", "_high")):
            part[name[1:] or "gain"] = gains[:, i]
        for i, name in enumerate(("", "_low", "_high")):
            part[f"times{name}"] = factor(at["parameters"], gains[:, i], curve)
        parts.append(part)
    columns = [*_KEYS, "law", "gain", "low", "high", "times", "times_low", "times_high"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def simpler(runs: pd.DataFrame, at: pd.DataFrame) -> pd.DataFrame:
    """Return the simpler predictions that need no sealed loss: columns as `predict`, without intervals.

    - `FIG_1`: the gains of 350M+MoE-128 and 1.3B+MoE-128 in the paper, in proportion to ln E, on a line through ln N.
    - `NO_CHANGE`: the gain of the 32 wide twin in nats at every size, between its numbers of experts in ln E, as that
      of most experts beyond them.
    """
    curve, size, count = dense_curve(), np.log(at["parameters"].to_numpy()), np.log(at["experts"].to_numpy())
    names = ("350M", "1.3B")
    known = [np.log(paper.model(name).computed_B * 1e9) for name in names]
    found = [-paper.loss_curve(f"{n}+MoE-128").final_minus(paper.loss_curve(n))[0] for n in names]
    slope = (found[1] - found[0]) / (known[1] - known[0])
    fig_1 = (found[0] + slope * (size - known[0])) * count / math.log(128)
    means = runs[runs["width"] == runs["width"].min()].groupby("experts")["loss"].mean()
    no_change = np.interp(count, np.log(means.index.to_numpy(float)), (means[1] - means).to_numpy())
    gains = {FIG_1: fig_1, NO_CHANGE: no_change}
    parts = [
        at[_KEYS].assign(law=law, gain=gain, times=factor(at["parameters"], gain, curve)) for law, gain in gains.items()
    ]
    return pd.concat(parts, ignore_index=True)


def write_first(runs: pd.DataFrame, path: Path = FIRST) -> None:
    """Write the first prediction, of the settings of seal `first`: columns twins (empty: none), and as `predict`.

    Args:
        runs: from `published_twins`, or `first_twins`.
    """
    at = cells("first")
    parts = [predict(part, FORMS, at).assign(twins=twins) for twins, part in runs.groupby("twins", sort=False)]
    table = pd.concat([*parts, simpler(runs[runs["twins"] == MAIN[0]], at).assign(twins="")], ignore_index=True)
    table = table[["twins", "law", *table.columns.drop(["twins", "law"])]]
    table.round(4).to_csv(path, index=False, lineterminator="\n")


def first() -> pd.DataFrame:
    """Return the first prediction as it was committed, see `write_first`."""
    return pd.read_csv(FIRST, keep_default_na=False, na_values=[""]).fillna({"twins": ""})


def first_twins(twins: str | None = None) -> pd.DataFrame:
    """Return the runs that the first prediction was fitted to, of one group or both: columns as `published_twins`."""
    runs = pd.read_csv(TWINS)
    return runs if twins is None else runs[runs["twins"] == twins]


def measured(*seals: str, arms: bool = False) -> pd.DataFrame:
    """Return the gains of Clark's settings over their dense model, of some kinds of seal, where they are opened.

    Columns: router, size, parameters, experts, gain (nats), times (factor of parameters), seal; with `arms` as `cells`.
    """
    curve, frame = dense_curve(), _frame(*ROUTERS, arms=arms)
    dense = _frame("Dense").groupby("size")["loss"].mean()
    frame = frame[frame["seal"].isin(seals) & frame["loss"].notna()]
    frame = frame.assign(gain=frame["size"].map(dense) - frame["loss"])
    frame["times"] = factor(frame["parameters"], frame["gain"], curve)
    columns = ["router", "size", "parameters", "experts", "gain", "times", "seal"] + ["frequency", "k"] * arms
    return frame.sort_values(["router", "parameters", "experts"])[columns].reset_index(drop=True)


def from_smallest(opened: pd.DataFrame, at: pd.DataFrame | None = None) -> pd.DataFrame:
    """Return what Clark's law predicts that is fitted to 15M alone, of each router: columns as `simpler`, and router.

    It is their law without size: ln of the ratio of losses is b ln(Ê / Ê(1)), fitted by least squares.

    Args:
        opened: from `measured`.
        at: settings to predict, from `cells`; by default those of `opened`, each by the fit to its router.
    """
    from scipy.optimize import least_squares

    from moelab.design.expert_laws import saturated

    curve, parts = dense_curve(), []
    for _, part in opened.groupby("router"):
        small = part[part["parameters"] == part["parameters"].min()]
        ratio = np.log(1 - small["gain"] / curve.loss(small["parameters"])).to_numpy()

        def effect(x: np.ndarray, experts: pd.Series) -> np.ndarray:
            start, most = math.exp(x[1]), math.exp(x[1]) + math.exp(x[2])
            return x[0] * np.log(saturated(experts, start, most) / start)

        def residuals(x: np.ndarray, small: pd.DataFrame = small, ratio: np.ndarray = ratio) -> np.ndarray:
            return effect(x, small["experts"]) - ratio

        bounds = ([-3.0, 0.0, 0.0], [0.0, math.log(8), 10.0])
        starts = [[-0.05, 0.5, math.log(most)] for most in (50.0, 400.0, 4000.0)]
        best = min((least_squares(residuals, x, bounds=bounds) for x in starts), key=lambda found: found.cost).x
        asked = part if at is None else at.assign(router=part["router"].iloc[0])
        gain = curve.loss(asked["parameters"]) * (1 - np.exp(effect(best, asked["experts"])))
        times = factor(asked["parameters"], gain, curve)
        parts.append(asked[["router", *_KEYS]].assign(twins="", law=SMALLEST, gain=gain, times=times))
    return pd.concat(parts, ignore_index=True)


def compare(predicted: pd.DataFrame, opened: pd.DataFrame) -> pd.DataFrame:
    """Return every prediction with what was measured, a row for each setting of Clark's.

    Columns: those of `opened` (gain and times as measured), twins, law, expected, low, high, expected_times, inside
    (None without an interval), miss (measured minus expected, nats), and miss_times (ln of the ratio of factors).

    Args:
        predicted: from `first`.
        opened: from `measured`.
    """
    renamed = {"gain": "expected", "times": "expected_times"}
    left = opened.merge(predicted.rename(columns=renamed), on=_KEYS)
    own = opened.merge(from_smallest(opened).rename(columns=renamed), on=["router", *_KEYS])
    table = pd.concat([left, own], ignore_index=True).sort_values(["router", "parameters", "experts"], kind="stable")
    within = (table["low"] <= table["gain"]) & (table["gain"] <= table["high"])
    table["inside"] = within.astype(object).where(table["low"].notna(), None)
    table["miss"] = table["gain"] - table["expected"]
    with np.errstate(divide="ignore", invalid="ignore"):
        table["miss_times"] = np.log(table["times"] / table["expected_times"])
    return table.reset_index(drop=True)


def scores(compared: pd.DataFrame) -> pd.DataFrame:
    """Return how well each prediction did, a row each, the main one first.

    Columns: twins, law, settings, inside (share in the 95 % interval, NaN without one), error (median, nats),
    error_times (median factor between expected and measured factor of parameters), rank (Spearman's correlation over
    settings), bias (median miss, nats).
    """
    rows = []
    for (twins, law), part in compared.groupby(["twins", "law"], sort=False):
        inside = part["inside"].dropna()
        share = float(inside.astype(float).mean()) if len(inside) else math.nan
        apart = math.exp(part["miss_times"].abs().median())
        rank = part["gain"].corr(part["expected"], method="spearman")
        rows.append([twins, law, len(part), share, part["miss"].abs().median(), apart, rank, part["miss"].median()])
    table = pd.DataFrame(rows, columns=["twins", "law", "settings", "inside", "error", "error_times", "rank", "bias"])
    order = [MAIN, *((t, f) for t in ("full", "cpu") for f in FORMS if (t, f) != MAIN), *(("", s) for s in SIMPLER)]
    place = [order.index(pair) for pair in zip(table["twins"], table["law"], strict=True)]
    return table.iloc[np.argsort(place, kind="stable")].reset_index(drop=True)


def twin_factors(runs: pd.DataFrame, law: Law) -> pd.DataFrame:
    """Return the factor of parameters of each setting of the twins: columns parameters, experts, times.

    Args:
        runs: as `published_twins`, of one group.
        law: whose dense curve is taken, moved to the dense twins of a size.
    """
    means = runs.groupby(["parameters", "experts"])["loss"].mean().unstack("experts")
    gains = means.rsub(means[1], axis=0).drop(columns=1).stack().rename("gain").reset_index()
    times = factor(gains["parameters"], gains["gain"], law.dense)
    return gains.assign(times=times)[["parameters", "experts", "times"]]


DRAWN = (2, 8, 16, 128, 512)
"""Numbers of experts in the figure: those of both, and the ends of what was opened."""


def drawn(fitted: Fit) -> dict[int, tuple[float, float, float]]:
    """Return the factor of parameters that a law `effective` gives `DRAWN` experts, with 95 % of a single setting."""
    times = 1 + fitted.scatter * np.random.default_rng(3).standard_t(fitted.freedom, size=len(fitted.draws))
    found = {}
    for experts in DRAWN:
        draws = [math.exp(law.effect(1e6, experts) * t) for law, t in zip(fitted.draws, times, strict=True)]
        low, high = np.quantile(draws, [ALPHA / 2, 1 - ALPHA / 2])
        found[experts] = (math.exp(fitted.law.effect(1e6, experts)), float(low), float(high))
    return found


def headline(compared: pd.DataFrame) -> str:
    """Return in one line how the main prediction did, and where it missed most; `compared` comes from `compare`."""
    inside = [f"{int(part.sum())} of {len(part)}" for part in _inside(compared)]
    return (
        f"Twins of 0.1 to 2 million parameters predict Clark's models with 2 to 16 experts ({inside[0]} inside the "
        f"95 % intervals) but not with 256 and 512 ({inside[1]})"
    )


def title(compared: pd.DataFrame) -> str:
    """Return `headline` short enough for a figure."""
    few, many = (part.mean() for part in _inside(compared))
    return f"{few:.0%} of predictions hold for up to 16 experts, {many:.0%} for more"


def _inside(compared: pd.DataFrame) -> list[pd.Series]:
    """Return, of settings of up to 16 experts and of more, which are inside the main prediction's intervals."""
    main = compared[(compared["twins"] == MAIN[0]) & (compared["law"] == MAIN[1])]
    return [main.loc[few, "inside"].astype(float) for few in (main["experts"] <= 16, main["experts"] > 16)]


MOST_PARAMETERS, MOST_EXPERTS = 3.7e8, 16
"""Where the main law was shown to hold: from the smallest of Clark's models to their 370M, with 2 to 16 experts. The
limits were chosen after the comparison, in which it missed larger models and many experts."""


def parse(name: str) -> tuple[float, int]:
    """Return a model's parameters without embeddings, of its dense base, and its number of experts.

    Args:
        name: the paper's, or a size with experts, such as "130M+MoE-8".

    Raises:
        ValueError: one line: it is neither, or a model that the law says nothing of.
    """
    if match := re.fullmatch(r"(?i)\s*(\d+(?:\.\d+)?)([MB])\+MoE-(\d+)\s*", name):
        base = f"{match[1]}{match[2].upper()}"
        experts, known = int(match[3]), base in BASES
        size = (
            dense_parameters(ModelConfig.parse(base))
            if known
            else float(match[1]) * 10 ** (6 if base[-1] == "M" else 9)
        )
        return size, experts
    ModelConfig.parse(name)  # names what is wrong with it, if anything is
    raise ValueError(f"predict: {name}: the law knows a base with one number of experts, such as 350M+MoE-16")


def shown() -> str:
    """Return in words where the main law was shown to hold, and how well it did there."""
    table = compare(first(), measured("first"))
    main = table[(table["twins"] == MAIN[0]) & (table["law"] == MAIN[1])]
    kept = main[(main["experts"] <= MOST_EXPERTS) & (main["parameters"] <= MOST_PARAMETERS)]
    return (
        f"2 to {MOST_EXPERTS} experts over {kept['parameters'].min() / 1e6:.0f} to {MOST_PARAMETERS / 1e6:.0f} M "
        f"parameters without embeddings ({int(kept['inside'].sum())} of {len(kept)} models inside 95 % intervals)"
    )


def nearest(parameters: float, experts: int, rows: int = 3) -> pd.DataFrame:
    """Return the opened settings of Clark's nearest in size and number of experts (logarithms), as `measured`."""
    opened = measured("seen", "first")
    apart = np.log(opened["parameters"] / parameters).abs() + np.log(opened["experts"] / experts).abs()
    return opened.assign(apart=apart).sort_values("apart", kind="stable").head(rows).drop(columns="apart")


def predict_one(parameters: float, experts: int) -> dict[str, float]:
    """Return what the main law says of one model: gain, low, high (nats), times, times_low, times_high (95 %).

    Raises:
        ValueError: one line: the law was not shown to hold there; it names the nearest model that was measured.
    """
    smallest = measured("first")["parameters"].min()
    if not (smallest <= parameters <= MOST_PARAMETERS and 2 <= experts <= MOST_EXPERTS):
        near = nearest(parameters, max(experts, 1), rows=1).iloc[0]
        raise ValueError(
            f"predict: {experts} experts over {parameters / 1e6:,.0f} M parameters: no prediction; shown to hold for "
            f"{shown()}; nearest measured: {near['router']} {near['size']} with {near['experts']} experts, "
            f"{near['times']:.2f} times its base"
        )
    curve = dense_curve()
    gains = _main_fit().predict([parameters], [experts], curve)[0]
    values = [*gains, *factor(parameters, gains, curve)]
    return dict(zip(("gain", "low", "high", "times", "times_low", "times_high"), map(float, values), strict=True))


@functools.cache
def _main_fit() -> Fit:
    """Return the main law with refits enough for an interval of one model, in seconds."""
    return fit(first_twins(MAIN[0]), MAIN[1], draws=100)
