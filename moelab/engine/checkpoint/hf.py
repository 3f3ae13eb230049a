"""Models as directories that other programs read, in Hugging Face's manner: `config.json` and safetensors.

    gpt2                                        dense models with the paper's decoder, as transformers' GPT2LMHeadModel
    olmoe, mixtral, qwen2_moe, qwen3_moe        MoE models that these families describe, as transformers' classes
    moelab                                      all models

Logits are equal to those of transformers in both directions. Our own format has the model's parameters by name; an
expert's parameters are by its global id, each a tensor of its own, so that tools can read single experts:

    config.json     {"model_type": "moelab", "format": 1, "model": ModelConfig as JSON, "eos_token_id": ends a text}
    *.safetensors   blocks.1.ffn.experts.7.up [M, F] (gated: [M, 2, F]), .up_bias [F], .down [F, M], .down_bias [M]

`hf_formats` and `hf_families` say which tensor holds which parameter. Parameters are read one at a time and written by
`SHARD_BYTES`, which is what is in memory besides the model; on several ranks, each reads the experts that it holds. The
directory may also hold the `tokenizer.json` of the `tokenizers` library. No file is a pickle: reading executes no code.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from moelab.config import ModelConfig
from moelab.data.tokenizer import Tokenizer
from moelab.engine import parallel
from moelab.engine.checkpoint import shards
from moelab.engine.checkpoint.hf_families import FAMILIES, family_of
from moelab.engine.checkpoint.hf_files import INDEX, WEIGHTS, Files, expected_shape
from moelab.engine.checkpoint.hf_formats import GPT2, MOELAB, Format, is_gpt2
from moelab.engine.mesh import Mesh
from moelab.engine.placement import Placement
from moelab.engine.sharded import is_sharded
from moelab.files import new_directory, read_json, read_object, write_json
from moelab.models import GPT, empty
from moelab.terminal import one_line

FORMATS: dict[str, Format] = {f.model_type: f for f in (GPT2, *FAMILIES, MOELAB)}
SHARD_BYTES = 4 << 30
"""A file of weights is closed when it has this size."""
_CONFIG, _TOKENIZER = "config.json", "tokenizer.json"
_BESIDE = (_TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")
_UNUSED = ("lm_head.weight", ".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
"""Ends of the names of tensors that may be in a file beside the parameters: a tied head, and constants."""


# -- writing -----------------------------------------------------------------------------------------------------------


def export(model: GPT, directory: Path, tokenizer: Tokenizer | None = None, model_type: str | None = None) -> Path:
    """Write a model; the directory appears complete or not at all.

    Args:
        model_type: a name in `FORMATS`; None means GPT-2's if it describes the model, else that of the MoE family that
            does, else our own.

    Raises:
        ValueError: `directory` exists and is not an empty folder, the format does not describe the model, or it is not
            whole.
        OSError: it cannot be written.
    """
    config, eot = model.config, None if tokenizer is None else tokenizer.eot
    kind = _format(model_type or suitable_format(config))
    there = {name: () if is_sharded(p) else tuple(p.shape) for name, p in model.named_parameters()}
    if there != dict(_shapes(config)):
        raise ValueError(
            "export: weights of this model are released to a generator or on other ranks; load it as a whole"
        )
    tensors = _tensors(kind, config, ((name, p.detach()) for name, p in model.named_parameters()))
    with _new(directory) as new, torch.no_grad():
        _write(new, kind, config, eot, tensors)
        if tokenizer is not None:
            tokenizer.save(new / _TOKENIZER)
            special = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config.context}
            end = tokenizer.backend.id_to_token(tokenizer.eot)
            write_json(new / "tokenizer_config.json", {**special, "eos_token": end})
    return directory


def convert(source: Path, directory: Path, model_type: str = "moelab", name: str = "") -> ModelConfig:
    """Write the model in a directory to another one in another format, with its tokenizer; return its configuration.

    Weights keep their dtype and their bits; `SHARD_BYTES` of them are in memory at a time.

    Args:
        name: the model's name; the default keeps that of the source.

    Raises:
        ValueError: as `load` and `export`; or a weight is no finite number, or the tokenizer is damaged.
    """
    kind, config, record = _read_config(source)
    config = replace(config, name=name or config.name)
    target, eot = _format(model_type), _end_of_text(record, source / _CONFIG)
    with Files(source, kind) as files, _new(directory) as new:
        _check(files, kind, config)
        tensors = _tensors(
            target,
            config,
            ((name, _finite(name, files.whole(name, shape, config), source)) for name, shape in _shapes(config)),
        )
        _write(new, target, config, eot, tensors)
        for name in _BESIDE:
            if (source / name).is_file():
                shutil.copyfile(source / name, new / name)
        _check_tokenizer(source / _TOKENIZER)
    return config


def _finite(name: str, tensor: Tensor, source: Path) -> Tensor:
    """Return a parameter; ValueError, one line, where it has a NaN or an infinity."""
    wrong = int((~torch.isfinite(tensor)).sum())
    if wrong:
        raise ValueError(f"{source}: {wrong} of {tensor.numel()} numbers of {name} are NaN or infinite")
    return tensor


def _check_tokenizer(path: Path) -> None:
    """Read a tokenizer's file, if there is one; ValueError, one line, where it is damaged."""
    import tokenizers

    try:
        if path.is_file():
            tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no class of its own
        raise ValueError(f"{path}: not a tokenizer of the `tokenizers` library ({error})") from None


