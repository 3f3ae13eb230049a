"""`moelab generate`, `eval`, `import`, `export`: use a trained run or a published model."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moelab import paths, terminal
from moelab.cli._options import (
    Out,
    RunOrModel,
    check_choice,
    check_device,
    check_dtypes,
    write_provenance,
)
from moelab.config.parallel import EXCHANGES
from moelab.files import write_text
from moelab.runs.card import model_card
from moelab.runs.store import RunStore

if TYPE_CHECKING:
    from moelab.evaluation.zero_shot import Score

MODES = ("optimised", "baseline")
"""Those of `moelab.inference.modes`, which torch is imported for."""


def generate(
    run: RunOrModel,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="text to continue; repeat for several")] = None,
    ids: Annotated[
        list[str] | None,
        typer.Option("--ids", help="token ids to continue, such as 1,2,3, instead of text; needs no tokenizer"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="tokens at most")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token")] = 0.8,
    top_k: Annotated[int, typer.Option(help="draw from the k likeliest tokens; 0 is all")] = 0,
    top_p: Annotated[float, typer.Option(help="draw from the likeliest tokens of this probability")] = 1.0,
    seed: Annotated[int, typer.Option(help="of the draws")] = 0,
    mode: Annotated[str, typer.Option(help="optimised, or baseline: the paper's PyTorch")] = "optimised",
    dtype: Annotated[str, typer.Option(help="fp32 or bf16")] = "fp32",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    tensor: Annotated[int, typer.Option(help="on ranks: tensor slicing")] = 1,
    expert: Annotated[int, typer.Option(help="on ranks: that share a layer's experts; 0 is as many as can")] = 0,
    expert_slicing: Annotated[int, typer.Option(help="on ranks: that share one expert")] = 1,
    exchange: Annotated[
        str, typer.Option(help="on ranks: flat, hierarchical, coordinated or coordinated-hierarchical")
    ] = "flat",
    gpus_per_node: Annotated[int, typer.Option(help="on ranks: of a node")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="a line of JSON for each prompt, with the settings")] = False,
) -> None:
    """Continue prompts with a trained run.

    Under torchrun or srun, ranks share the model.
    """
    check_device(device)
    check_choice("--mode", mode, MODES)
    check_dtypes([dtype])
    check_choice("--exchange", exchange, EXCHANGES)
    directory = RunStore().find(run)
    if ids and prompt:
        raise ValueError("generate: give --prompt or --ids, not both")
    tokens = [_token_ids(text) for text in ids or ()]
    from moelab.engine.launch import process
    from moelab.inference import Sampling
    from moelab.inference.text import join_ranks, open_ids, open_text

    sampling = Sampling(max_new_tokens, temperature, top_k, top_p, seed)
    prompts: Sequence[Any] = tokens or prompt or [""]
    layout = dict(tensor=tensor, expert=expert, expert_slicing=expert_slicing, exchange=exchange)
    mesh = join_ranks(directory, device, **layout, gpus_per_node=gpus_per_node)
    cache, batch = paths.home() / "data", min(len(prompts), 32)
    opened: dict[str, Any] = dict(mode=mode, dtype=dtype, device=device, batch=batch, mesh=mesh)
    writer: Any = open_ids(directory, **opened) if tokens else open_text(directory, cache=cache, **opened)
    why, rank = (writer if tokens else writer.generator).why_plain, 0 if mesh is None else mesh.rank
    if why and mode == "optimised" and rank == 0:
        terminal.say(
            f"moelab: PyTorch's modules compute this model instead of one C++ call a step: {why}", file=sys.stderr
        )
    if len(prompts) == 1 and mesh is None and not as_json and not tokens:
        pieces = writer.stream(prompts, sampling)  # a prompt that is too long is refused, not printed
        print(prompts[0], end="", flush=True)
        try:
            for _, text in pieces:
                print(text, end="", flush=True)
        finally:  # an error has a line of its own
            print()
        return
    completions = writer.generate(prompts, sampling)
    if mesh is None or mesh.rank == 0:
        given = {"model": directory.resolve().name, "dtype": dtype, "sampling": asdict(sampling)}
        if tokens and as_json:
            lines = [json.dumps(given | {"prompt": p} | asdict(c)) for p, c in zip(prompts, completions, strict=True)]
        elif tokens:
            lines = [",".join(map(str, completion.tokens)) for completion in completions]
        else:
            lines = [json.dumps(given | asdict(text)) if as_json else str(text) for text in completions]
        print(("\n" if as_json or tokens else "\n\n").join(lines))
    process.leave()


def _token_ids(text: str) -> list[int]:
    """Return the ids of ``1,2,3``; ValueError, one line, for anything else."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"generate: --ids {text}: expected token ids between commas, such as 1,2,3") from None


