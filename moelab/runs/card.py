"""Write the model card of a finished run: what the weights are, what they were trained on, how well they predict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moelab.runs.provenance import describe
from moelab.runs.store import Run

CARD = """\
---
library_name: moelab
pipeline_tag: text-generation
tags: [mixture-of-experts, language-model]
---

# {title}

{kind}, trained by moelab, which reruns the DeepSpeed-MoE paper (arXiv 2201.05596). It is for experiments
on routing, export and inference, not for use as a language model: nothing kept harmful text out of its training.

```
moelab generate {name} --prompt "The" --max-new-tokens 60
{route}```

| | |
| --- | --- |
| parameters | {result[parameters]:,}, of which a token uses {result[active_parameters]:,} |
| experts by layer | {experts} |
| size | {model.layers} layers, {model.hidden} wide, {model.vocab:,} tokens of vocabulary, context {context} |
| weights | {dtype}, safetensors |
| training text | {data.corpus}, tokenizer {data.tokenizer}; licences of packaged texts: `moelab/data/packages.csv` |
| training tokens | {result[tokens]:,} in {result[steps]:,} steps of {batch:,} |
| peak learning rate | {train.lr:g}, {decline} to {train.min_lr:g}; AdamW, weight decay {train.weight_decay:g} |
| arithmetic | {train.dtype}, seed {train.seed} |
| validation loss | {loss:.4f} nats a token, {result[bits_per_byte]:.4f} bits a byte, on {validation} tokens |
| trained on | {machines}, {hours:.1f} hours |
| run | `{run.spec.id}`, commit {commits} |

Validation loss by domain, nats a token:

| domain | loss |
| --- | --- |
{domains}
"""


def model_card(directory: Path, name: str, dtype: str) -> str:
    """Return the card of the weights of a finished run, in Markdown.

    Args:
        directory: the run's.
        name: of the folder or the model that a reader gives to `moelab generate`.
        dtype: of the exported weights, "fp32" or "bf16".

    Raises:
        ValueError: the spec or the result cannot be read; the message is one line.
    """
    run = Run.at(directory)
    model, train, data, result = run.spec.model, run.spec.train, run.spec.data, run.result
    sessions = run.provenance.get("sessions") or [run.provenance]
    route = f"moelab run imported-model -p model={name}   # its routing, by layer and domain\n" if model.is_moe else ""
    return CARD.format(
        run=run,
        model=model,
        train=train,
        data=data,
        result=result,
        title=model.name or name,
        kind="A mixture of experts" if model.is_moe else "A dense decoder",
        name=name,
        route=route,
        experts=" ".join(str(experts or "–") for experts in model.experts),
        context=data.context if model.decoder.positions == "learned" else model.context,
        dtype=dtype,
        batch=train.batch_size * data.context,
        loss=result["validation_loss"],
        decline="linear at the end" if train.cooldown_tokens else "cosine",
        validation=f"{count:,}" if (count := result.get("validation_tokens")) else "an unknown number of",
        machines="; ".join(dict.fromkeys(_machine(one.get("hardware") or {}, train.device) for one in sessions)),
        hours=run.own_seconds / 3600,
        commits=", ".join(dict.fromkeys(f"`{str(one.get('commit') or 'unknown')[:8]}`" for one in sessions)),
        domains="\n".join(
            f"| {domain} | {numbers['loss']:.3f} |"
            for domain, numbers in result.get("validation_by_domain", {}).items()
        ),
    )


def _machine(hardware: dict[str, Any], device: str) -> str:
    """Return what trained a run: the GPUs, or the processor."""
    return describe(hardware) if device == "cuda" and hardware else hardware.get("cpu", "unknown hardware")