def _end_of_text(record: dict[str, Any], where: Path) -> int | None:
    """Return the id of the token that ends a text, the first if there are several."""
    ids = record.get("eos_token_id")
    first = ids[0] if isinstance(ids, list) and ids else ids
    if first is not None and type(first) is not int:
        raise ValueError(f"{where}: eos_token_id must be a whole number or a list of them, got {ids!r}")
    return first


def suitable_format(config: ModelConfig) -> str:
    """Return the format that `export` chooses for a model."""
    return "gpt2" if is_gpt2(config) else family_of(config) or "moelab"


def check_format(model_type: str, config: ModelConfig) -> None:
    """Refuse, before any weights are read, an unknown format and one that cannot describe a model. ValueError."""
    _format(model_type).write_config(config, None)


def _format(model_type: str) -> Format:
    if model_type not in FORMATS:
        raise ValueError(f"export: format {model_type!r} is unknown; allowed: {', '.join(FORMATS)}")
    return FORMATS[model_type]


def _new(directory: Path) -> Any:
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"export: {directory} exists; choose a new directory")
    return new_directory(directory)


def _tensors(
    kind: Format, config: ModelConfig, parameters: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Iterate over a format's tensors, by their names, of a model's parameters."""
    for name, parameter in parameters:
        for part in kind.parts(name, tuple(parameter.shape), config):
            piece = parameter[part.at] if part.at else parameter
            yield kind.prefix + part.name, (piece.T if part.transposed else piece).contiguous()


def _write(
    new: Path, kind: Format, config: ModelConfig, eot: int | None, tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write config.json, and the tensors to one file, or to several with an index."""
    record = kind.write_config(config, eot)
    files: list[list[str]] = []
    held: dict[str, Tensor] = {}
    size = total = 0

    def close() -> None:
        nonlocal size
        try:
            save_file(held, new / f"{len(files)}", {"format": "pt"})
        except SafetensorError as error:  # how safetensors reports a full disk
            raise OSError(str(error)) from error
        files.append(list(held))
        held.clear()
        size = 0

    for name, tensor in tensors:
        if held and size + tensor.nbytes > SHARD_BYTES:
            close()
        # A copy where the tensor is a view: safetensors refuses tensors that share memory.
        held[name] = tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor
        size, total, dtype = size + tensor.nbytes, total + tensor.nbytes, tensor.dtype
    close()
    count = len(files)
    names = [WEIGHTS] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    for i, name in enumerate(names):
        (new / f"{i}").rename(new / name)
    if len(files) > 1:
        index = {name: file for file, held_names in zip(names, files, strict=True) for name in held_names}
        write_json(new / INDEX, {"metadata": {"total_size": total}, "weight_map": index})
    if kind is not MOELAB:
        record["torch_dtype"] = str(dtype).removeprefix("torch.")
    write_json(new / _CONFIG, record)


# -- reading -----------------------------------------------------------------------------------------------------------


def read_config(directory: Path) -> ModelConfig:
    """Return the configuration of the model in a directory of any format; ValueError, one line, if it has none."""
    return _read_config(directory)[1]


def load(directory: Path, *, dtype: torch.dtype | None = None, device: str = "cpu") -> GPT:
    """Return the model in a directory of any format.

    Args:
        dtype: of the weights; None means that in which they are stored. A router that is stored more exactly than the
            other weights remains so.
        device: on which the model is filled, a tensor at a time.

    Raises:
        ValueError: there is no such model, the format is unknown, the settings are none that our model has, or tensors
            are missing, left over or have the wrong shape; the message is one line.
    """
    return _filled(directory, dtype, lambda config, dtype: (empty(config, device, dtype), {}))[0]


def load_part(directory: Path, mesh: Mesh, *, dtype: torch.dtype | None = None) -> parallel.ParallelModel:
    """Return this rank's part of the model in a directory of any format, on the mesh's device, ready to be trained.

    Every rank of the mesh calls it and reads only the weights that it holds. Arguments and errors as in `load`; with
    `shard`, routers that are stored more exactly than the other weights are refused as well.
    """

    def build(config: ModelConfig, dtype: torch.dtype) -> tuple[GPT, dict[str, Placement]]:
        part = parallel.build(config, None, mesh, dtype)
        return part.module, part.placements

    return parallel.ParallelModel(*_filled(directory, dtype, build, sharded=mesh.fsdp is not None), mesh)


def _filled(
    directory: Path,
    dtype: torch.dtype | None,
    build: Callable[[ModelConfig, torch.dtype], tuple[GPT, dict[str, Placement]]],
    sharded: bool = False,
) -> tuple[GPT, dict[str, Placement]]:
    """Return the model and the placements that `build` makes, with the weights of a directory."""
    kind, config, _ = _read_config(directory)
    with Files(directory, kind) as files:
        stored = _check(files, kind, config)
        own = stored["token_embedding.weight"]
        routers = {name for name, of in stored.items() if of != own and name.endswith(".router.weight")}
        if routers and sharded and dtype != torch.float32:
            raise ValueError(f"{directory}: routers have another dtype than {own}; `shard` needs one: choose fp32")
        if odd := [name for name, of in stored.items() if of != own and name not in routers and dtype is None]:
            raise ValueError(f"{directory}: {odd[0]} is {stored[odd[0]]} and the embedding {own}; choose the dtype")
        dtype = dtype or own
        model, placements = build(config, dtype)
        for name, parameter in model.named_parameters():
            if name in routers:
                parameter.data = parameter.data.to(torch.promote_types(dtype, stored[name]))
            placement = placements.get(name) or Placement.whole(tuple(parameter.shape))
            files.fill(shards.pieces(name, parameter, placement), config)
    return model, placements


def fetch(name: str) -> Path:
    """Return the directory of a published model, such as "allenai/OLMoE-1B-7B-0924", after fetching it if necessary.

    Only safetensors and JSON files are fetched; they stay in the cache of the `huggingface_hub` library.

    Raises:
        ValueError: one line: the library is missing, or the model cannot be fetched.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(
            f"import: there is no folder {name!r}; to fetch a model, install moelab with its extra `hf`"
        ) from None
    if name.count("/") != 1:
        raise ValueError(f"import: there is no folder {name!r}; a published model is named as OWNER/NAME")
    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))
    except Exception as error:  # the library passes on its dependencies' exceptions
        raise ValueError(
            f"import: there is no folder {name!r}, and no model of that name can be fetched ({one_line(error)})"
        ) from None


def load_tokenizer(directory: Path) -> Tokenizer:
    """Return the tokenizer beside a model.

    Raises:
        ValueError: there is none.
    """
    path = directory / _TOKENIZER
    if not path.is_file():
        raise ValueError(
            f"{directory}: no {_TOKENIZER} here; text needs a tokenizer, `moelab generate --ids` takes ids"
        )
    end = (read_object(directory / "tokenizer_config.json") or {}).get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    return Tokenizer.load(path, **({"eot": end} if isinstance(end, str) else {}))


def _read_config(directory: Path) -> tuple[Format, ModelConfig, dict[str, Any]]:
    record = read_json(directory / _CONFIG) if (directory / _CONFIG).is_file() else None
    if not isinstance(record, dict):
        raise ValueError(f"{directory}: no model here ({_CONFIG} is missing or no object)")
    model_type = record.get("model_type")
    if not isinstance(model_type, str) or model_type not in FORMATS:
        raise ValueError(f"{directory}: model_type {model_type!r} is not supported; allowed: {', '.join(FORMATS)}")
    kind = FORMATS[model_type]
    return kind, kind.read_config(record, directory / _CONFIG), record


def _shapes(config: ModelConfig) -> list[tuple[str, tuple[int, ...]]]:
    with torch.device("meta"):
        return [(name, tuple(p.shape)) for name, p in GPT(config).named_parameters()]


def _check(files: Files, kind: Format, config: ModelConfig) -> dict[str, torch.dtype]:
    """Compare a model with the files' headers, before anything of its size is made; return its parameters' dtypes.

    All tensors are there with the right shapes, no tensor would be left unread, a parameter's tensors have one dtype,
    and a tied head equals the embedding.
    """
    if config.layers > len(files.names):
        raise ValueError(f"{files.directory}: {len(files.names)} tensors are too few for {config.layers} layers")
    dtypes: dict[str, torch.dtype] = {}
    wanted: set[str] = set()
    wrong = ""
    try:
        shapes = _shapes(config)
    except (ValueError, RuntimeError) as error:  # RuntimeError: more elements than torch can count
        raise ValueError(f"{files.directory}: {str(error).splitlines()[0]}") from None
    for name, shape in shapes:
        for part in kind.parts(name, shape, config):
            theirs = files.prefix + part.name
            if theirs not in files.names:
                raise ValueError(f"{files.directory}: {wrong or f'tensor {theirs} is missing'}")
            wanted.add(theirs)
            shape_there, expected = files.shape(theirs, part.transposed), expected_shape(part, shape)
            if shape_there != expected:
                wrong = wrong or f"{part.name if part.at else name} is {shape_there}, expected {expected}"
            elif files.dtype(theirs) != dtypes.setdefault(name, files.dtype(theirs)):
                wrong = wrong or f"tensor {theirs} has another dtype than the others of {name}"
    odd = [name for name in files.names if name not in wanted and not name.endswith(_UNUSED)]
    if odd or wrong:
        text = f"tensor {odd[0]} ({len(odd)} such) is none of this model's" if odd else wrong
        raise ValueError(f"{files.directory}: {text}")
    if config.decoder.tied and "lm_head.weight" in files.names:
        (embedding,) = kind.parts("token_embedding.weight", (), config)
        if not torch.equal(files.read("lm_head.weight"), files.read(files.prefix + embedding.name)):
            raise ValueError(f"{files.directory}: lm_head differs from the embedding; our head is tied to it")
    return dtypes
