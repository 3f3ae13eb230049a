"""Zero-shot tasks: the questions, our model in lm-eval, and the scores."""

import dataclasses
import json
import math
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from moelab.cli import app
from moelab.config import ModelConfig
from moelab.evaluation import zero_shot
from moelab.evaluation.items import READERS, items
from moelab.evaluation.models import open_evaluated, ours
from moelab.evaluation.zero_shot import PACKAGED, evaluate, run_task
from moelab.models import GPT, build

PR = dict(layers=4, experts=(0, 2, 0, 4), residual=True, name="small PR")


@pytest.fixture
def lm_eval(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("lm_eval", reason="needs lm-eval (extra eval)")


def test_every_packaged_task_is_read(cache):
    found = {task: items(task, cache) for task in READERS}
    assert {task: len(rows) for task, rows in found.items()} == {
        "packaged_lambada": 6, "packaged_piqa": 5, "packaged_boolq": 5, "packaged_history": 6, "packaged_trivia": 4, "packaged_nq": 4,
    }  # fmt: skip
    assert found["packaged_lambada"][0].answers == ("gull",)
    assert found["packaged_boolq"][0].gold == (1,) and found["packaged_boolq"][4].gold == (0,)
    assert found["packaged_trivia"][0].answers == ("tide", "the tide", "Tide"), "the main answer first, once"
    subjects = [item.question.split()[0] for item in found["packaged_history"]]
    assert subjects == ["european", "us", "world", "european", "world", "european"], "all subjects come first"
    for rows in found.values():
        assert all(0 <= g < len(item.answers) for item in rows for g in item.gold)
    with pytest.raises(ValueError, match=r"no packaged task 'race'; allowed: packaged_lambada"):
        items("race", cache)


@pytest.fixture
def model():
    """PR-MoE: a dense model is compared with lm-eval's own wrapper."""
    return build(ModelConfig(**PR, hidden=32, heads=2, vocab=300, context=24, init_std=0.3), 0)


@pytest.fixture
def RunLM(lm_eval):
    from moelab.evaluation.lm import RunLM

    return RunLM


def ask(lm, kind, *pairs):
    """Answers of our model to requests of lm-eval."""
    from lm_eval.api.instance import Instance

    return getattr(lm, kind)([Instance(kind, {}, pair, i) for i, pair in enumerate(pairs)], disable_tqdm=True)


def last_logits(model, tokens):
    """Logits after the tokens, by the whole model."""
    with torch.no_grad():
        found = model(torch.tensor([tokens]))
    return (found.logits_BTV if isinstance(model, GPT) else found.logits)[0, -1]


def naive(model, context, continuation, longest=24):
    """Sum and greediness of one request, token by token."""
    total, greedy = 0.0, True
    for i, token in enumerate(continuation):
        row = last_logits(model, (context + continuation[:i])[-longest:]).log_softmax(0)
        total, greedy = total + float(row[token]), greedy and int(row.argmax()) == token
    return total, greedy


def test_scores_are_the_models_whatever_the_batch(RunLM, model, tokenizer):
    asked = {  # (context, continuation) -> what is scored given what
        ("the wave", " and the"): ("the wave", " and the"),
        ("", "gull"): (None, "gull"),
        ("does the ", "tide"): ("does the", " tide"),
        ("a", "b" * 9): ("a", "b" * 9),
        ("the mast and", " wind"): ("the mast and", " wind"),
    }
    evaluated = ours(model, tokenizer)
    lm = RunLM(evaluated, batch=4)
    found = ask(lm, "loglikelihood", *asked)
    alone = ask(RunLM(evaluated, batch=1), "loglikelihood", *asked)
    for (context, wanted), (score, greedy), one in zip(asked.values(), found, alone, strict=True):
        tokens = [tokenizer.eot] if context is None else tokenizer.encode(context)
        whole = tokenizer.encode((context or "") + wanted)
        expected = naive(model, tokens, whole if context is None else whole[len(tokens) :])
        assert score == pytest.approx(expected[0], abs=1e-4) and score == pytest.approx(one[0], abs=1e-4)
        assert greedy == expected[1] == one[1]
    assert lm.cut == 0


def test_what_does_not_fit_is_cut_on_the_left_or_scored_in_windows(RunLM, model, tokenizer):
    lm = RunLM(ours(model, tokenizer))
    ((long, _), (short, _)) = ask(lm, "loglikelihood", ("a" * 90, "q"), ("a" * 24, "q"))
    assert long == pytest.approx(short, abs=1e-5) and lm.cut == 1
    ((score, _),) = ask(lm, "loglikelihood", ("x", "q" * 60))
    assert lm.cut == 2 and score < 0 and ask(lm, "loglikelihood_rolling", ("q" * 60,))[0] < 0
    ((whole, _),) = ask(lm, "loglikelihood", ("", "q" * 9))
    assert ask(lm, "loglikelihood_rolling", ("q" * 9,)) == [pytest.approx(whole, abs=1e-5)]
    assert ask(lm, "loglikelihood", ("x", "")) == [(0, True)] and lm.cut == 2


@pytest.fixture
def llama(tmp_path, tokenizer):
    """The directory of a small Llama that transformers saved, with opinions of its own."""
    transformers = pytest.importorskip("transformers", reason="needs transformers (extra eval)")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=300, max_position_embeddings=64, initializer_range=0.4, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path / "llama"
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save(folder / "tokenizer.json")
    record = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    record["add_bos_token"] = True
    (folder / "tokenizer_config.json").write_text(json.dumps(record))
    return folder


@pytest.mark.parametrize("whose", ["ours", "others"])
def test_continuations_are_the_likeliest_and_end_at_a_stop_text(RunLM, model, tokenizer, llama, cache, whose):
    evaluated = ours(model, tokenizer) if whose == "ours" else open_evaluated(llama, cache=cache)
    lm = RunLM(evaluated, batch=2)
    settings = {"until": ["\n"], "do_sample": False, "max_gen_toks": 8}
    contexts = ["the wave", "does the tide", "gull " * 90]
    texts = ask(lm, "generate_until", *((c, settings) for c in contexts))
    assert lm.cut == 1
    for context, text in zip(contexts, texts, strict=True):
        tokens, wanted = evaluated.tokenizer.encode(context)[8 - lm.max_length :], []
        while len(wanted) < 8:
            token = int(last_logits(model if whose == "ours" else evaluated.model, tokens + wanted).argmax())
            if token == tokenizer.eot:
                break
            wanted.append(token)
        assert text == tokenizer.decode(wanted).split("\n")[0]
    stop = texts[0][2:4]
    (shorter,) = ask(lm, "generate_until", (contexts[0], {**settings, "until": [stop]}))
    assert shorter == texts[0].partition(stop)[0]
    whole, same = ask(lm, "generate_until", *((contexts[0], {**settings, "until": until}) for until in ([], [""])))
    assert whole == same, "an empty text stops nothing"
    (most,) = ask(lm, "generate_until", (contexts[0], {"until": [], "max_gen_toks": 999}))
    assert most.startswith(whole) and len(most) > len(whole), "half of the context"
    with pytest.raises(ValueError, match="only tasks that take the likeliest text"):
        ask(lm, "generate_until", ("a", {"do_sample": True, "temperature": 1.0}))


def test_the_end_of_text_of_a_model_of_others_is_its_own(llama, cache):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (llama / name).write_text((llama / name).read_text().replace("<|endoftext|>", "</s>"))
    texts = open_evaluated(llama, cache=cache).tokenizer
    assert texts.eos_token_id == 0
    for text in ("<|endoftext|>", "</s>"):
        assert 0 not in texts.encode(text, add_special_tokens=False), "ordinary characters"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (llama / name).write_text((llama / name).read_text().replace("</s>", "<end>" if "config" in name else "<fin>"))
    record = json.loads((llama / "tokenizer_config.json").read_text())
    (llama / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": record["tokenizer_class"]}))
    with pytest.raises(ValueError, match=r"llama: tokenizer has no <\|endoftext\|> token$"):
        open_evaluated(llama, cache=cache)


def save_other(kind, llama, **settings):
    """Put a small model of another architecture in the directory."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(vocab_size=300, **settings)
    torch.manual_seed(0)
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(llama)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("Gemma2", {"final_logit_softcapping": 0.5, "head_dim": 8}),
        ("Cohere", {"logit_scale": 9.0}),
        ("Granite", {"logits_scaling": 8.0}),
    ],
)
def test_a_model_of_others_that_changes_its_logits_is_scored_with_that(RunLM, llama, cache, kind, settings):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    save_other(kind, llama, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.4, **sizes, **settings)
    evaluated = open_evaluated(llama, cache=cache)
    encode = evaluated.tokenizer.encode
    ((score, greedy),) = ask(RunLM(evaluated), "loglikelihood", ("the wave", " and the"))
    tokens = encode(" and the", add_special_tokens=False)
    assert (pytest.approx(score, abs=1e-4), greedy) == naive(evaluated.model, encode("the wave"), tokens)


def test_a_model_of_others_whose_context_is_unknown_is_one_line(llama, cache):
    save_other("Mpt", llama, d_model=32, n_heads=4, n_layers=1)
    with pytest.raises(ValueError, match=r"llama: its config.json has no max_position_embeddings$"):
        open_evaluated(llama, cache=cache)


def test_a_model_of_others_that_cannot_be_opened_is_one_line(llama, cache):
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(ValueError, match="llama: transformers cannot open it") as caught:
        open_evaluated(llama, cache=cache)
    assert "\n" not in str(caught.value)
    for name in ("one.gguf", "two.gguf"):
        (llama / name).touch()
    (llama / "config.json").unlink()
    with pytest.raises(ValueError, match="2 GGUF files; give a directory with one"):
        open_evaluated(llama, cache=cache)


def test_code_beside_a_model_of_others_never_runs(llama, cache, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # who is asked whether to run it says yes
    record = json.loads((llama / "config.json").read_text())
    names = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (llama / "config.json").write_text(json.dumps({**record, "model_type": "own", "auto_map": names}))
    (llama / "own.py").write_text(f"open({str(llama / 'ran')!r}, 'w').close()\nraise SystemExit('ran')\n")
    with pytest.raises(ValueError, match="llama: transformers cannot open it") as caught:
        open_evaluated(llama, cache=cache)
    assert "\n" not in str(caught.value) and not (llama / "ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize("whose", ["ours", "others"])
def test_a_model_scores_as_in_lm_evals_own_wrapper(lm_eval, exported, llama, cache, whose):
    from lm_eval.models.huggingface import HFLM

    folder = exported(context=64) if whose == "ours" else llama
    theirs = HFLM(pretrained=str(folder), device="cpu", batch_size=4, dtype="float32")
    ours = {score.task: score for score in evaluate(folder, PACKAGED, cache=cache, batch=3)}
    for task in PACKAGED:
        reference = run_task(theirs, task, cache=cache)
        for name in ("accuracy", "n", "standard_error", "chance", "majority"):
            assert getattr(ours[task], name) == getattr(reference, name), (task, name)
        assert ours[task].bits_per_byte == pytest.approx(reference.bits_per_byte, rel=1e-4), task
        assert ours[task].margin == pytest.approx(reference.margin, abs=1e-4), task
    before = ours["packaged_piqa"].seconds
    assert evaluate(folder, ["packaged_piqa"], cache=cache)[0].seconds == before, "read back"


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_with_the_next_task_and_a_finished_one_is_read_back(
    RunLM, exported, cache, monkeypatch
):
    folder = exported(**PR)
    tasks = ("packaged_boolq", "packaged_trivia")
    seen, answered = [], []
    count = RunLM.add_partial
    monkeypatch.setattr(RunLM, "add_partial", lambda self, kind, *of: answered.append(kind) or count(self, kind, *of))

    def kill(task, done, total):
        if task == tasks[1]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(folder, tasks, cache=cache, batch=2, on_progress=kill)
    scores = evaluate(folder, tasks, cache=cache, batch=2, on_progress=lambda *state: seen.append(state))
    assert answered.count("loglikelihood") == 10 + 4, "5 items of 2 answers once, and the right answers of 4"
    assert seen[0] == ("packaged_boolq", 10, 10) and seen[-1][1] == seen[-1][2]
    answered.clear()
    assert evaluate(folder, tasks, cache=cache) == scores and not answered
    boolq, trivia = scores
    assert boolq.chance == 0.5 and boolq.majority == 0.8 and boolq.metric == "acc"
    assert trivia.chance == 0 and trivia.majority is None and trivia.metric == "exact_match"
    assert boolq.cut > 0 and not boolq.stand_in
    (few,) = evaluate(folder, ["packaged_history"], cache=cache, limit=4)
    assert few.n == 4 and few.stand_in and few.chance == 0.25
    files = sorted(p.name for p in (folder / "evaluation").glob("*/*"))
    assert files == ["packaged_boolq.json", "packaged_history-first-4.json", "packaged_trivia.json"]


def test_other_weights_are_evaluated_anew(exported, tokenizer):
    from moelab.engine.checkpoint import hf

    folder = exported()
    model = hf.load(folder)
    before = ours(hf.load(folder), tokenizer).weights
    assert ours(hf.load(folder), tokenizer).weights == before
    with torch.no_grad():
        model.blocks[1].ffn.up.bias[3] += 1e-6
    assert ours(model, tokenizer).weights != before


def test_the_margin_is_that_of_the_right_over_the_wrong_answers(RunLM, exported, cache, tokenizer):
    """By the plain model, token by token."""
    from moelab.engine.checkpoint import hf

    folder = exported(context=256)
    model = hf.load(folder).eval()
    (score,) = evaluate(folder, ["packaged_piqa"], cache=cache)
    margins = []
    for item in items("packaged_piqa", cache):
        context = tokenizer.encode(f"Question: {item.question}\nAnswer:")
        bits = []
        for answer in item.answers:
            tokens = tokenizer.encode(f"Question: {item.question}\nAnswer: {answer}")[len(context) :]
            bits.append(-naive(model, context, tokens, 256)[0] / math.log(2) / len(f" {answer}".encode()))
        margins.append(bits[1 - item.gold[0]] - bits[item.gold[0]])
    assert score.margin == pytest.approx(statistics.fmean(margins), abs=1e-4)
    assert score.margin_error == pytest.approx(statistics.stdev(margins) / math.sqrt(len(margins)), abs=1e-4)
    (free,) = evaluate(folder, ["packaged_lambada"], cache=cache)
    assert free.margin is None and free.margin_error is None


def test_stored_scores_are_not_used_after_a_change_of_the_scoring(RunLM, exported, cache, monkeypatch):
    folder, answered = exported(), []
    store = RunLM.add_partial
    monkeypatch.setattr(RunLM, "add_partial", lambda self, kind, *of: answered.append(kind) or store(self, kind, *of))
    (before,) = evaluate(folder, ["packaged_piqa"], cache=cache)
    asked = len(answered)
    assert evaluate(folder, ["packaged_piqa"], cache=cache) == [before] and len(answered) == asked
    monkeypatch.setattr(zero_shot, "SCORING", zero_shot.SCORING + 1)
    (after,) = evaluate(folder, ["packaged_piqa"], cache=cache)
    assert len(answered) == 2 * asked and after.version != before.version


def test_the_command(lm_eval, exported, place, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    command = ["eval", str(exported()), "--tasks", "packaged_piqa,packaged_nq", "--limit", "4"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    assert "packaged_nq*" in shown.output and "…" not in shown.output
    found = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert set(found[0]) == {f.name for f in dataclasses.fields(zero_shot.Score)}


def test_a_right_answer_may_be_given_by_its_text_or_before_the_context(lm_eval, exported, cache, monkeypatch):
    """As lm-eval's anli and winogrande do."""
    folder, known = exported(), zero_shot.definition
    (by_place,) = evaluate(folder, ["packaged_boolq"], cache=cache)
    for other in (
        {"doc_to_target": "{{answers[gold[0]]}}"},
        {"doc_to_text": "{{gold[0]}}", "doc_to_target": "{{passage}}"},
    ):
        changed = {**other, "metadata": {"version": f"2 {other}"}}
        monkeypatch.setattr(zero_shot, "definition", lambda task, changed=changed: known(task) | changed)
        (score,) = evaluate(folder, ["packaged_boolq"], cache=cache)
        assert score.majority == by_place.majority == 0.8 and score.bits_per_byte > 0
        if "doc_to_text" not in other:
            assert (score.accuracy, score.bits_per_byte) == (by_place.accuracy, by_place.bits_per_byte)


def test_another_users_model_is_scored(lm_eval, exported, cache, capsys, monkeypatch):
    folder, real = exported(), Path.mkdir

    def mkdir(path, *arguments, **options):
        if path.is_relative_to(folder):
            raise PermissionError(13, "Permission denied", str(path))
        real(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    (score,) = evaluate(folder, ["packaged_piqa"], cache=cache, limit=2)
    assert score.n == 2 and capsys.readouterr().err.startswith("scores are not kept: Permission denied: ")


def test_a_full_disk_is_no_missing_data(lm_eval, exported, cache, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zero_shot, "write_json", full)
    with pytest.raises(OSError, match="No space left on device"):
        evaluate(exported(), ["packaged_piqa"], cache=cache, limit=2)


def test_bad_input_is_one_line(lm_eval, exported, cache, monkeypatch):
    folder = exported()
    for limit in (1, -3):
        with pytest.raises(ValueError, match="limit must be 0"):
            evaluate(folder, cache=cache, limit=limit)
    with pytest.raises(ValueError, match="batch must be at least 1"):
        evaluate(folder, cache=cache, batch=0)
    other = {"metric_list": [{"metric": "acc_norm", "aggregation": "mean", "higher_is_better": True}]}
    known = zero_shot.definition
    monkeypatch.setattr(zero_shot, "definition", lambda task: known(task) | other)
    with pytest.raises(ValueError, match=r"packaged_piqa has acc_norm; only tasks with acc or exact_match are scored"):
        evaluate(folder, ["packaged_piqa"], cache=cache)
    reason = "Dataset scripts are no longer supported, but found piqa.py"
    stubborn = SimpleNamespace(load=lambda _: (_ for _ in ()).throw(RuntimeError(f"{reason}\n")))
    monkeypatch.setattr(zero_shot, "_task_manager", lambda _: stubborn)
    with pytest.raises(ValueError, match=rf"the data of packaged_nq could not be downloaded \({reason}\)") as caught:
        evaluate(folder, ["packaged_nq"], cache=cache)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(zero_shot, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="lm-eval is not installed; install moelab with its extra"):
        evaluate(folder, cache=cache)


@pytest.mark.slow
def test_a_task_of_lm_eval_that_is_not_there_or_has_no_network(lm_eval, exported, cache, monkeypatch):
    for place in ("huggingface_hub.constants", "datasets.config"):  # no retries, no download
        monkeypatch.setattr(f"{place}.HF_HUB_OFFLINE", True)
    folder = exported()
    with pytest.raises(ValueError, match=r"no task 'lambda'; allowed: packaged_lambada"):
        evaluate(folder, ["lambda"], cache=cache)
    with pytest.raises(ValueError, match=r"the data of piqa could not be downloaded \(.*without a network: packaged"):
        evaluate(folder, ["piqa"], cache=cache)