def eval_(
    run: Annotated[
        str,
        typer.Argument(
            help="id of a run, or the beginning of it, or a directory of a run or a model (ours exported, or one that "
            "transformers opens), or "
            "smollm2: a small real model, fetched, to check the pipeline with"
        ),
    ],
    tasks: Annotated[
        str, typer.Option(help="comma-separated: packaged ones (default: all six), or lm-eval's own with a network")
    ] = "",
    limit: Annotated[
        int, typer.Option(help="only the first items of each task, or tokens of validation text; 0 is all")
    ] = 0,
    batch: Annotated[int, typer.Option(help="sequences at a time")] = 16,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16")] = "fp32",
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    losses: Annotated[
        bool,
        typer.Option("--losses", help="instead: a run's validation loss in each mode of inference and dtype, on a CPU"),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="the scores as JSON")] = False,
    out: Out = None,
) -> None:
    """Evaluate a model on zero-shot tasks (the paper's Table 2).

    Prints accuracy, chance, bits per byte and margins; an interrupted evaluation continues with the task at which it
    stopped. With --losses: what rounding changes.
    """
    check_device(device)
    check_dtypes([dtype])
    if losses:
        if tasks or (batch, dtype, device) != (16, "fp32", "cpu"):
            raise ValueError(
                "eval: --losses compares all dtypes on a CPU, so it takes no --tasks, --batch, --dtype or --device"
            )
        _losses(RunStore().find(run), limit, as_json, out)
        return
    from moelab.experiments.zero_shot_reference import REFERENCE, save

    directory = None if run == REFERENCE else RunStore().find(run)
    from moelab.evaluation.models import reference_directory
    from moelab.evaluation.zero_shot import PACKAGED, evaluate

    wanted = tuple(dict.fromkeys(name for name in map(str.strip, tasks.split(",")) if name)) or PACKAGED
    options: dict[str, Any] = dict(cache=paths.home() / "data", limit=limit, batch=batch, dtype=dtype, device=device)
    directory = directory or reference_directory(options["cache"])
    with terminal.task_progress() as show:
        scores = evaluate(directory, wanted, **options, on_progress=show)
    if out is not None:
        save(scores, out, run if run == REFERENCE else directory.resolve().name, options)
    if as_json:
        print(json.dumps([asdict(score) for score in scores], indent=2))
        return
    _show(scores)


def _show(scores: Sequence[Score]) -> None:
    """Print scores as a table."""
    view = terminal.table("task", "accuracy %", "chance %", "always %", "n", "bits/byte", "margin", "cut")
    for s in scores:
        view.add_row(
            s.task + ("*" if s.stand_in else ""),
            f"{100 * s.accuracy:.1f} ± {100 * s.standard_error:.1f}",
            f"{100 * s.chance:.1f}",
            "–" if s.majority is None else f"{100 * s.majority:.1f}",
            str(s.n),
            f"{s.bits_per_byte:.3f}",
            "–" if s.margin is None else f"{s.margin:+.3f}",
            "–" if s.cut is None else f"{s.cut / s.requests:.0%}",
        )
    console = terminal.console()
    console.print(view)
    console.print(
        "±: one standard error over the items. Always: accuracy of always choosing the place that is right most often. "
        "Bits per byte: of the right answers, given their questions. Margin: bits per byte by which these are likelier "
        "than the wrong ones. Cut: share of requests whose beginning was cut off to fit the model's context. "
        "*: stands in for the paper's data set."
    )


