"""The numbers of finished runs, to pass on without their weights: `moelab runs export` and `moelab runs import`.

A run's record holds what it left beside its checkpoints: spec, result, provenance, metrics, and what was measured with
its weights. Training rows give percentiles of the experts' load; only the last one gives every expert's load, which
would be two thirds of the bytes. `results/runs` has a pack for each model, `<model>.zip`, with the records of its runs,
`<id>.zip`. Who takes them over can ask the experiments for more seeds or arms and trains only those; figures and
verdicts come out as from runs trained here. What needs weights (generating, new evaluations, distilling from the run)
does not work with them. Any zip program opens a record, and loading one executes nothing.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from filelock import FileLock

from moelab import paths
from moelab.files import write_bytes
from moelab.runs import evaluations
from moelab.runs.measurements import EVALUATIONS
from moelab.runs.spec import RunSpec
from moelab.runs.states import Status
from moelab.runs.store import Run, RunStore, check_result
from moelab.terminal import one_line

FILES = ("spec.json", "provenance.json", "train.jsonl", "validation.jsonl", "status.json", "result.json")
"""What a record holds; the result comes last, because a run that has one counts as finished."""

MEASURED = re.compile(rf"{EVALUATIONS}/\w[\w.-]*\.json")
"""Further files that a record may hold, see `moelab.runs.evaluations`."""

Archive = Path | zipfile.Path
"""A record: a file, or one inside a pack."""

MAX_BYTES = 64 << 20
"""Bytes that the files of a record may have together."""
PACKED = 16 << 20
"""Bytes that a record may have."""
MAX_FILES = 256
"""Files that a record may hold."""

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same run is the same archive


def folder(*, publish: bool = True) -> Path:
    """Return where records are: those of the published results, or the user's own."""
    return paths.results_for(publish) / "runs"


def write(runs: Sequence[Run], directory: Path, left_out: list[str] | None = None) -> list[Path]:
    """Pack the records of finished runs, a zip for each model in a directory; the other records in it stay.

    Args:
        left_out: gets a line for each run whose record nobody could take over, and why; without it that is raised.

    Raises:
        ValueError: one line: a run is not finished or a file of it is damaged, or a zip that is there is damaged.
    """
    packs: dict[str, dict[str, bytes]] = {}
    for run in runs:
        model = run.spec.id.rpartition("-")[0].rpartition("-")[0]  # without seed and hash
        try:
            packs.setdefault(model, {})[f"{run.spec.id}.zip"] = _packed(run)
        except ValueError as error:
            if left_out is None:
                raise
            left_out.append(str(error))
    if not packs:
        return []
    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(directory / ".lock"):  # another export that had read a pack before would write it without these
        return [_merged(directory / f"{model}.zip", records) for model, records in packs.items()]


def _merged(path: Path, records: dict[str, bytes]) -> Path:
    """Write a pack with these records and the others that it has; ValueError, one line, if it is damaged."""
    if (there := archives_in(path)) == [path]:  # taken for a record, as it cannot be read as a pack
        raise ValueError(f"{path}: damaged; restore or remove it")
    try:
        records = {archive.name: archive.read_bytes() for archive in there if archive.name not in records} | records
    except (zipfile.BadZipFile, zlib.error, OSError) as error:
        raise ValueError(f"{path}: damaged ({one_line(error)}); restore or remove it") from None
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as pack:  # records lie as they are, so that git keeps what was added alone
        for name, data in sorted(records.items()):
            pack.writestr(zipfile.ZipInfo(name, _EPOCH), data)
    write_bytes(path, whole.getvalue())
    return path


def archives_in(source: Path) -> list[Archive]:
    """Return the records in a folder, in a pack, or the one that a file is; none if it is missing."""
    archives: list[Archive] = []
    for path in sorted(source.glob("*.zip")) if source.is_dir() else [source] if source.exists() else []:
        try:
            with zipfile.ZipFile(path) as pack:
                names = pack.namelist()
        except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):  # damaged: zipfile raises any of these
            names = []
        named = [name for name in names if "/" not in name and name.endswith(".zip")]
        root = zipfile.Path(str(path)) if named and len(named) == len(names) else None
        inner = [root / name for name in named] if root else []  # which all read one list of names
        archives += inner or [path]
    return archives


