"""Implement lm-eval's model interface: `RunLM` scores and continues texts in batches, and stores the answers.

Texts are tokenized as in lm-eval's own wrapper of transformers models, so that equal weights give equal scores
(tested): a context's trailing spaces go to the continuation, an empty context is the end-of-text token, and a context
that is too long for the model loses its beginning. Needs the extra `eval`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch.nn.utils.rnn import pad_sequence

from moelab.data.tokenizer import Tokenizer
from moelab.evaluation.models import LanguageModel
from moelab.evaluation.requests import Requests

MAX_NEW_TOKENS = 256
"""Bound on a continuation's tokens if the task sets none, as in lm-eval."""


class RunLM(TemplateLM):
    """Provide a model and its tokenizer through lm-eval's interface.

    Args:
        model: see `moelab.evaluation.models`.
        tokenizer: the model's; it may have no more entries than the model's embedding (ValueError).
        batch: number of sequences at a time.
        requests: store of answers; stored ones are not computed again.

    Attributes:
        cut: number of requests so far whose context lost its beginning, computed or stored.
        on_progress: called with (requests done, all requests) after each batch.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        *,
        batch: int = 16,
        requests: Requests | None = None,
    ) -> None:
        super().__init__()
        if batch < 1:
            raise ValueError(f"eval: batch must be at least 1, got {batch}")
        if tokenizer.vocab_size > model.vocab:
            raise ValueError(
                f"eval: the tokenizer has {tokenizer.vocab_size} entries, the model's embedding only {model.vocab}"
            )
        self.model, self.texts, self.batch = model, tokenizer, batch
        self.answers = Requests() if requests is None else requests  # not `or`: an empty store is falsy
        self.on_progress: Callable[[int, int], None] = lambda done, total: None
        self.cut = 0
        self._device = str(model.device)
        self._stops: dict[tuple[str, ...], list[int]] = {}

    @property
    def eot_token_id(self) -> int:
        """Return the id of the end-of-text token."""
        return self.texts.eot

    @property
    def max_length(self) -> int:
        """Return the model's context in tokens."""
        return self.model.context

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the token ids of a text; no special tokens are added."""
        return self.texts.encode(string)

    # -- scores --------------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence, disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Return (log-probability in nats, whether every token was the likeliest) of each continuation.

        Args:
            requests: (texts, context ids, continuation ids) of each.
        """
        pieces = [list(self._windows(context, continuation)) for _, context, continuation in requests]
        scored = iter(self._scores([piece for windows in pieces for piece in windows]))
        sums = []
        for windows in pieces:
            parts = [next(scored) for _ in windows]
            sums.append((sum(p[0] for p in parts), all(p[1] for p in parts)))
        return sums

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of whole texts in nats; each window of the model's context scores new tokens."""
        windows = [
            [make_disjoint_window(w) for w in self._rolling(self.tok_encode(request.args[0]), self.prefix_token_id)]
            for request in requests
        ]
        scored = iter(self._scores([piece for text in windows for piece in text]))
        return [sum(next(scored)[0] for _ in text) for text in windows]

    def _windows(self, context: list[int], continuation: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        """Yield one (context, continuation) window, or several if the continuation exceeds the model's context."""
        if len(continuation) <= self.max_length:
            self.cut += len(context) + len(continuation) > self.max_length + 1
            yield context, continuation
            return
        self.cut += 1
        yield from map(make_disjoint_window, self._rolling(continuation, context[-1]))

    def _rolling(self, tokens: list[int], prefix: int) -> Iterator[tuple[list[int], list[int]]]:
        return get_rolling_token_windows(
            token_list=tokens, prefix_token=prefix, max_seq_len=self.max_length, context_len=1
        )

    def _scores(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Return the scores of (context, continuation) token pairs.

        Scores that are not stored are computed in batches of similar length, the longest first.
        """
        keys = [Requests.key("score", context[-self.max_length :], continuation) for context, continuation in pairs]
        missing = {key: pair for key, pair in zip(keys, pairs, strict=True) if self.answers.get(key) is None}
        todo = sorted(missing.items(), key=lambda item: -len(item[1][0]) - len(item[1][1]))
        for start in range(0, len(todo), self.batch):
            part = todo[start : start + self.batch]
            self.answers.put(dict(zip((key for key, _ in part), self._score([pair for _, pair in part]), strict=True)))
            self.on_progress(len(pairs) - len(todo) + start + len(part), len(pairs))
        return [tuple(self.answers.get(key)) for key in keys]

    @torch.inference_mode()
    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        texts = [tuple((context + wanted)[-self.max_length - 1 : -1]) for context, wanted in pairs]
        # Pairs with the same context and one-token answers share one input.
        rows = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        # Padding is on the right, so that no token of a text attends to it.
        tokens_BT = pad_sequence([torch.tensor(text) for text in rows], batch_first=True).to(self.device)
        x_BTM = self.model.hidden_states(tokens_BT)
        lengths = [len(wanted) for _, wanted in pairs]
        # The head only computes the rows that predict the continuations.
        rows_NM = torch.cat(
            [x_BTM[rows[text], len(text) - n : len(text)] for text, n in zip(texts, lengths, strict=True)]
        )
        wanted_N = torch.tensor([t for _, wanted in pairs for t in wanted], device=self.device)
        logits_NV = self.model.head(rows_NM).float()[:, : self.texts.vocab_size]
        chosen_N = logits_NV.log_softmax(1).gather(1, wanted_N[:, None])[:, 0].double()
        best_N = logits_NV.argmax(1) == wanted_N
        return [
            (float(chosen.sum()), bool(best.all()))
            for chosen, best in zip(chosen_N.split(lengths), best_N.split(lengths), strict=True)
        ]

    # -- continuations -------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the greedy continuation of each context up to the first of its stop texts.

        Raises:
            ValueError: the task requires random sampling, which is not supported.
        """
        keys = []
        missing: dict[tuple[tuple[str, ...], int], dict[str, list[int]]] = {}
        for request in requests:
            context, settings = request.args
            until, limit = self._settings(settings)
            tokens = self.tok_encode(context) or [self.prefix_token_id]
            room = self.max_length - limit
            self.cut += len(tokens) > room
            keys.append(Requests.key("continue", tokens[-room:], until, limit))
            if self.answers.get(keys[-1]) is None:
                missing.setdefault((until, limit), {})[keys[-1]] = tokens[-room:]
        left = sum(map(len, missing.values()))
        for (until, limit), prompts in missing.items():
            names = sorted(prompts, key=lambda name: -len(prompts[name]))
            for start in range(0, len(names), 4 * self.batch):
                part = names[start : start + 4 * self.batch]
                texts = self._continue([prompts[name] for name in part], until, limit)
                self.answers.put(dict(zip(part, texts, strict=True)))
                left -= len(part)
                self.on_progress(len(requests) - left, len(requests))
        return [self.answers.get(key) for key in keys]

    def _settings(self, settings: dict[str, Any]) -> tuple[tuple[str, ...], int]:
        """Return (stop texts, bound on new tokens); the bound is at most half the model's context."""
        if settings.get("do_sample") or settings.get("temperature"):
            raise ValueError(f"eval: only tasks that take the likeliest text can be run, this one wants {settings}")
        until = settings.get("until") or []
        until = tuple(filter(None, [until] if isinstance(until, str) else until))
        limit = int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or MAX_NEW_TOKENS)
        return until, min(limit, self.max_length // 2)

    def _continue(self, prompts: Sequence[list[int]], until: tuple[str, ...], limit: int) -> list[str]:
        # A token that contains a stop text ends the sequence; a stop text of several tokens is removed below.
        if until not in self._stops:
            every = range(self.texts.vocab_size)
            self._stops[until] = [t for t in every if any(u in self.texts.decode([t]) for u in until)]
        texts = []
        for tokens in self.model.likeliest(prompts, limit, self._stops[until], self.batch):
            text = self.texts.decode(tokens)
            for stop in until:
                text = text.partition(stop)[0]
            texts.append(text)
        return texts
