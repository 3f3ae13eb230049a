"""What a notebook says at its end, from the verdicts."""

import pandas as pd
import pytest

from moelab import paper
from moelab.design import comparison
from moelab.design.conclusion import conclude
from moelab.design.judging import judge, judge_timing
from moelab.design.simulated import judge_simulated


def test_a_conclusion_quotes_verdicts_with_their_intervals_and_counts_what_is_left():
    judged = [
        judge(paper.claim("moe128-350m-beats-own-base"), [-0.30, -0.31, -0.305]),
        judge(paper.claim("moe128-beats-moe32"), [-0.1, 0.1, 0.0]),
        judge(paper.claim("pyramid-shrinks-gap"), [-0.1]),
    ]
    text = conclude("MoE-128 is ahead.", judged, seeds=3)._repr_markdown_()
    assert text.startswith("## Conclusion\n\n**What was found.** MoE-128 is ahead.\n")
    assert f"*{judged[0].verdict}*: {judged[0].statement} Ours -0.305 nats/token (" in text and "paper -0.307" in text
    assert judged[2].statement not in text and "1 of the paper’s 3 claims here is not judged" in text
    assert "Not told yet: 1, which more seeds" in text and "95 % over 3 seeds" in text
    for seeds, said in ((0, "Nothing here has a spread"), (1, "One seed says nothing"), (4, "over 4")):
        assert said in str(conclude("A finding", seeds=seeds)), "without claims the seeds say how sure it is"
    simulated = [judge_simulated(paper.claim("1t-under-25ms"), 21.4)]
    for text in (str(conclude("Fast", simulated=True)), str(conclude("Fast", simulated))):
        assert "Simulated values have no spread" in text and "Small models" not in text
    assert "Small models" in str(conclude("A finding", seeds=3, scale="cpu"))
    assert "Small models" not in str(conclude("A finding", seeds=3, scale="paper")), "they have the paper's size"
    timed = str(conclude("A finding", [judge_timing(paper.claim("kernels-6x"), [[6.5, 6.6]] * 3)]))
    assert "this machine and these shapes alone" in timed and "Small models" not in timed, "kernels are no models"
    own = str(conclude("A finding", seeds=3, sure="Refits say so."))
    assert "**How sure.** Refits say so.\n" in own, "in place of the sentence on seeds"


def test_a_simulations_claims_depend_neither_on_a_scale_nor_on_seeds():
    judged = [
        judge_simulated(paper.claim("pr-moe-mos-lowest-latency"), -0.1, against=10.0),
        judge_simulated(paper.claim("pr-moe-lower-latency"), None),
    ]
    text = str(conclude("Fast", judged, simulated=True))
    assert "claims here is not judged. " in text and "seeds" not in text and "Not told: 1, where two simulated" in text


def test_pairs_and_headlines_of_curves():
    final = pd.DataFrame(
        [("a", s, 3.0 + s) for s in (0, 1)] + [("b", s, 2.5 + s) for s in (0, 1)],
        columns=["arm", "seed", "validation_loss"],
    )
    table = comparison.pairs(final, [("b", "a"), ("c", "a"), ("b", "a")])
    assert list(table["arm"]) == ["b − a"] * 2 and table["gap"].tolist() == [-0.5, -0.5]
    curves = pd.DataFrame(
        [(arm, 0, t, loss - t / 10) for arm, loss in (("a", 3.0), ("b", 2.0)) for t in (1, 2)],
        columns=["arm", "seed", "tokens", "loss"],
    )
    moved = comparison.over_training(curves, ["b"], "a")
    assert moved["against"].unique().tolist() == ["a"]
    ends = curves[curves["tokens"] == 2].rename(columns={"loss": "validation_loss"})
    assert comparison.ends_headline(ends) == "Final loss: a 2.80, b 1.80 nats"
    with pytest.raises(ValueError, match=r"^arm 'a' has several runs of seed 0"):
        comparison.over_training(pd.concat([curves, curves]), ["b"], "a")


def test_losses_on_different_texts_are_not_compared():
    rows = [("a", 0, 3.0, 6.3), ("b", 0, 2.0, 6.3), ("c", 0, 2.0, 6.4)]
    final = pd.DataFrame(rows, columns=["arm", "seed", "validation_loss", "unigram_loss"])
    assert comparison.paired(final, "b", "a") == [-1.0] and len(comparison.pairs(final, [("b", "a")])) == 1
    for compared in (
        lambda: comparison.paired(final, "c", "a"),
        lambda: comparison.pairs(final, [("b", "a"), ("c", "b")]),
        lambda: comparison.gaps(final, "a"),
    ):
        with pytest.raises(ValueError, match=r"^arms '[ab]' and 'c' were validated on different texts or tokens"):
            compared()