def _packed(run: Run) -> bytes:
    """Return a finished run's record; ValueError, one line, where `read` would refuse it."""
    if not run.finished:
        raise ValueError(f"run {run.spec.id}: not finished ({run.status.state}); only finished runs are passed on")
    content: dict[str, bytes] = {}
    for name in (*(str(file.relative_to(run.path)) for file in evaluations.files(run)), *FILES):
        if name == "status.json" and Status.read(run.path) is None:
            continue  # missing, or torn by a crash, which nobody could take over
        if (file := run.path / name).exists():
            own = name == "provenance.json"  # as the run tells it: without names of hosts
            content[name] = (json.dumps(run.provenance, indent=2) + "\n").encode() if own else file.read_bytes()
    _checked(content, run.path.name, str(run.path))
    if rows := content.get("train.jsonl"):
        content["train.jsonl"] = _without_loads(rows)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, data in content.items():
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    if max(len(content) - MAX_FILES, sum(map(len, content.values())) - MAX_BYTES, packed.tell() - PACKED) > 0:
        raise ValueError(
            f"{run.path}: its record would have more than {MAX_FILES} files, or than {MAX_BYTES >> 20} MiB in all "
            f"({PACKED >> 20} MiB packed), which no import takes; train.log_every makes fewer rows"
        )
    return packed.getvalue()


def _without_loads(rows: bytes) -> bytes:
    """Return the rows of `train.jsonl` without each expert's load where percentiles say it; the last row keeps it."""
    from moelab.training.metrics import parse_rows

    parsed = parse_rows(rows, "train.jsonl")
    for row in parsed[:-1]:
        if "load_percentiles" in row:
            row.pop("expert_load", None)
    return "".join(json.dumps(row) + "\n" for row in parsed).encode()


def read(archive: Archive, store: RunStore) -> Run | None:
    """Take a record over into a store; None when the store has begun that run itself.

    The run has begun there when it is finished, has a checkpoint, or is being trained. What it has is never replaced.
    If it has the record's result, it takes over what it lacks of what was measured with the weights, and without
    weights of its own also what was measured later.

    Raises:
        ValueError: one line: not a record, damaged, or of a run that this version of moelab would call differently.
    """
    content = _content(archive)
    spec = _checked(content, archive.stem, str(archive))
    run = Run(spec, store.root / spec.id)
    if _begun(run):  # asked first without the lock, which a read-only store cannot give
        if run.finished and (run.path / "result.json").read_bytes() == content["result.json"]:
            for name in (name for name in content if name not in FILES):
                if evaluations.is_new(run, run.path / name, json.loads(content[name])):
                    write_bytes(run.path / name, content[name])
        return None
    lock = run.lock()
    try:
        lock.acquire(timeout=2)  # whoever looks at the status holds it for a moment
    except TimeoutError:  # it is being trained
        return None
    try:
        if _begun(run):
            return None
        run.recorded.moved("import")  # raises where the states of a run do not allow it
        for name, data in content.items():
            write_bytes(run.path / name, data, durable=name == "result.json")
        # Who began it here did not train what it has now.
        (run.path / "holder.json").unlink(missing_ok=True)
        shutil.rmtree(run.path / "prefix", ignore_errors=True)
    finally:
        lock.release()
    Path(lock.lock_file).unlink(missing_ok=True)  # who waited for it finds the run finished, with or without the file
    return run


def published() -> dict[str, Archive]:
    """Return run id -> record, of the published runs."""
    return {archive.stem: archive for archive in archives_in(folder())}


