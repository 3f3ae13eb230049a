"""Routing traces: a row for each choice, as the model itself makes it."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from moelab.config import RoutingConfig
from moelab.data.preparation import encode_validation
from moelab.evaluation import traces
from moelab.inference.text import open_model


@pytest.mark.parametrize("routing", [RoutingConfig(drop_tokens=False), RoutingConfig(capacity_factor_eval=0.5)])
def test_every_choice_is_that_of_the_model(routing, exported, text_folder, tmp_path):
    folder = exported(layers=3, experts=(8, 0, 4), top_k=2, routing=routing)
    corpus, out = f"folder:{text_folder}", tmp_path / "new" / "trace.parquet"
    counts = traces.write(folder, out, cache=tmp_path, corpus=corpus, max_tokens=128)
    found = pd.read_parquet(out)
    assert counts == {"tokens": 256, "layers": 2, "rows": len(found)} and len(found) == 256 * 2 * 2
    assert [file.name for file in out.parent.iterdir()] == ["trace.parquet"]
    model, tokenizer = open_model(folder, cache=tmp_path)
    data = replace(traces.IMPORTED, corpus=corpus, context=64)
    for domain, windows in encode_validation(data, tmp_path, tokenizer, 128).items():
        with torch.no_grad():
            routed = model.eval()(torch.from_numpy(windows)).routing
        for layer, of in zip((1, 3), routed, strict=True):
            part = found[(found["domain"] == domain) & (found["layer"] == layer)]
            at = part.sort_values(["sequence", "position", "choice"])
            assert at["expert"].tolist() == of.expert_SK.flatten().tolist()
            assert at["weight"].tolist() == of.weight_SK.flatten().tolist()
            assert at["dropped"].tolist() == (of.slot_SK < 0).flatten().tolist()
            first = at[at["choice"] == 0]
            assert first["token"].tolist() == windows.ravel().tolist()
            assert list(first["text"]) == [tokenizer.decode([token]) for token in windows.ravel().tolist()]
    assert found["dropped"].any() == routing.drop_tokens


def test_a_run_reads_its_own_text(trained, tmp_path, workspace):
    out = tmp_path / "trace.parquet"
    traces.write(trained.path, out, cache=workspace / "data", max_tokens=64)
    found = pd.read_parquet(out)
    assert set(found["domain"]) == {"sea", "field"} and set(found["layer"]) == {2, 4}
    assert found.groupby("layer")["expert"].max().tolist() <= [1, 3]


def test_a_dense_model_and_a_stopped_export_leave_no_file(exported, tmp_path, text_folder, monkeypatch):
    with pytest.raises(ValueError, match="is a dense model, which routes nothing"):
        traces.write(exported(), tmp_path / "trace.parquet", cache=tmp_path)

    def stops(*_):
        yield {"layer": [1]}
        raise KeyboardInterrupt

    monkeypatch.setattr(traces, "choices", stops)
    folder = exported(layers=3, experts=(4, 0, 4), routing=RoutingConfig(drop_tokens=False))
    (old := tmp_path / "out" / "trace.parquet").parent.mkdir()
    old.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        traces.write(folder, old, cache=tmp_path, corpus=f"folder:{text_folder}", max_tokens=64)
    assert old.read_text() == "old" and [file.name for file in old.parent.iterdir()] == ["trace.parquet"]
