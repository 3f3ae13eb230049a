"""Describe directories of models: how a `config.json` becomes a `ModelConfig`, and which tensor holds which parameter.

A `Format` says where each of our parameters lies in a format's tensors; `moelab.engine.checkpoint.hf` reads and writes
all formats by it. This module has GPT-2's format and our own, `hf_families` those of published MoE models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from moelab.config import DecoderConfig, ModelConfig, from_json, to_json
from moelab.config.model import MAX_SIZE

VERSION = 1
"""Of our own format."""


class Part(NamedTuple):
    """A tensor of a format, and the part of one of our parameters that it holds."""

    name: str
    """The tensor's name in the format."""
    at: tuple[int | slice, ...] = ()
    """The part: an index of the parameter, `()` for all of it."""
    transposed: bool = False
    """The format stores the transposed matrix."""

    def single(self) -> set[int]:
        """Return the parameter's dims that the tensor does not have."""
        return {dim for dim, index in enumerate(self.at) if isinstance(index, int)}


class Format(NamedTuple):
    """A format of model directories."""

    model_type: str
    read_config: Callable[[dict[str, Any], Path], ModelConfig]
    """(config.json's object, its path) -> the model; ValueError, one line, for settings that our model does not have.
    """
    write_config: Callable[[ModelConfig, int | None], dict[str, Any]]
    """(model, id of the token that ends a text) -> config.json's object; ValueError, one line, if the format cannot
    describe the model."""
    parts: Callable[[str, tuple[int, ...], ModelConfig], Iterator[Part]]
    """(name, shape, model) -> the tensors that together hold a parameter."""
    prefix: str = ""
    """Of all tensors' names as written; the files read may lack it."""


Size = Annotated[int, Field(ge=1, le=MAX_SIZE)]
Amount = Annotated[float, Field(ge=0)]


def setting(record: dict[str, Any], name: str, where: Path, kind: Any = Size, default: Any = None) -> Any:
    """Return a setting of a `config.json`, of this type; the default if it is missing or null.

    Raises:
        ValueError: one line: it is something else, or missing without a default.
    """
    value = record.get(name)
    return default if value is None and default is not None else from_json(kind, value, f"{where}: {name}")


def agreed(record: dict[str, Any], names: tuple[str, str], where: Path) -> str:
    """Return the one of a setting's two names that a `config.json` uses; with both, they have the same value.

    Raises:
        ValueError: one line: the values differ.
    """
    given = [name for name in names if record.get(name) not in (None, {})]
    if len(given) == 2 and record[given[0]] != record[given[1]]:
        raise ValueError(f"{where}: {' and '.join(names)} differ: {record[names[0]]!r} and {record[names[1]]!r}")
    return given[0] if given else names[1]


def check_fixed(record: dict[str, Any], fixed: dict[str, Any], where: Path) -> None:
    """Check settings that a format may vary and our model does not; a missing key means the value given.

    Raises:
        ValueError: one line naming the setting.
    """
    for key, value in fixed.items():
        if record.get(key, value) != value:
            raise ValueError(f"{where}: {key} is {record[key]!r}, supported is {value!r}")


# -- our own -----------------------------------------------------------------------------------------------------------


def _read_moelab_config(record: dict[str, Any], where: Path) -> ModelConfig:
    if record.get("format") != VERSION:
        raise ValueError(f"{where.parent}: format {record.get('format')!r} of a moelab model, known is {VERSION}")
    return from_json(ModelConfig, record.get("model"), where=f"{where}: model")


def _write_moelab_config(config: ModelConfig, eot: int | None) -> dict[str, Any]:
    return {"model_type": "moelab", "format": VERSION, "model": to_json(config), "eos_token_id": eot}


def _moelab_parts(name: str, shape: tuple[int, ...], config: ModelConfig) -> Iterator[Part]:
    owner, _, leaf = name.rpartition(".")
    if not owner.endswith(".experts"):
        yield Part(name)
        return
    for expert in range(shape[0]):
        yield Part(f"{owner}.{expert}.{leaf}", (expert,))


MOELAB = Format("moelab", _read_moelab_config, _write_moelab_config, _moelab_parts)

# -- GPT-2 -------------------------------------------------------------------------------------------------------------

# our parameter name -> GPT-2's name; of a block's, also whether GPT-2 stores the transposed matrix
_TOP = {
    "token_embedding.weight": "wte.weight",
    "position_embedding.weight": "wpe.weight",
    "norm.weight": "ln_f.weight",
    "norm.bias": "ln_f.bias",
}
_BLOCK = {
    "attention_norm.weight": ("ln_1.weight", False),
    "attention_norm.bias": ("ln_1.bias", False),
    "attention.qkv.weight": ("attn.c_attn.weight", True),
    "attention.qkv.bias": ("attn.c_attn.bias", False),
    "attention.out.weight": ("attn.c_proj.weight", True),
    "attention.out.bias": ("attn.c_proj.bias", False),
    "ffn_norm.weight": ("ln_2.weight", False),
    "ffn_norm.bias": ("ln_2.bias", False),
    "ffn.up.weight": ("mlp.c_fc.weight", True),
    "ffn.up.bias": ("mlp.c_fc.bias", False),
    "ffn.down.weight": ("mlp.c_proj.weight", True),
    "ffn.down.bias": ("mlp.c_proj.bias", False),
}
_GPT2_FIXED: dict[str, Any] = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


def _read_gpt2_config(record: dict[str, Any], where: Path) -> ModelConfig:
    check_fixed(record, _GPT2_FIXED, where)
    theirs = ("n_layer", "n_embd", "n_head", "vocab_size", "n_positions")
    layers, hidden, heads, vocab, context = (setting(record, name, where) for name in theirs)
    if record.get("n_inner") not in (None, 4 * hidden):
        raise ValueError(f"{where}: n_inner is {record['n_inner']}, supported is 4 x n_embd")
    try:
        return ModelConfig(layers, hidden, heads, vocab=vocab, context=context)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def is_gpt2(config: ModelConfig) -> bool:
    """Return whether GPT-2's format describes the model: dense, with the paper's decoder."""
    return not config.is_moe and config.decoder == DecoderConfig()


def _write_gpt2_config(config: ModelConfig, eot: int | None) -> dict[str, Any]:
    if not is_gpt2(config):
        raise ValueError(f"export: {config} is no dense model with the paper's decoder, which is what gpt2 describes")
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab,
        "n_positions": config.context,
        "n_embd": config.hidden,
        "n_layer": config.layers,
        "n_head": config.heads,
        "initializer_range": config.init_std,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout),
        "bos_token_id": eot,
        "eos_token_id": eot,
        **_GPT2_FIXED,
    }


def _gpt2_parts(name: str, shape: tuple[int, ...], config: ModelConfig) -> Iterator[Part]:
    if name in _TOP:
        yield Part(_TOP[name])
        return
    _, layer, rest = name.split(".", 2)
    theirs, transposed = _BLOCK[rest]
    yield Part(f"h.{layer}.{theirs}", (), transposed)


GPT2 = Format("gpt2", _read_gpt2_config, _write_gpt2_config, _gpt2_parts, prefix="transformer.")
