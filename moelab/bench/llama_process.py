"""Decode with llama.cpp, in a process of its own that `moelab.bench.llama` starts.

It calls llama.cpp's C interface through llama-cpp-python. Nothing here imports torch: llama.cpp has the OpenMP library
with which it was built, as for its users, and not torch's.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
from typing import Any, NamedTuple

import llama_cpp
import numpy as np

from moelab.bench.decoders import Turns

_ERROR = 4
"""ggml's level of a log message; llama-cpp-python does not name the levels."""


class Generated(NamedTuple):
    """Hold what llama.cpp generated.

    Attributes:
        tokens: the new ids, int64 [sequences, tokens].
        turns: seconds of each turn.
        logits: fp32 [sequences, tokens, V] of an exact generation, else empty.
    """

    tokens: np.ndarray
    turns: Turns
    logits: np.ndarray


def build() -> str:
    """Return the package's version and what llama.cpp says of its build: instruction sets, OpenMP."""
    system = " ".join(llama_cpp.llama_print_system_info().decode().split())
    return f"llama-cpp-python {importlib.metadata.version('llama-cpp-python')}; {system}"


def generate(path: str, prompts: list[list[int]], tokens: int, threads: int, exact: bool = False) -> Generated:
    """Generate greedily `tokens` new tokens for every prompt, all of one length; the clock starts before the prompts.

    Args:
        path: of the GGUF file; it is opened once and stays open.
        exact: keys, values and attention in fp32, to compare the logits; otherwise llama.cpp's defaults, which are
            faster: fp16.

    Raises:
        ValueError: one line: llama.cpp cannot open the file, or fails at a step.
    """
    length = len(prompts[0])
    context = _context(path, len(prompts), length + tokens, threads, exact)
    chosen, kept, turns = [], [], Turns()
    logits_BV = context.start(prompts)
    for position in range(length, length + tokens):
        chosen.append(logits_BV.argmax(-1))
        turns.end()
        if exact:
            kept.append(logits_BV.copy())
        if position < length + tokens - 1:
            logits_BV = context.step(chosen[-1], position)
    return Generated(np.stack(chosen, 1), turns, np.stack(kept, 1) if exact else np.empty(0))


@functools.cache
def _model(path: str) -> Any:
    llama_cpp.llama_log_set(_keep_errors, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    if model is None:
        raise ValueError(_failed("it cannot open the file"))
    return model


_errors: list[str] = []


@llama_cpp.llama_log_callback
def _keep_errors(level: int, text: bytes, _: Any) -> None:
    if level == _ERROR:
        _errors.append(text.decode(errors="replace").strip())


def _failed(what: str) -> str:
    return f"{what} ({'; '.join(_errors[-2:])})" if _errors else what


class _Context:
    """The keys and values of sequences that all have the same length."""

    def __init__(self, path: str, sequences: int, length: int, threads: int, exact: bool) -> None:
        model, settings = _model(path), llama_cpp.llama_context_default_params()
        settings.n_ctx = sequences * length
        settings.n_batch = max(settings.n_batch, sequences * length)
        settings.n_seq_max = sequences
        settings.n_threads = settings.n_threads_batch = threads
        if exact:
            settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
            settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._handle = llama_cpp.llama_init_from_model(model, settings)
        if self._handle is None:
            raise ValueError(_failed(f"llama.cpp could not create a context of {sequences} x {length} tokens"))
        self._shape = (sequences, llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model)))
        self._step = _batch(sequences, 1)
        self._tokens = np.ctypeslib.as_array(self._step.token, (sequences,))
        self._positions = np.ctypeslib.as_array(self._step.pos, (sequences,))
        self._views: dict[int, np.ndarray] = {}  # address -> logits there; a view takes longer than its argmax

    def start(self, prompts: list[list[int]]) -> np.ndarray:
        """Empty the cache, compute the prompts, and return the logits of their last tokens [B, V]."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._handle), False)
        batch = _batch(len(prompts), len(prompts[0]))
        np.ctypeslib.as_array(batch.token, (batch.n_tokens,))[:] = np.concatenate(prompts)
        try:
            return self._decode(batch)
        finally:
            llama_cpp.llama_batch_free(batch)

    def step(self, tokens_B: np.ndarray, position: int) -> np.ndarray:
        """Compute one more token of each sequence and return its logits [B, V], valid until the next call."""
        self._tokens[:], self._positions[:] = tokens_B, position
        return self._decode(self._step)

    def _decode(self, batch: Any) -> np.ndarray:
        if code := llama_cpp.llama_decode(self._handle, batch):
            raise ValueError(_failed(f"llama_decode returns {code}"))
        logits = llama_cpp.llama_get_logits(self._handle)
        address = ctypes.addressof(logits.contents)
        if address not in self._views:
            self._views[address] = np.ctypeslib.as_array(logits, self._shape)
        return self._views[address]


_context = functools.cache(_Context)


def _batch(sequences: int, length: int) -> Any:
    """Return a batch of `length` tokens of each sequence, without ids; the last token of each gets logits."""
    batch = llama_cpp.llama_batch_init(sequences * length, 0, 1)
    batch.n_tokens = sequences * length
    for i in range(sequences * length):
        sequence, position = divmod(i, length)
        batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = position, 1, sequence
        batch.logits[i] = position == length - 1
    return batch
