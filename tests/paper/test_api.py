"""Loading, errors, frames."""

import dataclasses

import pandas
import pytest

from moelab import paper
from moelab.paper import _table


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: paper.model("350M+MOE-129"), "unknown model '350M+MOE-129'; did you mean 350M+MoE-128"),
        (lambda: paper.model("?"), "unknown model '?'; known: 350M, 1.3B"),
        (lambda: paper.loss_curve("350M+MoE-32"), "unknown model '350M+MoE-32'; did you mean"),
        (lambda: paper.training_settings("8B+MoE-128"), "unknown run '8B+MoE-128'"),
        (lambda: paper.claim("pr-moe-sizes"), "unknown claim 'pr-moe-sizes'; did you mean pr-moe-size"),
        (lambda: paper.claims("prmoe"), "unknown experiment 'prmoe'; did you mean pr-moe"),
        (lambda: paper.conflict("table-6-layers"), "did you mean table6-layers"),
        (lambda: paper.zero_shot("350M+MoE-12"), "did you mean 350M+MoE-128"),
        (lambda: paper.zero_shot(corpus="c4"), "unknown corpus 'c4'"),
        (lambda: paper.inference_results(figure="fig-1"), "did you mean fig-1"),
    ],
)
def test_unknown_names(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_read_only():
    row = paper.model("350M")
    with pytest.raises(dataclasses.FrozenInstanceError):
        row.layers = 3
    assert isinstance(paper.models(), tuple) and paper.models() is paper.models()
    assert all(paper.model("350M+PR-MoE-32/64+L21" + suffix).layers == 21 for suffix in ("", "+KD", "+MoS"))
    assert {row.base for row in paper.models().where(residual=True)} == {"350M", "1.3B"}


def test_frames():
    frame = paper.models().frame()
    assert len(frame) == len(paper.models()) and frame.set_index("model").loc["6.7B", "layers"] == 32
    assert pandas.api.types.is_float_dtype(frame["stated_B"])
    assert list(paper.loss_curve("350M").frame().columns) == ["model", "tokens_B", "loss", "uncertainty"]
    assert len(paper.claims("pr-moe").frame()) == len(paper.claims("pr-moe"))
    assert paper.Table().frame().empty


def test_bad_files_name_the_line(tmp_path, monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Row:
        name: str
        size: int | None
        parts: tuple[int, ...]
        flag: bool

    monkeypatch.setattr(_table.resources, "files", lambda package: tmp_path)

    def read(text):
        (tmp_path / "rows.csv").write_text(text)
        _table.load.cache_clear()
        return _table.load("rows.csv", Row)

    assert read("name,size,parts,flag\na,,1 2,yes\n") == (Row("a", None, (1, 2), True),)
    for text, message in {
        "name,size,parts,flag\na,about 3,,no\n": "rows.csv, line 2: size cannot be 'about 3'",
        "name,size,parts,flag\na,3,,maybe\n": "rows.csv, line 2: flag cannot be 'maybe'",
        "name,size,parts,flag\na,3\n": "line 2: wrong number of cells",
        "name,parts,flag\na,3,no\n": r"columns \['size'\] do not match",
    }.items():
        with pytest.raises(ValueError, match=message):
            read(text)
