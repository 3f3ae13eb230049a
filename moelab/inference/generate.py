"""Generate tokens from prompts, many sequences at a time.

    generator = Generator(set_mode(model), batch=8)
    for piece in generator.stream(prompts, Sampling(temperature=0.8, top_k=50)): ...
    completions = generator.generate(prompts, Sampling(temperature=0))

Sequences share forward passes but do not influence each other beyond rounding: routing is drop-free, and attention and
random draws are computed per sequence. On a CPU one C++ call computes a step (`packing.py`), and a sequence has the
same bits in any batch; what the call cannot compute goes through the model's modules (`Generator.why_plain`). When a
sequence ends, the next prompt takes its slot at once. On several ranks, every rank calls the same method with the same
prompts; each data rank generates its part of them, and a rank that has finished joins the others' forward passes
without tokens until all ranks have finished.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from moelab.engine.collectives import all_gather_json, all_reduce
from moelab.engine.mesh import Mesh
from moelab.inference import packing
from moelab.inference.cache import KVCache
from moelab.inference.modes import STATIC_TOKENS
from moelab.inference.sampling import Sampling, choose, uniforms
from moelab.models import GPT
from moelab.models.moe import MoE

Finish = Literal["stop", "length", "context"]
"""Reason for the end of a sequence: a stop token, `max_new_tokens` reached, or the context is full."""
_PREFILL_TOKENS = 4096  # most tokens of prompts that share a forward pass: bounds the memory of activations


@dataclass(frozen=True)
class Piece:
    """Hold one new token: the index of its prompt, its id, and for the last token why the sequence ended."""

    prompt: int
    token: int
    finish: Finish | None


@dataclass(frozen=True)
class Completion:
    """Hold a prompt's continuation, including a final stop token."""

    tokens: tuple[int, ...]
    finish: Finish


@dataclass
class _Sequence:
    index: int
    prompt: tuple[int, ...]
    draws: list[float]
    tokens: list[int] = field(default_factory=list)

    @property
    def cached(self) -> int:
        """Return the number of tokens whose keys and values are in the cache: all except the newest."""
        return len(self.prompt) + len(self.tokens) - 1


