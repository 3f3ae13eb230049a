"""`moelab predict`: what experts are worth in a model, by the laws that were tested on models of others."""

from __future__ import annotations

from typing import Annotated

import typer

from moelab import terminal
from moelab.cli._options import AsJson, print_json


def predict(
    model: Annotated[str, typer.Argument(help="350M+MoE-16, or another size without embeddings: 130M+MoE-8")],
    as_json: AsJson = False,
) -> None:
    """Predict what experts gain over a dense model.

    One expert a token, in every second layer. The law of our twins is used where it was shown to hold for the models of
    Clark et al., and refused elsewhere; docs/prediction.md has the test.
    """
    from moelab.experiments import outside

    parameters, experts = outside.parse(model)
    with terminal.working("fitting the law to our twins"):
        found = outside.predict_one(parameters, experts)
    near = outside.nearest(parameters, experts)
    if as_json:
        print_json({"model": model, **found, "nearest": near.to_dict("records")})
        return
    value, low, high = (f"{found[name]:.2f}" for name in ("times", "times_low", "times_high"))
    terminal.say(
        f"{model}: {experts} experts, one a token, over {parameters / 1e6:,.0f} M parameters (without embeddings)"
    )
    terminal.say(f"worth {value} times the parameters of its dense base ({low} to {high}: 95 % of single models)")
    terminal.say(
        f"that is {found['gain']:.3f} nats per token ({found['low']:.3f} to {found['high']:.3f}) on Clark's text"
    )
    terminal.say(f"shown to hold: {outside.shown()}")
    view = terminal.table("nearest measured", "experts", "times its base", "nats gained", title=None)
    for row in near.itertuples():
        view.add_row(f"{row.router} {row.size}", f"{row.experts}", f"{row.times:.2f}", f"{row.gain:.3f}")
    terminal.console().print(view, highlight=False)
