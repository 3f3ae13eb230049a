"""A part of a model from a user's file: what it may be, that models have it while it is installed, and no longer."""

import pytest
import torch

from moelab.config import ModelConfig, RoutingConfig
from moelab.experiments import parts
from moelab.models import build

SIZES = dict(layers=2, hidden=16, heads=2, experts=(0, 4), vocab=32, context=16, init_std=0.2)

FILES = {
    "scores": "def scores(logits_SE):\n    return 1 + logits_SE.sigmoid()\n",
    "loss": "import torch\ndef loss(logits_SE, routing):\n    return logits_SE.square().mean()\n",
    "noise": "def noise(logits_SE):\n    return -logits_SE\n",
    "activation": "def helper(p):\n    return p.relu()\n\ndef activation(p):\n    return helper(p) ** 2\n",
    "Router": """
from moelab.models.moe import Router

class Cold(Router):
    def logits(self, x_SM):
        return 10 * super().logits(x_SM)
""",
    "Experts": """
from moelab.models.moe import Experts

class Negative(Experts):
    def forward(self, rows_RM, offsets_E1):
        return -super().forward(rows_RM, offsets_E1)
""",
    "MoE": """
from torch import nn
from moelab.models.moe import MoE

class Scaled(MoE):
    def __init__(self, config, experts):
        super().__init__(config, experts)
        self.scale_bias = nn.Parameter(__import__("torch").empty(()))

    def forward(self, x):
        y, routing = super().forward(x)
        return (1 + self.scale_bias) * 0.5 * y, routing
""",
}


def outputs(routing):
    """Loss and gradient of a small model in training."""
    model = build(ModelConfig(**SIZES, routing=routing), 0).train()
    torch.manual_seed(0)
    tokens = torch.arange(32).view(2, 16)
    out = model(tokens, targets_BT=tokens)
    total = out.loss + out.routing_loss()
    total.backward()
    return float(total.detach()), model.blocks[0].ffn.up.weight.grad.clone()


@pytest.mark.parametrize("kind", FILES)
def test_models_have_the_part_while_it_is_installed_and_learn(kind, tmp_path):
    (file := tmp_path / "mine.py").write_text(FILES[kind])
    part = parts.load(file)
    assert part.kind == kind and part.text == FILES[kind]
    changed = {name.removeprefix("model.routing."): value for name, value in part.settings.items()}
    routing = RoutingConfig(drop_tokens=False, **changed)
    before, gradient = outputs(routing)
    with parts.installed(part):
        within, other = outputs(routing)
    assert within != before and other.isfinite().all() and other.any()
    after, same = outputs(routing)
    assert after == before and torch.equal(same, gradient), "nothing is left on"


def test_the_gradient_of_a_users_activation_is_that_of_its_function(tmp_path):
    (file := tmp_path / "mine.py").write_text(FILES["activation"])
    config = ModelConfig(**{**SIZES, "experts": (4, 4)}, routing=RoutingConfig(drop_tokens=False))
    with parts.installed(parts.load(file)):
        model = build(config, 0)
        experts, x = model.blocks[0].ffn.experts, torch.randn(6, 16, requires_grad=True)
        out = experts(x, torch.tensor([0, 6, 6, 6, 6], dtype=torch.int32))
        out.sum().backward()
    at = x.detach().requires_grad_()
    expected = (at @ experts.up[0] + experts.up_bias[0]).relu() ** 2 @ experts.down[0] + experts.down_bias[0]
    expected.sum().backward()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(x.grad, at.grad)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\n", "expected one part, found none"),
        (FILES["scores"] + FILES["noise"], "expected one part, found scores, noise"),
        ("from moelab.models.moe import MoE\n", "found none"),
        ("1 / 0\n", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_file_that_defines_no_part_is_told_in_one_line(text, said, tmp_path):
    (file := tmp_path / "mine.py").write_text(text)
    with pytest.raises(ValueError, match=said) as error:
        parts.load(file)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_told_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"^--file: .*nowhere.py does not exist$"):
        parts.load(tmp_path / "nowhere.py")
    (tmp_path / "text.txt").write_text("")
    with pytest.raises(ValueError, match=r"its name must end in \.py"):
        parts.load(tmp_path / "text.txt")


def test_a_changed_file_has_runs_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("MOELAB_HOME", str(tmp_path / "home"))
    (file := tmp_path / "mine.py").write_text(FILES["noise"])
    first = parts.load(file)
    file.write_text(FILES["noise"].replace("-logits_SE", "2 * logits_SE"))
    second = parts.load(file)
    assert first.folder() != second.folder() and first.folder().is_relative_to(tmp_path / "home")
    second.keep()
    assert (second.folder() / "part.py.txt").read_text() == file.read_text()
