import shutil
from dataclasses import replace

import pytest
import torch
from moelab.kernels import permute
from moelab.kernels._compiled import experts, gating

from moelab import kernels
from moelab.config import ParallelConfig, digest
from moelab.data import TrainBatches
from moelab.training import TrainingStopped, compilation, train
from moelab.training.loop import Trainer, Window
from tests.training.test_loop import assert_same_run, stop_at

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@pytest.fixture
def model(tiny_model):
    """A dense layer and a plain MoE layer: each kind of compiled part once."""
    return replace(tiny_model, layers=2, experts=(0, 2), residual=False)


@pytest.fixture
def compiled(tiny_train, tmp_path, monkeypatch):
    """The tiny training, compiled into an empty cache."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    torch.compiler.reset()
    yield replace(tiny_train, compile=True)
    torch.compiler.reset()


@needs_compiler
@pytest.mark.slow
def test_a_compiled_run_resumes_bit_for_bit_and_follows_the_plain_one(model, compiled, data, tmp_path):
    config = replace(compiled, dtype="bf16")
    whole = train(model, config, data, 32, tmp_path / "whole")
    assert list((tmp_path / "compiled").rglob("*.so")), "the code is kept where it was told to be"
    with pytest.raises(TrainingStopped):
        train(model, config, data, 32, tmp_path / "cut", should_stop=stop_at(7))
    torch.compiler.reset()  # as in a new process: what was compiled is read back
    train(model, config, data, 32, tmp_path / "cut")
    assert_same_run(tmp_path / "whole", tmp_path / "cut")
    plain = train(model, replace(config, compile=False), data, 32, tmp_path / "plain")
    assert whole["validation_loss"] == pytest.approx(plain["validation_loss"], abs=0.02)


@needs_compiler
@pytest.mark.slow
def test_a_compiled_step_is_the_plain_one_within_rounding(model, compiled, data):
    model = replace(model, dropout=0.0)
    losses, norms = [], []
    for config in (compiled, replace(compiled, compile=False)):
        trainer = Trainer(model, config, TrainBatches(data, 4, 32, 0), 32)
        done = [trainer.step(step, Window()) for step in range(3)]
        losses.append([d.loss for d in done])
        norms.append([d.grad_norm for d in done])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and norms[0] == pytest.approx(norms[1], rel=1e-4)


@pytest.mark.skipif(kernels.why_not_compiled() is not None, reason=str(kernels.why_not_compiled()))
@pytest.mark.slow
def test_a_routed_layer_is_our_compiled_code_in_training_alone(model, compiled, data, monkeypatch):
    called = []
    places = (gating, "CompiledGate"), (experts, "CompiledExperts")
    for module, name in (*places, (permute, "CompiledDispatch"), (permute, "CompiledCombine")):
        function = getattr(module, name)
        monkeypatch.setattr(module, name, type(name, (function,), {"apply": _recorded(called, name, function.apply)}))
    trainer = Trainer(model, compiled, TrainBatches(data, 4, 32, 0), 32)
    network = trainer.model.module
    network.eval()
    network(torch.zeros(1, 32, dtype=torch.long))
    assert not called
    network.train()
    trainer.step(0, Window())
    assert called == ["CompiledGate", "CompiledDispatch", "CompiledExperts", "CompiledCombine"]


def _recorded(called, name, apply):
    return staticmethod(lambda *arguments: called.append(name) or apply(*arguments))


def test_ids_change_only_where_compile_is_on(tiny_train):
    assert digest(replace(tiny_train, compile=False)) == digest(tiny_train) != digest(replace(tiny_train, compile=True))


def test_what_is_missing_is_one_line(tiny_model, compiled, data, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler, but 'no-such-compiler' is not found"):
        Trainer(tiny_model, compiled, TrainBatches(data, 4, 32, 0), 32)


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"recompute": True}])
def test_layouts_that_change_the_compiled_parts_are_refused(layout, compiled):
    with pytest.raises(ValueError, match="compile knows no tensor slicing, shard or recompute"):
        compilation.compile_parts(None, replace(compiled, device="cuda"), ParallelConfig(**layout))
