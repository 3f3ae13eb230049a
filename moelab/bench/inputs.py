"""Make inputs like a real model's: text, and hidden states with a gate's logits, new ones for every round.

Routing decides what an MoE layer costs: how many experts have tokens and how unevenly. So no benchmark measures one
routing again and again: each round has other text, the same for all candidates.
"""

from __future__ import annotations

import functools
import math
import statistics
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from moelab import paths
from moelab.config import DataConfig, ModelConfig
from moelab.data.batches import TrainBatches
from moelab.data.packages import CorpusUnavailable
from moelab.data.preparation import prepare
from moelab.data.tokens import TokenData
from moelab.kernels import gate
from moelab.models.gpt import build, initial_weight
from moelab.training.optimizer import AdamW

VOCAB = 2048
CONTEXT = 128
TEXT = "State of the Union text, new each round, the same for all candidates"
HIDDEN = f"hidden states of a decoder with initial weights on {TEXT}; the gate was balanced by 30 steps of training"


@functools.cache
def text() -> TokenData:
    """Return the tokens of 2 MB of text, prepared on the first call and read from `.moelab/data` later.

    Where neither the text's package nor its tokens are, it is the corpus `made`; see `described`.
    """
    config, folder = DataConfig(tokenizer=f"bpe-{VOCAB}", context=CONTEXT, max_bytes=2_000_000), paths.home() / "data"
    try:
        return prepare(config, folder)
    except CorpusUnavailable:
        return prepare(replace(config, corpus="made"), folder)


def described(what: str) -> str:
    """Return a description that names `TEXT`, such as `HIDDEN`, as it is true of the text that there is."""
    return what.replace("State of the Union text", "made text") if text().meta["corpus"] == "made" else what


class TextBatches(TrainBatches):
    """Batches of text for a training loop, ids folded into a vocabulary that may be smaller than the text's."""

    def __init__(self, sequences: int, context: int, vocab: int = VOCAB, rank: int = 0, world: int = 1) -> None:
        super().__init__(text(), sequences, context, 0, rank, world)
        self._vocab = vocab

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Return tokens and next tokens, as `TrainBatches`."""
        tokens_BT, targets_BT = super().batch(step)
        return tokens_BT % self._vocab, targets_BT % self._vocab


def prompts(number: int, sequences: int, length: int, vocab: int) -> list[list[int]]:
    """Return the prompts of round `number`: token ids, folded into a vocabulary that is smaller than the text's."""
    return TextBatches(sequences, length, vocab).batch(number)[0].tolist()


@dataclass(frozen=True)
class Tokens:
    """The tokens of a round at a gate.

    Attributes:
        x_SM: hidden states, fp32.
        logits_SE: the gate's logits, fp32.
        load_E: tokens of which the expert is one of the K choices.
    """

    x_SM: Tensor
    logits_SE: Tensor
    load_E: Tensor

    @property
    def busiest(self) -> float:
        """Tokens of the busiest expert over the mean."""
        return float(self.load_E.max() * len(self.load_E) / self.load_E.sum())

    @property
    def used(self) -> int:
        """Experts that have tokens."""
        return int((self.load_E > 0).sum())


class HiddenStates:
    """Makes the `Tokens` of a round.

    The decoder has two layers and the initial weights that training begins with. Its second layer ends before the
    feed-forward, where an MoE layer would be. With that layer's initial weights the gate sends a common word's every
    token to one expert; a few steps on the load-balancing loss, on other text, bring it near what gates of trained
    twins do (busiest expert 1.2 to 3 times the mean). The same arguments make the same tokens.

    Attributes:
        gate_EM: the gate's weights, fp32.
        made: what was measured of the rounds made: one `Tokens.busiest` and one `Tokens.used` for each.

    Args:
        tokens: S, tokens of a round; sequences are at most `CONTEXT` long.
        hidden: M.
        experts: E.
        top_k: K, the experts of a token.
    """

    def __init__(self, tokens: int, hidden: int, experts: int, device: str = "cpu", top_k: int = 1) -> None:
        for name, value in (("tokens", tokens), ("hidden", hidden), ("experts", experts)):
            if value < 1:
                raise ValueError(f"bench: {name} must be at least 1, got {value}")
        self.tokens, self.top_k, context = tokens, top_k, min(tokens, CONTEXT)
        wanted = max(1, hidden // 64)
        heads = next(h for h in range(wanted, 0, -1) if hidden % h == 0)
        std = ModelConfig.init_std * math.sqrt(1024 / hidden)  # as the twins of the 350M model
        config = ModelConfig(2, hidden, heads, vocab=VOCAB, context=CONTEXT, init_std=std)
        self._model = build(config, 0, device).eval()
        self._batches = TextBatches(-(-tokens // context), context)
        weight = initial_weight(config, 0, "blocks.1.ffn.router.weight", (experts, hidden))
        self.gate_EM = self._balanced(weight.to(device))
        self.made: list[tuple[float, int]] = []

    @torch.enable_grad()
    def _balanced(self, weight_EM: Tensor) -> Tensor:
        """Return the gate's weights after 30 steps of Adam on the load-balancing loss alone."""
        other = TextBatches(8, CONTEXT)
        seen = [self._hidden(other.batch(10_000 + i)[0]) for i in range(3)]
        weight_EM.requires_grad_()
        optimizer = AdamW([weight_EM], lr=1e-3, weight_decay=0.0)
        for step in range(30):
            optimizer.zero_grad()
            gate(F.linear(seen[step % len(seen)], weight_EM), 1).aux_loss.backward()
            optimizer.step()
        return weight_EM.detach()

    @torch.no_grad()
    def _hidden(self, tokens_BT: Tensor) -> Tensor:
        model = self._model
        tokens_BT = tokens_BT.to(model.token_embedding.weight.device)
        assert model.position_embedding is not None
        x_BTM = model.token_embedding(tokens_BT) + model.position_embedding.weight[: tokens_BT.shape[1]]
        first, second = model.blocks
        x_BTM, _ = first(x_BTM)
        return second.ffn_norm(x_BTM + second.attention(second.attention_norm(x_BTM))).flatten(0, 1)

    def __call__(self, number: int) -> Tokens:
        """Return the tokens of round `number`."""
        x_SM = self._hidden(self._batches.batch(number)[0])[: self.tokens]
        logits_SE = F.linear(x_SM, self.gate_EM)
        chosen_SK = logits_SE.topk(self.top_k).indices if self.top_k > 1 else logits_SE.argmax(1)
        load_E = torch.bincount(chosen_SK.flatten(), minlength=len(self.gate_EM))
        made = Tokens(x_SM, logits_SE, load_E)
        self.made.append((made.busiest, made.used))
        return made

    def measured(self) -> dict[str, float]:
        """Return medians over rounds of `busiest_expert` (tokens over the mean) and `used_experts` (with tokens)."""
        busiest, used = zip(*self.made, strict=True)
        return {"busiest_expert": statistics.median(busiest), "used_experts": statistics.median(used)}
