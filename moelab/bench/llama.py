"""Decode beside llama.cpp on the same weights, where llama-cpp-python and gguf are installed (extra `peers`).

A model that is an OLMoE or a Qwen3-MoE is written as a GGUF file: matrices in the model's dtype, norms and the router's
matrix in fp32, as llama.cpp's own converter does. llama.cpp then generates greedily with its defaults (keys,
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
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moelab.bench import harness
from moelab.bench.decoders import Turns
from moelab.bench.peers import has
from moelab.config import ModelConfig
from moelab.engine.checkpoint import hf
from moelab.models import GPT

if TYPE_CHECKING:
    from moelab.bench.llama_process import Generated

NAME = "llama.cpp"
PAUSE_S = 0.05
"""Before and after a turn."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""By dtype of the weights. In fp32 only sums are in another order: 6e-7 to 1e-6 measured, and one expert fewer of 8
makes 3e-2. Activations in bf16: 8e-3 to 1.7e-2 measured, more with more layers; another rotation makes 0.4 and more."""


def fits(config: ModelConfig) -> bool:
    """Return whether llama.cpp computes a model.

    Its OLMoE does not renormalise the choices' weights and has neither grouped queries nor a tied head; its Qwen3-MoE
    renormalises, and has no dense layers.
    """
    kind, renormalises = hf.suitable_format(config), config.routing.normalizes(config.top_k)
    if kind == "olmoe":
        return not (renormalises or config.kv_heads != config.heads or config.decoder.tied)
    return kind == "qwen3_moe" and renormalises and all(config.experts)


def write(config: ModelConfig, weights: Mapping[str, Tensor], target: Path) -> None:
    """Write the GGUF file of a model that `fits`; without a tokenizer, as only ids are used."""
    import gguf

    kind = hf.FORMATS[hf.suitable_format(config)]
    architecture = kind.model_type.replace("_", "")
    writer = gguf.GGUFWriter(target, architecture, use_temp_file=True)
    for add, value in (
        (writer.add_tokenizer_model, "none"),
        (writer.add_vocab_size, config.vocab),
        (writer.add_context_length, config.context),
        (writer.add_block_count, config.layers),
        (writer.add_embedding_length, config.hidden),
        (writer.add_feed_forward_length, config.ffn),
        (writer.add_expert_feed_forward_length, config.expert_feed_forward.ffn),
        (writer.add_expert_count, max(config.experts)),
        (writer.add_expert_used_count, config.top_k),
        (writer.add_head_count, config.heads),
        (writer.add_head_count_kv, config.kv_heads),
        (writer.add_key_length, config.head_size),
        (writer.add_value_length, config.head_size),
        (writer.add_layer_norm_rms_eps, config.decoder.norm_eps),
        (writer.add_rope_freq_base, config.decoder.rotary_base),
    ):
        add(value)
    (arch,) = (arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == architecture)
    names = gguf.get_tensor_name_map(arch, config.layers)

    def add_tensor(theirs: str, tensor: Tensor) -> None:
        ours = names.get_name(theirs, (".weight",))
        tensor = tensor.detach().contiguous()
        if tensor.ndim == 1 or "ffn_gate_inp" in ours:
            tensor = tensor.float()
        if tensor.dtype == torch.bfloat16:  # numpy has none
            writer.add_tensor(ours, tensor.view(torch.uint8).numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(ours, tensor.numpy())

    for name, weight in weights.items():
        if ".experts." not in name:
            for part in kind.parts(name, tuple(weight.shape), config):
                add_tensor(part.name, weight[part.at])
            continue
        # All experts of a layer together: [E, F, M] for down, [E, M, 2, F] for gate and up.
        pieces = {"down": weight} if name.endswith(".down") else {"gate": weight[:, :, 0], "up": weight[:, :, 1]}
        for matrix, piece in pieces.items():
            add_tensor(f"model.layers.{name.split('.')[1]}.mlp.experts.{matrix}_proj.weight", piece.mT)
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
    on_cpu = model.token_embedding.weight.device.type == "cpu"
    if not (on_cpu and fits(model.config) and has("llama_cpp") and has("gguf")):
        yield {}
        return
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
    ):
        file = Path(folder) / "model.gguf"
        write(model.config, dict(model.named_parameters()), file)
        peer, found = Peer(pool, file, torch.get_num_threads()), dict[str, Peer]()
        try:
            check(model, peer, prompts, tokens)
            found[NAME] = peer
        except (ValueError, OSError, ImportError, RuntimeError) as error:  # all but the first: a library does not load
            harness.left_out(f"{NAME}: {error}")
        yield found
