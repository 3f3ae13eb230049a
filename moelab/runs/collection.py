"""The runs of one request, as tidy tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from moelab.runs.store import Run

if TYPE_CHECKING:
    import pandas as pd


class Runs(Sequence[Run]):
    """The runs of one `lab.run`, in the order of the specs."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = list(runs)

    def __len__(self) -> int:
        return len(self._runs)

    def __getitem__(self, index):
        return self._runs[index]

    def __iter__(self) -> Iterator[Run]:
        return iter(self._runs)

    @property
    def finished(self) -> Runs:
        """Runs that have a result."""
        return Runs([run for run in self if run.finished])

    @property
    def missing(self) -> Runs:
        """Runs without a result; `status.reason` and `log_tail()` say why."""
        return Runs([run for run in self if not run.finished])

    def explain_missing(self) -> str:
        """One line for each run without a result, and the end of its log; empty when there is none."""
        texts = []
        for run in self.missing:
            status = run.status
            texts.append(
                f"{run.spec.title}, seed {run.spec.train.seed}: {status.state}: {status.reason} "
                f"({run.path / 'log.txt'})"
            )
            if tail := run.log_tail(4):
                texts.append("    " + tail.replace("\n", "\n    "))
        return "\n".join(texts)

    def final(self) -> pd.DataFrame:
        """Return one row per finished run: arm, seed, losses (nats per token), bits per byte, sizes, FLOPs, speed."""
        import pandas as pd

        rows = []
        for run in self.finished:
            r = run.result
            rows.append(
                {
                    "arm": run.spec.title,
                    "model": str(run.spec.model),
                    "seed": run.spec.train.seed,
                    "run": run.spec.id,
                    **{k: r[k] for k in ("tokens", "steps", "validation_loss", "bits_per_byte", "unigram_loss")},
                    **{k: r[k] for k in ("parameters", "active_parameters", "flops_per_token", "seconds")},
                    "tokens_per_s": r["tokens"] / r["seconds"],
                }
            )
        return pd.DataFrame(rows)

    def curves(self, file: str = "validation.jsonl") -> pd.DataFrame:
        """Rows of `validation.jsonl` (or `train.jsonl`) of all runs, with columns arm and seed in front."""
        import pandas as pd

        frames = []
        for run in self:
            frame = run.rows(file)
            if len(frame):
                frame.insert(0, "seed", run.spec.train.seed)
                frame.insert(0, "arm", run.spec.title)
                frames.append(frame)
        return (
            pd.concat(frames, ignore_index=True)
            if frames
            else pd.DataFrame(columns=["arm", "seed", "step", "tokens", "loss"])
        )