def _losses(run: Path, tokens: int, as_json: bool, out: Path | None) -> None:
    """Print, and with `out` write, a run's validation loss by mode of inference and dtype."""
    from moelab.evaluation import rounding

    rows = rounding.measure(run, tokens, paths.home() / "data")
    if out is not None:
        write_text(out / f"losses-{run.name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        title = f"Validation losses by mode of inference and dtype: {run.name}"
        write_provenance(out, f"losses-{run.name}", title)
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    rounding.show(rows)


def import_(
    source: Annotated[
        str, typer.Argument(help="directory of a model in Hugging Face's manner, or the name of a published one")
    ],
    directory: Annotated[Path, typer.Argument(help="new directory")],
) -> None:
    """Convert a published model to moelab's format.

    OLMoE, Mixtral, Qwen2-MoE, Qwen3-MoE and GPT-2, from safetensors files only.
    """
    if not Path(source).is_dir() and not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise ValueError(f"import: there is no folder {source!r}; a published model is named as OWNER/NAME")
    _check_new("import", directory)
    from moelab.engine.checkpoint import hf

    folder = Path(source) if Path(source).is_dir() else hf.fetch(source)
    with terminal.working(f"converting {source}"):
        config = hf.convert(folder, directory, name=Path(source).name)
    sizes = map(terminal.short, (config.parameters(), config.active_parameters()))
    terminal.say("{}: {} parameters, {} active for a token, in {}".format(config, *sizes, directory))
    if not (directory / "tokenizer.json").is_file():
        terminal.say(
            "it has no tokenizer.json: generate takes token ids (--ids 1,2,3); until that file is put into "
            f"{directory}, generate --prompt, eval and trace refuse the model"
        )


def export(
    run: RunOrModel,
    directory: Annotated[Path, typer.Argument(help="new directory")],
    format: Annotated[
        str, typer.Option(help="gpt2, olmoe, mixtral, qwen2_moe, qwen3_moe or moelab; default: the one that fits")
    ] = "",
    dtype: Annotated[
        str | None, typer.Option(help="of a run's weights: fp32 (default) or bf16; a model's keep theirs")
    ] = None,
) -> None:
    """Write weights and tokenizer for other libraries.

    As safetensors, in a format that transformers opens if one fits the model, else in moelab's own; of a finished run
    also a model card.
    """
    check_dtypes([dtype or "fp32"])
    source = RunStore().find(run)
    if dtype and not (source / "spec.json").is_file():
        raise ValueError(f"export: --dtype is for the weights of runs; {source} is a model, whose weights keep theirs")
    _check_new("export", directory)
    from moelab.data.preparation import prepare
    from moelab.engine.checkpoint import hf
    from moelab.inference.text import load_run, run_configs

    with terminal.working(f"writing {directory}"):
        if not (source / "spec.json").is_file():
            config = hf.read_config(source)
            hf.check_format(kind := format or hf.suitable_format(config), config)
            hf.convert(source, directory, kind)
        else:
            config, of_data = run_configs(source)
            hf.check_format(kind := format or hf.suitable_format(config), config)
            data = prepare(of_data, paths.home() / "data")
            model = load_run(source, data=data, dtype=dtype or "fp32")
            finished = (source / "result.json").is_file()
            card = model_card(source, directory.name, dtype or "fp32") if finished else ""
            hf.export(model, directory, data.tokenizer(), kind)
            if card:
                write_text(directory / "README.md", card)
    terminal.say(f"{config}: {kind} format in {directory}")


def _check_new(command: str, directory: Path) -> None:
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{command}: {directory} exists; choose a new directory")
