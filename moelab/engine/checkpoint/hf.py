"""Models as directories that other programs read: GPT-2's format for dense models, one of our own for MoE models.

Dense models (`config.json` with ``"model_type": "gpt2"``) have the format that transformers' `GPT2LMHeadModel` loads
and saves, with equal logits in both directions. Its linear layers keep [in, out] matrices (ours are [out, in]); its
``gelu_new`` is our tanh GELU; the head is tied to the embedding in both.

MoE models consist of two files:

    config.json         {"model_type": "moelab", "format": 1, "model": ModelConfig as JSON}
    model.safetensors   the model's parameters by name; an expert's by its global id, each a tensor of its own:
                        blocks.1.ffn.experts.7.up [M, F], .up_bias [F], .down [F, M], .down_bias [M]

so that tools can read single experts. The directory of either format may also hold the `tokenizer.json` of the
`tokenizers` library. No file is a pickle: reading executes no code.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moelab.config import ModelConfig, from_json, to_json
from moelab.data import Tokenizer
from moelab.files import new_directory, read_json, write_json
from moelab.models import GPT

FORMAT = 1
_CONFIG, _WEIGHTS, _INDEX, _TOKENIZER = (
    "config.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
)

# our parameter name -> GPT-2's name, and whether GPT-2 stores the transposed matrix
_TOP = {
    "token_embedding.weight": ("wte.weight", False),
    "position_embedding.weight": ("wpe.weight", False),
    "norm.weight": ("ln_f.weight", False),
    "norm.bias": ("ln_f.bias", False),
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


def export(model: GPT, directory: Path, tokenizer: Tokenizer | None = None) -> Path:
    """Write a model in GPT-2's format if it is dense, in ours if it has experts.

    The directory appears complete or not at all.

    Raises:
        ValueError: `directory` exists and is not an empty folder.
        OSError: it cannot be written.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"export: {directory} exists; choose a new directory")
    config = model.config
    with new_directory(directory) as new, torch.no_grad():
        tensors = dict(_moelab_tensors(model) if config.is_moe else _gpt2_tensors(model))
        try:
            save_file({name: t.contiguous() for name, t in tensors.items()}, new / _WEIGHTS, {"format": "pt"})
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(str(error)) from error
        if config.is_moe:
            write_json(new / _CONFIG, {"model_type": "moelab", "format": FORMAT, "model": to_json(config)})
        else:
            write_json(new / _CONFIG, _gpt2_config(config, tokenizer))
        if tokenizer is not None:
            tokenizer.save(new / _TOKENIZER)
            special = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.context}
            write_json(new / "tokenizer_config.json", {**special, "eos_token": "<|endoftext|>"})
    return directory


def load(directory: Path) -> GPT:
    """Return the model in a directory of either format, on CPU, in the dtype in which it is stored.

    Raises:
        ValueError: there is no such model, the format is unknown, the settings are none that our model has, or tensors
            are missing or have the wrong shape; the message is one line.
    """
    record = read_json(directory / _CONFIG) if (directory / _CONFIG).is_file() else None
    if not isinstance(record, dict):
        raise ValueError(f"{directory}: no model here ({_CONFIG} is missing or no object)")
    kind = record.get("model_type")
    if kind == "moelab":
        if record.get("format") != FORMAT:
            raise ValueError(f"{directory}: format {record.get('format')!r} of a moelab model, known is {FORMAT}")
        config = from_json(ModelConfig, record.get("model"), where=f"{directory / _CONFIG}: model")
    elif kind == "gpt2":
        config = _from_gpt2_config(record, directory / _CONFIG)
    else:
        raise ValueError(f"{directory}: model_type {kind!r} is not supported; allowed: gpt2, moelab")
    with torch.device("meta"):
        model = GPT(config)
    parameters = dict(model.named_parameters())
    found: dict[str, Tensor] = {}
    with _Files(directory) as files:
        if kind == "gpt2":
            _read_gpt2(files, parameters, found)
        else:
            _read_moelab(files, parameters, found)
    for name, parameter in parameters.items():
        if found[name].shape != parameter.shape:
            raise ValueError(f"{directory}: {name} is {tuple(found[name].shape)}, expected {tuple(parameter.shape)}")
    model.load_state_dict(found, assign=True)
    return model.requires_grad_(True)