class Generator:
    """Generate tokens with a model and a KV cache.

    Args:
        model: the whole model, or this rank's part; on the device and in the dtype in which it computes.
        batch: number of sequences at a time (per data rank).
        length: longest sequence in tokens, prompt and output, for which the cache is made; 0 means the model's context,
            and the cache grows up to it with the prompts and their `max_new_tokens`.
        mesh: the ranks; None means this process alone.
        static: decode with the same shapes at each step and all state on the device (see `moelab.inference.cache`).
            None chooses it on CUDA, unless the host must read numbers from the device: on several ranks message sizes,
            and in baseline mode with more than `moelab.inference.modes.STATIC_TOKENS` sequences the busiest expert's
            load.
        capture: on CUDA, replay static steps as a graph; False launches them one by one, so that their parts can be
            timed.
        release: free the model's weights as they are packed, so that few exist twice; it computes nothing afterwards.

    Attributes:
        packed: the model's packed weights, which compute prompts and steps; None where its modules do.
        why_plain: why they do, on a CPU, else None.

    Raises:
        ValueError: batch or length is out of range, or `static` is set although the host must read numbers.
    """

    def __init__(
        self,
        model: GPT,
        *,
        batch: int = 8,
        length: int = 0,
        mesh: Mesh | None = None,
        static: bool | None = None,
        capture: bool = True,
        release: bool = False,
    ) -> None:
        context = model.config.context
        if batch < 1:
            raise ValueError(f"generate: batch must be at least 1, got {batch}")
        if not 0 <= length <= context:
            raise ValueError(f"generate: length must be at most the model's context of {context}, got {length}")
        weight = model.token_embedding.weight
        self.model, self.mesh = model.eval(), mesh if mesh is not None and mesh.world.size > 1 else None
        cuda = weight.device.type == "cuda"
        dispatchers = [block.ffn.dispatcher for block in model.blocks if isinstance(block.ffn, MoE)]
        reads = any(dispatcher.reads_device(batch) for dispatcher in dispatchers)
        self.static = cuda and self.mesh is None and not reads if static is None else static
        if self.static and self.mesh is not None:
            raise ValueError("generate: static decoding is for one rank, this is one of several")
        if self.static and cuda and reads:
            raise ValueError(
                f"generate: static decoding in baseline mode takes at most {STATIC_TOKENS} sequences, got {batch}"
            )
        self.length = length or context
        self.why_plain = self._why_plain() if not cuda else None
        self.packed = None if cuda or self.why_plain else packing.Packed(model, release=release)
        self.cache = KVCache(model, batch, length or 1, weight.dtype, weight.device)
        self._step: _StaticStep | None = None
        self._capture = capture and cuda
        self._newest: object = None  # the stream that the cache belongs to

    def _why_plain(self) -> str | None:
        """Return why the model's own modules compute on this CPU, or None if packed weights do."""
        if self.mesh is not None:
            return "it is on several ranks"
        return "static steps are asked for" if self.static else packing.why_not(self.model)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | None = None,
        on_piece: Callable[[Piece], None] = lambda _: None,
    ) -> list[Completion]:
        """Return the completions in the order of the prompts; call `on_piece` with each of this data rank's tokens."""
        tokens: dict[int, list[int]] = {}
        finish: dict[int, Finish] = {}
        for piece in self.stream(prompts, sampling):
            tokens.setdefault(piece.prompt, []).append(piece.token)
            if piece.finish:
                finish[piece.prompt] = piece.finish
            on_piece(piece)
        rows = [(i, tokens[i], finish[i]) for i in finish]
        if self.mesh is not None:
            rows = list(itertools.chain.from_iterable(all_gather_json(rows, self.mesh.data)))
        done = {i: Completion(tuple(ids), end) for i, ids, end in rows}
        return [done[i] for i in range(len(prompts))]

    def stream(self, prompts: Sequence[Sequence[int]], sampling: Sampling | None = None) -> Iterator[Piece]:
        """Return an iterator over new tokens, in each turn one of each unfinished sequence.

        A generator has one cache, so that it has one stream at a time: a new stream ends those that began before it.

        Raises:
            ValueError: a prompt is empty, too long, or has an id outside the vocabulary; raised by the call, before the
                first forward pass.
                Raised by the iterator, except in static steps: the model's logits are NaN or infinite.
            RuntimeError: a stream is read after a later one has begun; raised by the iterator.
        """
        sampling = sampling or Sampling()
        ids = [tuple(int(t) for t in p) for p in prompts]
        self._check(ids)
        room = self.length - min(map(len, ids), default=0)  # most new tokens of any prompt
        longest = min(self.length, max(map(len, ids), default=0) + sampling.max_new_tokens)
        count = 0 if sampling.greedy else min(sampling.max_new_tokens, room)
        draws = uniforms(sampling.seed, ids, count).tolist()
        data, ranks = (self.mesh.data.index, self.mesh.data.size) if self.mesh is not None else (0, 1)
        queue = deque(_Sequence(i, ids[i], draws[i]) for i in range(data, len(ids), ranks))
        return self._alone((self._stream_static if self.static else self._stream)(queue, sampling), longest)

    def _alone(self, pieces: Iterator[Piece], longest: int) -> Iterator[Piece]:
        """Yield the pieces of a stream, of sequences up to `longest`; RuntimeError after another stream has begun."""
        mine = self._newest = object()
        if longest > (old := self.cache).length:
            self._step = None  # it reads the old cache
            self.cache = KVCache(self.model, old.slots, longest, old.keys.dtype, old.device)
        del old
        for piece in pieces:
            yield piece
            if self._newest is not mine:
                raise RuntimeError("generate: this stream ended when a later one of the same generator began")

    def _check(self, prompts: list[tuple[int, ...]]) -> None:
        vocab, length = self.model.config.vocab, self.length
        for i, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"generate: prompt {i} is empty; give at least one token")
            if len(prompt) >= length:
                raise ValueError(f"generate: prompt {i} has {len(prompt)} tokens, allowed are at most {length - 1}")
            if min(prompt) < 0 or max(prompt) >= vocab:
                odd = next(t for t in prompt if not 0 <= t < vocab)
                raise ValueError(f"generate: prompt {i} has token {odd}, allowed are 0 to {vocab - 1}")

    # -- dynamic -------------------------------------------------------------------------------------------------------

    def _stream(self, queue: deque[_Sequence], sampling: Sampling) -> Iterator[Piece]:
        alive: list[_Sequence] = []  # in slots 0, 1, ...
        while True:
            fresh = self._admit(queue, self.cache.slots - len(alive))
            prefill, decode = self._any(bool(fresh), bool(alive))
            if not prefill and not decode:
                return
            if decode:
                yield from self._take(alive, *self._decode(alive), sampling)
            if prefill:  # after the decoding step, so that each sequence yields one token per turn
                slots = range(len(alive), len(alive) + len(fresh))
                yield from self._take(fresh, *self._prefill(fresh, slots), sampling)
                alive += fresh
            for slot in reversed(range(len(alive))):
                if self._finish(alive[slot], sampling):
                    last = alive.pop()
                    if slot < len(alive):
                        self.cache.move(len(alive), slot, last.cached)
                        alive[slot] = last

    def _admit(self, queue: deque[_Sequence], room: int) -> list[_Sequence]:
        fresh: list[_Sequence] = []
        tokens = 0
        while queue and len(fresh) < room and (not fresh or tokens + len(queue[0].prompt) <= _PREFILL_TOKENS):
            fresh.append(queue.popleft())
            tokens += len(fresh[-1].prompt)
        return fresh

    def _any(self, *mine: bool) -> list[bool]:
        """Return, for each flag, whether it is set on any rank."""
        if self.mesh is None:
            return list(mine)
        flags = torch.tensor(mine, dtype=torch.int32, device=self.cache.device)
        all_reduce(flags, self.mesh.world, "control", op=dist.ReduceOp.MAX)
        return [bool(f) for f in flags.tolist()]

    @torch.inference_mode()
    def _prefill(self, fresh: list[_Sequence], slots: Sequence[int]) -> packing.Logits:
        """Return the logits after each prompt."""
        if self.packed is not None:
            return self.packed.prefill(self.cache, slots, [s.prompt for s in fresh])
        lengths = [len(s.prompt) for s in fresh]
        tokens = torch.tensor([list(itertools.chain.from_iterable(s.prompt for s in fresh))], dtype=torch.long)
        self.cache.prefill(slots, lengths)
        x_1NM, _ = self.model.hidden_states(tokens.to(self.cache.device), self.cache)
        last = torch.tensor([end - 1 for end in itertools.accumulate(lengths)], dtype=torch.long)
        return _with_likeliest(self.model.head(x_1NM[0, last.to(self.cache.device)]))

    @torch.inference_mode()
    def _decode(self, alive: list[_Sequence]) -> packing.Logits:
        """Return the logits after each sequence's newest token."""
        if self.packed is not None:
            return self.packed.step(self.cache, [s.tokens[-1] for s in alive], [s.cached for s in alive])
        self.cache.decode([s.cached for s in alive])
        tokens = torch.tensor([s.tokens[-1] for s in alive], dtype=torch.long, device=self.cache.device)
        x_B1M, _ = self.model.hidden_states(tokens[:, None], self.cache)
        return _with_likeliest(self.model.head(x_B1M[:, 0]))

    @torch.inference_mode()
    def _take(
        self, sequences: list[_Sequence], logits_BV: Tensor, likeliest_B: Tensor, sampling: Sampling
    ) -> list[Piece]:
        """Choose a token for each sequence and append it."""
        tokens = likeliest_B.tolist()
        if -1 in tokens:
            index = sequences[tokens.index(-1)].index
            raise ValueError(f"generate: prompt {index}: the model's logits of the next token are NaN or infinite")
        if sequences and not sampling.greedy:
            draws = [s.draws[len(s.tokens)] for s in sequences]
            draws_B = torch.tensor(draws, dtype=torch.float64, device=logits_BV.device)
            tokens = choose(logits_BV, draws_B, sampling).tolist()
        return self._keep(sequences, tokens, sampling)

    def _keep(self, sequences: list[_Sequence], tokens: list[int], sampling: Sampling) -> list[Piece]:
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.tokens.append(token)
        return [Piece(s.index, s.tokens[-1], self._finish(s, sampling)) for s in sequences]

    def _finish(self, sequence: _Sequence, sampling: Sampling) -> Finish | None:
        if sequence.tokens[-1] in sampling.stop_tokens:
            return "stop"
        if len(sequence.tokens) == sampling.max_new_tokens:
            return "length"
        return "context" if sequence.cached + 1 == self.length else None

    # -- static --------------------------------------------------------------------------------------------------------

    def _stream_static(self, queue: deque[_Sequence], sampling: Sampling) -> Iterator[Piece]:
        slots: list[_Sequence | None] = [None] * self.cache.slots
        step = self._step
        if step is None or step.sampling != sampling:
            step = self._step = _StaticStep(self.model, self.cache, sampling, self._capture)
        while queue or any(slots):
            alive = {slot: s for slot, s in enumerate(slots) if s is not None}
            free = [slot for slot, s in enumerate(slots) if s is None]
            if alive:
                tokens = step()
                yield from self._keep(list(alive.values()), [tokens[i] for i in alive], sampling)
            if fresh := self._admit(queue, len(free)):
                taken = free[: len(fresh)]
                yield from self._take(fresh, *self._prefill(fresh, taken), sampling)
                for slot, sequence in zip(taken, fresh, strict=True):
                    slots[slot] = sequence
                    step.place(slot, sequence)
            for slot, held in enumerate(slots):
                if held is not None and self._finish(held, sampling):
                    slots[slot] = None


