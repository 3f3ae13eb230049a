"""Training settings and throughput."""

import pytest

from moelab import paper


def test_published_settings():
    row = paper.training_settings("350M+MoE-128")
    assert (row.batch_seqs, row.seq_len, row.lr, row.min_lr) == (256, 2048, 2e-4, 2e-6)
    assert (row.warmup_tokens, row.decay_tokens, row.train_tokens) == (375e6, 300e9, 300e9)
    assert (row.aux_coefficient, row.capacity_factor_train, row.min_capacity) == (0.01, 1.0, 4)
    assert row.drop_tokens is True and row.random_token_selection is True and not row.assumed
    dense = paper.training_settings("6.7B")
    assert (dense.lr, dense.min_lr, dense.init_std, dense.decay_tokens) == (1.2e-4, 1.2e-5, 0.01, 260e9)
    assert dense.aux_coefficient is None and dense.drop_tokens is None


def test_ablations_are_marked_as_assumed():
    pr = {"350M+PR-MoE-32/64", "1.3B+PR-MoE-64/128"}
    published = {"350M", "1.3B", "6.7B", "350M+MoE-128", "1.3B+MoE-128", "125M+MoE-64"} | pr
    published |= {f"{model}+L21+MoS" for model in pr}
    assert {row.run for row in paper.all_training_settings() if not row.assumed} == published
    row = paper.training_settings("350M+Top2-MoE-32")
    assert row.assumed and row.assumed_from == "350M+MoE-128" and row.how == "assumed"


@pytest.mark.parametrize("row", paper.all_training_settings(), ids=lambda row: row.run)
def test_steps(row):
    assert row.steps == round(row.train_tokens / (row.batch_seqs * row.seq_len))
    assert row.steps_with_rampup >= row.steps
    assert (row.decay_tokens == 260e9) == (not paper.model(row.run).moe_layers)  # lr-decay-arms
    assert row.min_lr < row.lr


def test_rampup_steps():
    """dense-batch-rampup: the ramp adds steps, counted here one batch at a time."""
    for run in ("1.3B", "6.7B"):
        row = paper.training_settings(run)
        samples = steps = 0
        stages = (row.batch_seqs - row.rampup_start_seqs) // row.rampup_step_seqs
        while samples * row.seq_len < row.train_tokens:
            stage = int(samples / (row.rampup_samples / stages))
            samples += min(row.rampup_start_seqs + stage * row.rampup_step_seqs, row.batch_seqs)
            steps += 1
        assert steps == pytest.approx(row.steps_with_rampup, rel=1e-3)
    assert paper.training_settings("1.3B").steps_with_rampup == 295_790
    assert paper.training_settings("6.7B").steps_with_rampup == 158_106


def test_distillation_stop():
    """kd-stop-1.3b: 400K steps fit the 350M run and exceed the 1.3B run."""
    small = paper.training_settings("350M+PR-MoE-32/64+L21+MoS")
    large = paper.training_settings("1.3B+PR-MoE-64/128+L21+MoS")
    assert small.kd_stop_steps / small.steps == pytest.approx(0.70, abs=0.002)
    assert small.kd_stop_steps * small.batch_seqs * small.seq_len == pytest.approx(210e9, rel=0.002)
    assert large.steps < 400_000 and large.kd_stop_steps is None
    assert paper.training_settings("350M+PR-MoE-32/64+L21").kd == "none"
    assert paper.training_settings("350M+PR-MoE-32/64+L21+KD").kd == "full"


def test_learning_rates_of_the_compared_arms_differ():
    """lr-moe-vs-pr-moe."""
    settings = paper.training_settings
    assert settings("350M+MoE-128").lr < settings("350M+PR-MoE-32/64").lr == settings("350M").lr
    assert settings("1.3B+MoE-128").lr == settings("1.3B+PR-MoE-64/128").lr


def test_throughput():
    rows = {row.model: row for row in paper.training_throughput()}
    for name, row in rows.items():
        assert row.tokens_per_s == row.samples_per_s * 2048
        flops = 6 * paper.model(name).active_B * 1e9 * row.tokens_per_s / row.gpus
        assert flops / 1e12 == pytest.approx(row.tflops_per_gpu, abs=0.06)
    ratio = rows["1.3B+MoE-128"].samples_per_s / rows["6.7B"].samples_per_s
    assert ratio == pytest.approx(paper.claim("training-5x-cheaper").value, abs=1e-3) and int(ratio) == 5


def test_settings_are_found_by_every_spelling_of_a_name():
    assert paper.settings_for("350M + moe-128") == paper.settings_for("350M+MoE-128")
    assert paper.settings_for("350M+Top2-MoE-128").run == "350M+MoE-128", "the recipe on its base"
    assert paper.settings_for("350M+PR-MoE-32/64+L21+MoS").run == "350M+PR-MoE-32/64+L21+MoS", "a run, not a model"
    assert paper.published_configs("350m+top2-moe-32") == paper.published_configs("350M+Top2-MoE-32")
    with pytest.raises(ValueError, match=r"unknown run '350M\+PR-MoE-32/64\+L21\+MOS'; did you mean .*L21\+MoS"):
        paper.settings_for("350M+PR-MoE-32/64+L21", "350M+PR-MoE-32/64+L21+MOS")
    with pytest.raises(ValueError, match=r"unknown training settings of '125M\+MoE-32'; did you mean .*125M\+MoE-64"):
        paper.settings_for("125M+MoE-32")  # none of 125M+MoE-128 either, whose name the user has not given