def load_tokenizer(directory: Path) -> Tokenizer:
    """Return the tokenizer beside a model.

    Raises:
        ValueError: there is none.
    """
    path = directory / _TOKENIZER
    if not path.is_file():
        raise ValueError(f"{directory}: no {_TOKENIZER} here; text needs a tokenizer")
    return Tokenizer.load(path)


# -- GPT-2 ----------------------------------------------------------------------------------------------------


def _gpt2_name(name: str) -> tuple[str, bool]:
    if name in _TOP:
        return _TOP[name]
    _, layer, rest = name.split(".", 2)
    theirs, transposed = _BLOCK[rest]
    return f"h.{layer}.{theirs}", transposed


def _gpt2_tensors(model: GPT) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        theirs, transposed = _gpt2_name(name)
        yield f"transformer.{theirs}", parameter.detach().T if transposed else parameter.detach()


def _read_gpt2(files: _Files, parameters: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    prefix = "transformer." if any(name.startswith("transformer.") for name in files.names) else ""
    for name in parameters:
        theirs, transposed = _gpt2_name(name)
        tensor = files.read(prefix + theirs)
        found[name] = tensor.T.contiguous() if transposed else tensor
    if "lm_head.weight" in files.names and not torch.equal(
        files.read("lm_head.weight"), found["token_embedding.weight"]
    ):
        raise ValueError(f"{files.directory}: lm_head differs from the embedding; our head is tied to it")


_FIXED: dict[str, Any] = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
"""Settings that GPT-2's configuration may vary and our model does not; a missing key means this value."""


def _gpt2_config(config: ModelConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    eot = None if tokenizer is None else tokenizer.eot
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
        **_FIXED,
    }


def _from_gpt2_config(record: dict[str, Any], where: Path) -> ModelConfig:
    for key, value in _FIXED.items():
        if record.get(key, value) != value:
            raise ValueError(f"{where}: {key} is {record[key]!r}, supported is {value!r}")
    sizes = {}
    for ours, theirs in (
        ("layers", "n_layer"),
        ("hidden", "n_embd"),
        ("heads", "n_head"),
        ("vocab", "vocab_size"),
        ("context", "n_positions"),
    ):
        if type(record.get(theirs)) is not int:
            raise ValueError(f"{where}: {theirs} must be a whole number, got {record.get(theirs)!r}")
        sizes[ours] = record[theirs]
    if record.get("n_inner") not in (None, 4 * sizes["hidden"]):
        raise ValueError(f"{where}: n_inner is {record['n_inner']}, supported is 4 x n_embd")
    return ModelConfig(**sizes)


# -- MoE ------------------------------------------------------------------------------------------------------


def _moelab_tensors(model: GPT) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        if owner.endswith(".experts"):
            for expert, part in enumerate(parameter.detach()):
                yield f"{owner}.{expert}.{leaf}", part
        else:
            yield name, parameter.detach()


def _read_moelab(files: _Files, parameters: dict[str, Tensor], found: dict[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        owner, _, leaf = name.rpartition(".")
        if not owner.endswith(".experts"):
            found[name] = files.read(name)
            continue
        for expert in range(len(parameter)):  # copied one by one: stacking would hold them twice in memory
            part = files.read(f"{owner}.{expert}.{leaf}")
            if expert == 0:
                found[name] = torch.empty(parameter.shape, dtype=part.dtype)
            if part.shape != parameter.shape[1:]:
                expected = tuple(parameter.shape[1:])
                raise ValueError(
                    f"{files.directory}: {owner}.{expert}.{leaf} is {tuple(part.shape)}, expected {expected}"
                )
            found[name][expert] = part


class _Files:
    """The safetensors files of a directory, one or several with an index."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        index = read_json(directory / _INDEX)
        files = sorted(set(index["weight_map"].values())) if index else [_WEIGHTS]
        self._open: list[Any] = []
        self.names: dict[str, Any] = {}
        for file in files:
            path = directory / Path(file).name
            if path.exists() and not path.is_file():  # reading a FIFO or a device might never end
                raise ValueError(f"{path}: not a regular file")
            try:
                opened = safe_open(path, "pt").__enter__()
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{path}: unreadable ({error})") from None
            self._open.append(opened)
            self.names.update(dict.fromkeys(opened.keys(), opened))

    def read(self, name: str) -> Tensor:
        if name not in self.names:
            raise ValueError(f"{self.directory}: tensor {name} is missing")
        return self.names[name].get_tensor(name)

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *_: object) -> None:
        for opened in self._open:
            opened.__exit__(None, None, None)