def not_published(names: Sequence[str], store: RunStore) -> list[str]:
    """Return those of some finished runs whose published record is missing or lacks numbers that they have now.

    A record has what was measured with the weights before it was packed.
    """
    there, late = published(), list[str]()
    for name in names:
        run = Run.at(store.root / name)
        files = (*evaluations.files(run), run.path / "result.json")
        content = {str(file.relative_to(run.path)): file.read_bytes() for file in files}
        if name not in there or _values(_content(there[name], list(content))) != _values(content):
            late.append(name)
    return late


def _values(content: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the numbers in files: a result, and what was measured without when and by which code."""
    return {name: record.get("value", record) for name, record in ((n, json.loads(d)) for n, d in content.items())}


def glance(archive: Archive) -> tuple[RunSpec, dict[str, Any]]:
    """Return the spec and the result of a record; ValueError as for `read`."""
    content = _content(archive, ("spec.json", "result.json"))
    try:
        spec, result = (json.loads(content[name]) for name in ("spec.json", "result.json"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{archive}: unreadable ({error})") from None
    check_result(result, f"{archive}: result.json")
    return RunSpec.from_json(spec, where=f"{archive}: spec.json"), result


def _checked(content: Mapping[str, bytes], name: str, where: str) -> RunSpec:
    """Check the files of a record and return their spec; ValueError, one line, for a damaged one.

    Args:
        name: by which the run is known; a copy under another name would pass for the run itself.
        where: what messages begin with.
    """
    for file, data in content.items():
        try:
            if file.endswith(".json") and not isinstance(json.loads(data), dict):
                raise ValueError("no object")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: unreadable ({file}: {str(error) or type(error).__name__})") from None
    from moelab.training.metrics import TRAIN, VALIDATION, parse_rows  # imports numpy, which the help does without

    check_result(json.loads(content["result.json"]), f"{where}: result.json")
    for file in (TRAIN, VALIDATION):
        parse_rows(content.get(file, b""), f"{where}: {file}")
    spec = RunSpec.from_json(json.loads(content["spec.json"]), where=f"{where}: spec.json")
    if spec.id != name:
        raise ValueError(
            f"{where}: the run it describes is called {spec.id} here: a copy, renamed, or of another version"
        )
    return spec


def _begun(run: Run) -> bool:
    return run.finished or (run.path / "checkpoints").exists()


def _content(archive: Archive, wanted: Sequence[str] | None = None) -> dict[str, bytes]:
    """Return the files of a record by name; never more than MAX_BYTES in all, whatever the archive says of their sizes.

    Args:
        wanted: names of files; None is all.

    Raises:
        ValueError: one line: not a record, or it cannot be read.
    """
    content: dict[str, bytes] = {}
    try:
        if isinstance(archive, Path):
            size = archive.stat().st_size
        else:
            size = cast(zipfile.ZipFile, archive.root).getinfo(archive.at).file_size
        if size > PACKED:
            raise ValueError(f"{archive}: larger than {PACKED >> 20} MiB")
        with archive.open("rb") as opened, zipfile.ZipFile(opened) as packed:
            entries = {entry.filename: entry for entry in packed.infolist()}
            if len(packed.infolist()) > MAX_FILES or sum(entry.file_size for entry in packed.infolist()) > MAX_BYTES:
                raise ValueError(f"{archive}: more than {MAX_FILES} files, or than {MAX_BYTES >> 20} MiB in all")
            measured = [name for name in entries if MEASURED.fullmatch(name)]
            if not {"spec.json", "result.json"} <= set(entries) <= {*FILES, *measured}:
                raise ValueError(f"{archive}: not a run's record; one holds {', '.join(FILES)}, {EVALUATIONS}/")
            for name in (n for n in (*measured, *FILES) if n in entries and (wanted is None or n in wanted)):
                if entries[name].compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise ValueError(f"{archive}: {name} is packed by another method than deflate")
                with packed.open(entries[name]) as file:
                    content[name] = file.read(entries[name].file_size + 1)
    # zipfile raises a RuntimeError for an encrypted file.
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, UnicodeError, RuntimeError) as error:
        raise ValueError(f"{archive}: unreadable ({one_line(error)})") from None
    return content
