"""Open a training run or an exported model, and continue texts with it.

writer = open_text(directory, cache=...)
for prompt, text in writer.stream(["Fellow citizens"]): print(text, end="")
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moelab.config import DataConfig, ModelConfig, from_json
from moelab.config.parallel import ParallelConfig
from moelab.data.preparation import prepare
from moelab.data.tokenizer import Tokenizer
from moelab.data.tokens import TokenData
from moelab.engine import checkpoint
from moelab.engine import parallel as engine
from moelab.engine.checkpoint import hf
from moelab.engine.launch import process
from moelab.engine.mesh import Mesh
from moelab.engine.sharded import is_sharded
from moelab.files import read_object
from moelab.inference.generate import Finish, Generator, Piece
from moelab.inference.modes import set_mode
from moelab.inference.sampling import Sampling
from moelab.models import GPT, empty

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Text:
    """Hold a prompt's continuation.

    Attributes:
        prompt: the prompt.
        text: the text that follows it, without "<|endoftext|>".
        tokens: number of new tokens.
        finish: "stop" (the end of a document), "length" or "context".
    """

    prompt: str
    text: str
    tokens: int
    finish: Finish

    def __str__(self) -> str:
        return self.prompt + self.text


class Writer:
    """Continue texts with a generator and its tokenizer.

    `<|endoftext|>` ends a document, so that it is always a stop token; an empty prompt starts a document.
    """

    def __init__(self, generator: Generator, tokenizer: Tokenizer) -> None:
        self.generator, self.tokenizer = generator, tokenizer

    def generate(self, prompts: Sequence[str], sampling: Sampling | None = None) -> list[Text]:
        """Return the continuations in the order of the prompts."""
        completions = self.generator.generate(self._encode(prompts), self._with_end(sampling))
        return [
            Text(prompt, self.tokenizer.decode_after(self._without_end(c.tokens)), len(c.tokens), c.finish)
            for prompt, c in zip(prompts, completions, strict=True)
        ]

    def stream(self, prompts: Sequence[str], sampling: Sampling | None = None) -> Iterator[tuple[int, str]]:
        """Yield (index of the prompt, new text) after each token that completes a character."""
        return self._texts(self.generator.stream(self._encode(prompts), self._with_end(sampling)))

    def _texts(self, pieces: Iterator[Piece]) -> Iterator[tuple[int, str]]:
        waiting: dict[int, list[int]] = {}  # tokens of a character that may be incomplete
        for piece in pieces:
            tokens = waiting.setdefault(piece.prompt, [])
            if piece.token != self.tokenizer.eot:
                tokens.append(piece.token)
            text = self.tokenizer.decode_after(tokens)
            if text and (piece.finish or not text.endswith("\N{REPLACEMENT CHARACTER}")):
                yield piece.prompt, text
                tokens.clear()

    def _encode(self, prompts: Sequence[str]) -> list[list[int]]:
        if isinstance(prompts, str):
            raise ValueError("generate: prompts must be a list of texts, got one text")
        return [self.tokenizer.encode_prompt(prompt) or [self.tokenizer.eot] for prompt in prompts]

    def _with_end(self, sampling: Sampling | None) -> Sampling:
        sampling = sampling or Sampling()
        return replace(sampling, stop_tokens=(*sampling.stop_tokens, self.tokenizer.eot))

    def _without_end(self, tokens: Sequence[int]) -> Sequence[int]:
        return tokens[:-1] if tokens[-1] == self.tokenizer.eot else tokens


def open_text(
    directory: Path,
    *,
    cache: Path,
    mode: str = "optimised",
    dtype: str = "fp32",
    device: str = "cpu",
    batch: int = 8,
    mesh: Mesh | None = None,
) -> Writer:
    """Return a writer for a run (its newest complete checkpoint) or an exported model.

    `moelab.engine.checkpoint.hf` has the formats of exported models.

    Args:
        cache: directory of prepared tokens, which includes a run's tokenizer.
        mode, batch: see `moelab.inference.modes` and `Generator`.
        dtype: "fp32" or "bf16", of weights and activations; routing is always fp32.
        mesh: the ranks that share a run's model, made for its numbers of experts; None means this process alone.

    Raises:
        ValueError: the directory has no model, the run has no checkpoint, or the dtype is unknown.
        CheckpointError: the checkpoint belongs to another model.
    """
    model, tokenizer = open_model(directory, cache=cache, dtype=dtype, device=device, mesh=mesh)
    return Writer(Generator(set_mode(model, mode), batch=batch, mesh=mesh, release=True), tokenizer)


def open_ids(
    directory: Path,
    *,
    mode: str = "optimised",
    dtype: str = "fp32",
    device: str = "cpu",
    batch: int = 8,
    mesh: Mesh | None = None,
) -> Generator:
    """Return a generator, which takes and returns token ids; without tokenizer. Arguments, errors as of `open_text`."""
    model = _open_weights(directory, None, dtype, device, mesh)
    return Generator(set_mode(model, mode), batch=batch, mesh=mesh, release=True)


def open_model(
    directory: Path, *, cache: Path, dtype: str = "fp32", device: str = "cpu", mesh: Mesh | None = None
) -> tuple[GPT, Tokenizer]:
    """Return (model, tokenizer) of a directory, before a mode is set; arguments and errors as in `open_text`."""
    data = prepare(run_configs(directory)[1], cache) if (directory / "spec.json").is_file() else None
    model = _open_weights(directory, data, dtype, device, mesh)
    tokenizer = hf.load_tokenizer(directory) if data is None else data.tokenizer()
    if tokenizer.vocab_size > (vocab := model.config.vocab):
        raise ValueError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} entries, the model's embedding only {vocab}"
        )
    return model, tokenizer


def _open_weights(directory: Path, data: TokenData | None, dtype: str, device: str, mesh: Mesh | None) -> GPT:
    """Return the model of a directory; `data` is the text of a run, or None. Errors as in `open_text`."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be fp32 or bf16, got {dtype!r}")
    if device != "cpu" and not (device == "cuda" and torch.cuda.is_available()):
        raise ValueError(f"device must be cpu, or cuda where there is a GPU, got {device!r}")
    if (directory / "spec.json").is_file():
        return load_run(directory, data=data, mesh=mesh, device=device, dtype=dtype)
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory}: neither a run (spec.json) nor an exported model (config.json)")
    if mesh is not None:
        return hf.load_part(directory, mesh, dtype=DTYPES[dtype]).module
    return hf.load(directory, dtype=DTYPES[dtype], device=device)


