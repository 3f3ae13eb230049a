"""Export routing traces: which token went to which expert, in every MoE layer, as one parquet file.

write(directory, Path("trace.parquet"), cache=..., max_tokens=20_000)

A row is one choice: domain, sequence (its number in the domain), position, token (id), text, layer (from 1), choice
(from 0, the likeliest first), expert, weight, and dropped (the expert was full).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moelab.config import DataConfig
from moelab.evaluation.routing import BATCH
from moelab.lazy import np

if TYPE_CHECKING:
    from moelab.data.tokenizer import Tokenizer
    from moelab.models import GPT

IMPORTED = DataConfig(corpus="mix5", context=512)
"""The text for models that have none of their own."""


def write(
    directory: Path,
    out: Path,
    *,
    cache: Path,
    corpus: str | None = None,
    max_tokens: int = 0,
    dtype: str = "fp32",
    device: str = "cpu",
) -> dict[str, int]:
    """Route validation text with a run or an exported or imported model, and write the choices; no weights change.

    Args:
        directory: of the run or the model.
        out: the parquet file; one that is there is replaced once the new one is whole.
        cache: folder of prepared and downloaded text.
        corpus: the text; default: a run's own, else `IMPORTED`.
        max_tokens: maximum number of tokens of each domain; 0 means all.
        dtype, device: as of `moelab.inference.text.open_text`.

    Returns:
        Numbers of tokens, MoE layers and rows.

    Raises:
        ValueError: one line: no model or weights there, no MoE layers, or an unknown text.
    """
    from moelab.data.preparation import encode_validation
    from moelab.inference.text import model_config, open_model, run_configs

    if not model_config(directory).is_moe:
        raise ValueError(f"trace: {directory} is a dense model, which routes nothing")
    run = (directory / "spec.json").is_file()
    data = run_configs(directory)[1] if run else IMPORTED
    data = replace(data, corpus=corpus) if corpus else data
    model, tokenizer = open_model(directory, cache=cache, dtype=dtype, device=device)
    model.eval()
    T = min(data.context, model.config.context)
    texts = encode_validation(replace(data, context=T), cache, tokenizer, max_tokens)
    rows = _save(choices(model, tokenizer, texts), out)
    layers = sum(experts > 0 for experts in model.config.experts)
    return {"tokens": sum(windows_NT.size for windows_NT in texts.values()), "layers": layers, "rows": rows}


def choices(model: GPT, tokenizer: Tokenizer, texts: dict[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    """Yield the columns of the trace for each batch and layer.

    Args:
        model: in evaluation mode.
        texts: domain -> windows of tokens [N, T].
    """
    import torch

    numbers = [layer for layer, experts in enumerate(model.config.experts, 1) if experts]
    device = model.token_embedding.weight.device
    words = np.array([tokenizer.decode([token]) for token in range(tokenizer.vocab_size)], dtype=object)
    for domain, windows_NT in texts.items():
        T = windows_NT.shape[1]
        rows = max(1, BATCH // T)
        for first in range(0, len(windows_NT), rows):
            batch_BT = windows_NT[first : first + rows]
            with torch.no_grad():
                _, routing = model.hidden_states(torch.from_numpy(batch_BT).to(device))
            for layer, of in zip(numbers, routing, strict=True):
                K = of.expert_SK.shape[1]
                tokens = batch_BT.ravel().repeat(K)
                yield {
                    "domain": [domain] * len(tokens),
                    "sequence": (first + np.arange(len(batch_BT))).repeat(T * K).astype(np.int32),
                    "position": np.tile(np.arange(T), len(batch_BT)).repeat(K).astype(np.int32),
                    "token": tokens.astype(np.int32),
                    "text": words[tokens],
                    "layer": np.full(len(tokens), layer, np.int16),
                    "choice": np.tile(np.arange(K), batch_BT.size).astype(np.int16),
                    "expert": of.expert_SK.cpu().numpy().ravel().astype(np.int16),
                    "weight": of.weight_SK.float().cpu().numpy().ravel(),
                    "dropped": of.slot_SK.cpu().numpy().ravel() < 0,
                }


def _save(batches: Iterator[dict[str, Any]], out: Path) -> int:
    """Write batches of columns as parquet, whole or not at all; return the number of rows."""
    import pyarrow as pa
    from pyarrow import parquet

    out.parent.mkdir(parents=True, exist_ok=True)
    part, writer, rows = out.with_name(f".{out.name}.part"), None, 0
    try:
        for columns in batches:
            table = pa.table(columns)
            writer = writer or parquet.ParquetWriter(part, table.schema, compression="zstd")
            writer.write_table(table)
            rows += len(table)
        if writer is not None:
            writer.close()
            part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    return rows
