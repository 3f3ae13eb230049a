"""Decode beside llama.cpp on the same weights, where llama-cpp-python and gguf are installed (extra `peers`).

A model is exported as OLMoE or Qwen3-MoE and written as a GGUF file: matrices in the model's dtype, norms and the
router's matrix in fp32, as llama.cpp's own converter does. llama.cpp then generates greedily with its defaults (keys,
values and attention in fp16, also with fp32 weights), all sequences in one batch, on as many threads as ours. Before
that, its logits are checked, with attention in fp32.

llama.cpp runs in a process of its own (`moelab.bench.llama_process`), because it ends its process at an error, and has
an OpenMP library of its own. After their work, OpenMP's threads wait for more in a loop, for up to 15 ms measured on a
busy machine, before they sleep. So a pause comes before and after each of its turns: no candidate's threads then take a
core from another's.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor

from moelab.bench import harness
from moelab.bench.decoders import Turns
from moelab.bench.peers import has
from moelab.engine.checkpoint import hf
from moelab.files import read_json
from moelab.models import GPT

if TYPE_CHECKING:
    from moelab.bench.llama_process import Generated

NAME = "llama.cpp"
ARCHITECTURES = {"olmoe": "olmoe", "qwen3_moe": "qwen3moe"}
"""Model type of a `config.json` -> llama.cpp's name of the architecture."""
PAUSE_S = 0.05
"""Before and after a turn."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""By dtype of the weights. In fp32 only sums are in another order: 6e-7 to 8e-7 measured, and one expert fewer of 8
makes 3e-2. Activations in bf16: 7e-3 to 1.6e-2 measured, more with more layers; another rotation makes 0.4 and more."""


def fits(record: dict[str, Any]) -> bool:
    """Return whether llama.cpp computes what a `config.json` describes.

    Its OLMoE does not renormalise the choices' weights and has neither grouped queries nor a tied head; its Qwen3-MoE
    renormalises, and has no dense layers.
    """
    if record["model_type"] == "olmoe":
        grouped = record["num_key_value_heads"] != record["num_attention_heads"]
        return not (record["norm_topk_prob"] or grouped or record["tie_word_embeddings"])
    return record["model_type"] == "qwen3_moe" and record["norm_topk_prob"] and not record["mlp_only_layers"]