def _with_likeliest(logits_BV: Tensor) -> packing.Logits:
    if not len(logits_BV):
        return logits_BV, logits_BV.new_empty(0, dtype=torch.long)
    largest_B = logits_BV.amax(1)  # of a row with a NaN, that
    return logits_BV, logits_BV.argmax(1).where(largest_B.isfinite(), -1)


class _StaticStep:
    """Run a decoding step of all slots with the state on the device; results of empty slots are ignored."""

    def __init__(self, model: GPT, cache: KVCache, sampling: Sampling, capture: bool) -> None:
        self.model, self.cache, self.sampling, self.capture = model, cache, sampling, capture
        B, device = cache.slots, cache.device
        self.tokens_B1 = torch.zeros(B, 1, dtype=torch.long, device=device)
        self.positions_B, self.count_B1 = torch.zeros_like(self.tokens_B1[:, 0]), torch.zeros_like(self.tokens_B1)
        draws = min(sampling.max_new_tokens, cache.length)
        self.draws_BN = torch.zeros(B, draws, dtype=torch.float64, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None

    def place(self, slot: int, sequence: _Sequence) -> None:
        """Put a sequence that has been prefilled into a slot."""
        self.tokens_B1[slot, 0], self.positions_B[slot], self.count_B1[slot, 0] = (
            sequence.tokens[-1],
            sequence.cached,
            1,
        )
        if sequence.draws:
            self.draws_BN[slot, : len(sequence.draws)] = torch.tensor(sequence.draws, dtype=torch.float64)

    @torch.inference_mode()
    def compute(self) -> None:
        """Compute one step without any transfer between host and device."""
        self.cache.decode_static(self.positions_B)
        x_B1M, _ = self.model.hidden_states(self.tokens_B1, self.cache)
        last = self.draws_BN.shape[1] - 1
        draw_B = self.draws_BN.gather(1, self.count_B1.clamp(max=last))[:, 0]
        self.tokens_B1.copy_(choose(self.model.head(x_B1M[:, 0]), draw_B, self.sampling)[:, None])
        self.positions_B.add_(1).clamp_(max=self.cache.length - 1)
        self.count_B1.add_(1)

    def __call__(self) -> list[int]:
        """Compute one step and return its tokens, one per slot."""
        if not self.capture:
            self.compute()
        else:
            if self.graph is None:
                self.graph = self._capture()
            self.graph.replay()
        return self.tokens_B1[:, 0].tolist()

    def _capture(self) -> torch.cuda.CUDAGraph:
        state = [t.clone() for t in (self.tokens_B1, self.positions_B, self.count_B1)]
        side = torch.cuda.Stream()  # run some steps first, to compile kernels and allocate workspaces outside the graph
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.compute()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.compute()
        # The cache needs no reset: its entries from the warm-up are overwritten with the same values, or never read.
        for now, before in zip((self.tokens_B1, self.positions_B, self.count_B1), state, strict=True):
            now.copy_(before)
        return graph
