from dataclasses import replace

import pytest
import torch

from moelab.config import DecoderConfig, ExpertConfig, ModelConfig, RoutingConfig
from moelab.inference import Generator
from moelab.models import build
from tests.engine.conftest import on_ranks  # noqa: F401  # a fixture

# Large weights, so that outputs depend on everything before them and ties are out of the question.
_COMMON = dict(hidden=32, heads=2, vocab=320, context=48, init_std=0.3)
_DECODER = DecoderConfig.modern(kv_heads=2, head_size=16, qk_norm="head", biases="qkv")
_TODAY = ModelConfig(layers=2, experts=(0, 4), top_k=2, decoder=_DECODER, **(_COMMON | {"heads": 4}))
KINDS = {
    "dense": ModelConfig(layers=3, **_COMMON),
    "MoE": ModelConfig(layers=4, experts=(0, 4, 0, 4), **_COMMON),
    "top-2": ModelConfig(layers=2, experts=(0, 4), top_k=2, **_COMMON),
    "PR-MoE": ModelConfig(layers=4, experts=(0, 4, 0, 8), residual=True, **_COMMON),
    "residual, sum": ModelConfig(layers=2, experts=(0, 4), residual=True, residual_mix="sum", **_COMMON),
    "sigmoid": replace(_TODAY, routing=RoutingConfig(scores="sigmoid", balance_rate=0.01)),
    "smeared keys": ModelConfig(layers=4, experts=(0, 4, 0, 4), decoder=DecoderConfig(smeared_keys=True), **_COMMON),
    "smeared keys of today": replace(_TODAY, decoder=replace(_DECODER, smeared_keys=True)),
    "shared gate, norm of all heads": replace(
        _TODAY, decoder=replace(_DECODER, qk_norm="all"), expert=ExpertConfig(shared=1, shared_gate=True)
    ),
}
KINDS = {name: replace(config, routing=replace(config.routing, drop_tokens=False)) for name, config in KINDS.items()}


class Recorder(Generator):
    """Keeps the logits behind every token."""

    def _take(self, sequences, logits_BV, likeliest_B, sampling):
        self.logits = getattr(self, "logits", {})
        for sequence, row in zip(sequences, logits_BV, strict=True):
            self.logits[sequence.index, len(sequence.tokens)] = row.clone()
        return super()._take(sequences, logits_BV, likeliest_B, sampling)


@pytest.fixture
def recorder() -> type[Recorder]:
    return Recorder


@pytest.fixture(params=KINDS)
def kind(request) -> ModelConfig:
    """A small model of each kind the paper has, and of some of today."""
    return KINDS[request.param]


@pytest.fixture
def prompts() -> list[list[int]]:
    """Prompts of different lengths, one of a single token, two of the same."""
    generator = torch.Generator().manual_seed(5)
    draw = [torch.randint(320, (n,), generator=generator).tolist() for n in (7, 1, 19, 12, 7, 30)]
    return [*draw, draw[2]]


@pytest.fixture
def threads():
    """Set the number of PyTorch's threads, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def kinds() -> dict[str, ModelConfig]:
    return KINDS


@pytest.fixture
def make():
    """Build a model; biases are drawn, too: the initial zeros would hide one that is lost or added twice."""

    def make(config: ModelConfig):
        model = build(config, 0)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("bias", "q_norm.weight", "smear")):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        return model.eval()

    return make
