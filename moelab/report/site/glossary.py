"""Explain the words of the pages where they stand and in a glossary."""

from __future__ import annotations

import re

from markupsafe import Markup, escape

from moelab.design.verdicts import OUTCOMES
from moelab.plotting.typography import typeset

TERMS = {
    "twin": "the scaled-down counterpart of a model of the paper: the same shape rules, narrower and shallower, with "
    "as many experts (fewer at the scale smoke)",
    "arm": "one of the models or settings that an experiment compares",
    "seed": "the number from which initial weights and the order of the data are drawn; several show how much of a "
    "difference is chance",
    "scale": "the size at which an experiment runs: smoke (seconds, for tests), quick (minutes), cpu (a laptop), "
    "full (the paper’s own tokens for each parameter), gpu (one GPU), paper (the published models on a cluster); "
    "simulated: the cluster model",
    "nats": "unit of the loss: the mean of −ln p, p the probability that the model gave to the right next token; 0.7 "
    "less is twice the probability",
    "MoE": "mixture of experts: a layer with several feed-forward networks, of which a gate chooses one or a few for "
    "each token",
    "MoE-128": "128 experts in every second layer",
    "PR-MoE": "pyramid-residual MoE: more experts in the last layers (32/64: 64 in the last two), and a fixed network "
    "beside each expert",
    "Top-2": "each token goes to two experts instead of one",
    "drop-free": "without a limit on the tokens that an expert takes; with one, the tokens above it skip the expert",
    "L21": "a student with 21 layers where its teacher has 24",
    "KD": "knowledge distillation: a student is trained to imitate the outputs of a larger teacher",
    "MoS": "mixture of students: a smaller PR-MoE trained by distillation that stops before the end",
    "95\u00a0% interval": "Student’s interval of the mean over seeds, or of the difference of two arms’ means (Welch); "
    "of a verdict, where several looks at a comparison were planned, the wider one by which all looks are right "
    "together; along curves, that of each point by itself",
    "smallest effect of interest": "the difference that was fixed beforehand as the smallest that matters, where the "
    "paper gives no number",
    "primary claim": "the one claim of a figure without which its other claims say nothing; those are tested only "
    "where it holds",
    "Holm": "Holm’s adjustment for several tests: all primary claims together, and the further claims of a figure "
    "together, are right with 95 % probability",
    "q": "q-value: of all tests with q below 0.05, 5 % at most are expected to be wrong (Benjamini and Hochberg)",
    **{verdict: about.meaning for verdict, about in OUTCOMES.items()},
    "all-to-all": "the exchange in which each GPU sends tokens to the experts on all others",
    "counted": "follows from the models’ definition by arithmetic; nothing is measured",
    "measured": "trained or timed here",
    "simulated": "computed by the cluster simulator, on numbers that it was not fitted on; alike is within 15 %",
    "fitted": "computed by the cluster simulator on the numbers that its constants come from: no evidence",
}
"""Term -> what it means, in the order of the glossary."""

_EXPLAINED = ("twin", "arm", "nats", "drop-free", "L21", "KD", "MoS", "Holm", "PR-MoE", "Top-2", "all-to-all")
_PATTERN = re.compile(
    r"(?<![\w/+-])(?P<term>" + "|".join(re.escape(term) for term in _EXPLAINED) + r")(?P<plural>s?)(?![\w+/-])"
)


def explain(text: str) -> Markup:
    """Return a text, typeset, with the first place of each of its terms marked as ``<abbr>`` with the meaning."""
    seen: set[str] = set()

    def marked(found: re.Match[str]) -> str:
        term = found["term"]
        if term in seen or (found["plural"] and term not in ("twin", "arm")):
            return found[0]
        seen.add(term)
        return f'<abbr title="{escape(TERMS[term])}">{found[0]}</abbr>'

    quoted = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(typeset(text))))
    return Markup(_PATTERN.sub(marked, quoted))