def write(source: Path, target: Path) -> None:
    """Write the GGUF file of an exported model that `fits`; without a tokenizer, as only ids are used."""
    import gguf

    record = read_json(source / "config.json")
    name = ARCHITECTURES[record["model_type"]]
    layers, experts, heads = (record[n] for n in ("num_hidden_layers", "num_experts", "num_attention_heads"))
    writer = gguf.GGUFWriter(target, name, use_temp_file=True)
    head_size = record.get("head_dim", record["hidden_size"] // heads)
    for add, value in (
        (writer.add_tokenizer_model, "none"),
        (writer.add_vocab_size, record["vocab_size"]),
        (writer.add_context_length, record["max_position_embeddings"]),
        (writer.add_block_count, layers),
        (writer.add_embedding_length, record["hidden_size"]),
        (writer.add_feed_forward_length, record["intermediate_size"]),
        (writer.add_expert_feed_forward_length, record.get("moe_intermediate_size", record["intermediate_size"])),
        (writer.add_expert_count, experts),
        (writer.add_expert_used_count, record["num_experts_per_tok"]),
        (writer.add_head_count, heads),
        (writer.add_head_count_kv, record["num_key_value_heads"]),
        (writer.add_key_length, head_size),
        (writer.add_value_length, head_size),
        (writer.add_layer_norm_rms_eps, record["rms_norm_eps"]),
        (writer.add_rope_freq_base, record["rope_theta"]),
    ):
        add(value)
    (arch,) = (arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    names = gguf.get_tensor_name_map(arch, layers)

    def add_tensor(theirs: str, tensor: Tensor) -> None:
        ours = names.get_name(theirs, (".weight",))
        if tensor.ndim == 1 or "ffn_gate_inp" in ours:
            tensor = tensor.float()
        if tensor.dtype == torch.bfloat16:  # numpy has none
            writer.add_tensor(ours, tensor.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(ours, tensor.numpy())

    with contextlib.ExitStack() as stack:
        place: dict[str, Any] = {}  # tensor -> its file
        for path in sorted(source.glob("*.safetensors")):
            file = stack.enter_context(safe_open(path, "pt"))
            place |= dict.fromkeys(file.keys(), file)
        for key, file in place.items():
            if ".experts." not in key:
                add_tensor(key, file.get_tensor(key))
        for layer in range(layers):
            for matrix in ("gate_proj", "up_proj", "down_proj"):
                keys = [f"model.layers.{layer}.mlp.experts.{e}.{matrix}.weight" for e in range(experts)]
                whole = torch.stack([place[key].get_tensor(key) for key in keys])
                add_tensor(f"model.layers.{layer}.mlp.experts.{matrix}.weight", whole)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@dataclass(frozen=True)
class Peer:
    """Hold llama.cpp with a model, in its process."""

    pool: ProcessPoolExecutor
    file: Path
    threads: int

    def generate(self, prompts: list[list[int]], tokens: int, exact: bool = False) -> Generated:
        """Return what `moelab.bench.llama_process.generate` does."""
        from moelab.bench import llama_process

        return self._call(llama_process.generate, str(self.file), prompts, tokens, self.threads, exact)

    def turns(self, prompts: list[list[int]], tokens: int) -> Turns:
        """Generate and return the time of each turn."""
        return self.generate(prompts, tokens).turns

    @property
    def about(self) -> dict[str, str]:
        """What its rows say of it: which build was measured."""
        from moelab.bench import llama_process

        return {"build": self._call(llama_process.build)}

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        time.sleep(PAUSE_S)
        try:
            return self.pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise ValueError("bench decode: the process of llama.cpp died") from None
        finally:
            time.sleep(PAUSE_S)


def check(model: GPT, peer: Peer, prompts: list[list[int]], tokens: int) -> None:
    """Check that llama.cpp computes what the model computes of the sequences that llama.cpp generates.

    Compared are logits: by token the RMS of their difference over that of all logits, and of all tokens the median,
    because a difference in rounding makes a router here and there choose another expert. In fp32 its tokens must be the
    greedy ones too.

    Raises:
        ValueError: one line: they differ by more than `TOLERANCE`, or llama.cpp fails.
    """
    dtype = model.token_embedding.weight.dtype
    theirs = peer.generate(prompts, tokens, exact=True)
    new_BT, logits_BTV = torch.from_numpy(theirs.tokens), torch.from_numpy(theirs.logits)
    with torch.inference_mode():
        sequences = torch.cat([torch.tensor(prompts), new_BT], 1)[:, :-1]
        ours_BTV = model.eval()(sequences).logits_BTV[:, -tokens:].float()
    apart = float(_rms(logits_BTV - ours_BTV).median() / _rms(ours_BTV.flatten()))
    if not apart <= TOLERANCE[dtype]:
        raise ValueError(f"its logits differ from ours by {apart:.2g} of their size, {TOLERANCE[dtype]:g} is allowed")
    if dtype == torch.float32 and not torch.equal(ours_BTV.argmax(-1), new_BT):
        raise ValueError("its tokens are not those of the greatest logits of ours")


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(-1).sqrt()


@contextlib.contextmanager
def beside(model: GPT, prompts: list[list[int]], tokens: int) -> Iterator[dict[str, Peer]]:
    """Start llama.cpp with a model's weights and check it; give "llama.cpp" -> its `Peer`, for as long as the context.

    There is none where it is not installed, the model does not fit or is not on a CPU. One that computes something
    else is left out, and a line says so.

    Args:
        model: with its weights.
        prompts, tokens: for the check.
    """
    weight, kind = model.token_embedding.weight, hf.suitable_format(model.config)
    here = weight.device.type == "cpu" and kind in ARCHITECTURES and has("llama_cpp") and has("gguf")
    if not here or not fits(hf.FORMATS[kind].write_config(model.config, None)):
        yield {}
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
    ):
        file = Path(folder) / "model.gguf"
        with tempfile.TemporaryDirectory() as exported:
            write(hf.export(model, Path(exported) / "model"), file)
        peer, found = Peer(pool, file, torch.get_num_threads()), dict[str, Peer]()
        try:
            check(model, peer, prompts, tokens)
            found[NAME] = peer
        except (ValueError, OSError, ImportError, RuntimeError) as error:  # all but the first: a library does not load
            harness.left_out(f"{NAME}: {error}")
        yield found