def join_ranks(directory: Path, device: str = "cpu", **layout: Any) -> Mesh | None:
    """Return the mesh for a run's model if this process is one of several ranks, else None.

    The ranks are started by torchrun or srun; this function joins their process group.

    Args:
        layout: fields of `ParallelConfig` except `data`, which follows from the number of ranks.

    Raises:
        ValueError: the layout does not fit the ranks or the model; raised before any rank waits for others.
    """
    place = process.find()
    if place is None or place.world_size == 1:
        if unusual := {k: v for k, v in layout.items() if v != getattr(ParallelConfig(), k)}:
            raise ValueError(f"generate: {', '.join(unusual)} needs several ranks; start with torchrun or srun")
        return None
    tensor = layout.get("tensor", 1)
    if tensor < 1 or place.world_size % tensor:
        raise ValueError(f"generate: tensor {tensor} does not divide {place.world_size} ranks")
    parallel = ParallelConfig(data=place.world_size // tensor, **layout)
    config = model_config(directory)
    config.check_layout(parallel)
    process.join(device=device)
    return Mesh(parallel, config.experts, device)


def model_config(directory: Path) -> ModelConfig:
    """Return the model configuration of a run or an exported model; ValueError, one line, if it is neither."""
    return run_configs(directory)[0] if (directory / "spec.json").is_file() else hf.read_config(directory)


def run_configs(directory: Path) -> tuple[ModelConfig, DataConfig]:
    """Return the model and data configurations in a run's `spec.json`; ValueError, one line, if it has none."""
    spec = read_object(directory / "spec.json")
    if not isinstance(spec, dict) or "model" not in spec:
        raise ValueError(f"{directory / 'spec.json'}: not the spec of a run")
    where = str(directory / "spec.json")
    return from_json(ModelConfig, spec["model"], f"{where}: model"), from_json(
        DataConfig, spec.get("data", {}), f"{where}: data"
    )


def weights_for(directory: Path, data: TokenData) -> checkpoint.Checkpoint:
    """Return a run's weights (see `checkpoint.weights_of`) for its text; ValueError, one line, if that has changed."""
    last = checkpoint.weights_of(directory)
    if not data.shares_text(last.state["data"]):
        raise ValueError(
            f"{directory}: its text or the tokens of it have changed since the training; put the old text back, or "
            "remove the run and train it again"
        )
    return last


def load_run(
    directory: Path,
    *,
    data: TokenData | None = None,
    mesh: Mesh | None = None,
    device: str = "cpu",
    dtype: str = "fp32",
) -> GPT:
    """Return a run's model, or this rank's part of it, with its weights; see `checkpoint.weights_of`.

    Where positions are learned, its context is that of the training: those behind it were never trained.

    Args:
        data: the text that the model is to read, if any: it must be the one that it was trained on (`weights_for`).
        mesh: the ranks that share the model, on whose device it is; None means this process alone, on `device`.
    """
    config, text = run_configs(directory)
    last = checkpoint.weights_of(directory) if data is None else weights_for(directory, data)
    if mesh is not None:
        part = engine.build(config, None, mesh, DTYPES[dtype])
        model = part.module
        checkpoint.load_model(last, model, part.placements)
    else:
        model = empty(config, device, DTYPES[dtype])
        checkpoint.load_model(last, model)
    if model.position_embedding is not None and text.context < config.context:
        model.config = replace(config, context=text.context)
        if not is_sharded(model.position_embedding.weight):  # FSDP2 gathers the module that it has sharded
            trained = model.position_embedding.weight.detach()[: text.context].clone()
            model.position_embedding = nn.Embedding.from_pretrained(trained, freeze=False)
    return model
