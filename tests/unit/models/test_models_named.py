"""A network by its name alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vpdeploy.errors import ModelError
from vpdeploy.models.build import check_forward
from vpdeploy.models.named import model_from
from vpdeploy.models.published import PublishedInput

NET = """
from torch import nn

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.body, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, classes)
    def forward(self, x):
        return self.fc(self.body(x).mean((2, 3)))

def ten(): return Net(10).half().requires_grad_(False)
def body(): return nn.ReLU()
def number(): return 3
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch) -> Path:
    (tmp_path / "own_nets.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(("name", "classifier", "classes", "size"), [
    ("cifar_resnet8", "linear", 10, 32),
    ("torchvision:squeezenet1_1", "classifier.1", 1000, 224),
    ("torchvision:inception_v3", "fc", 1000, 299),
    ("timm:resnet10t", "fc", 1000, 176),
    ("timm:vit_small_patch14_dinov2", "head", 1, 518),
    ("own_nets.py:Net", "fc", 1000, 224),
    ("own_nets.py:ten", "fc", 10, 224),
    ("~/own_nets.py:ten", "fc", 10, 224),
    ("own_nets:ten", "fc", 10, 224),
])  # fmt: skip
def test_names(place, name, classifier, classes, size):
    found = model_from(name)
    assert (found.classifier, found.classes, found.input.image_size) == (classifier, classes, size)
    assert not found.backbone.training
    assert {(p.dtype, p.requires_grad, p.device.type) for p in found.backbone.parameters()} == {
        (torch.float32, True, "cpu")
    }
    if size < 500:
        check_forward(found.backbone, canvas_size=size, classes=classes)


def test_it_is_the_same_network_every_time(place):
    states = []
    for _ in range(2):
        torch.rand(3)
        states.append(model_from("own_nets.py:Net").backbone.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_the_input_is_the_publishers():
    half = (0.5, 0.5, 0.5)
    assert model_from("timm:vit_tiny_patch16_224").input == PublishedInput(224, half, half)


@pytest.mark.parametrize(("name", "begins"), [
    ("", "model.name: got ''; expected a built-in network, 'torchvision:NAME', 'timm:NAME', "),
    ("resnet18", "model.name: got 'resnet18'; expected a built-in network, "),
    ("torchvision:resnet19", "model.name: got 'torchvision:resnet19'; torchvision has no such classifier"),
    ("timm:resnet19", "model.name: got 'timm:resnet19'; timm has no such network"),
    ("nets.py:ten", "model.name: got 'nets.py:ten'; no such file nets.py"),
    ("nowhere.nets:ten", "model.name: got 'nowhere.nets:ten'; no module named 'nowhere'"),
    ("own_nets.py:number", "model.name: 'own_nets.py:number' gave a int; expected an nn.Module"),
    ("own_nets.py:body", "ReLU: got no nn.Linear and no 1x1 nn.Conv2d"),
])  # fmt: skip
def test_errors(place, name, begins):
    with pytest.raises(ModelError) as e:
        model_from(name)
    assert str(e.value).startswith(begins)
