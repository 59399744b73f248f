"""The input that a network is published for, in a size that it takes as it is built."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from vpdeploy.errors import ModelError
from vpdeploy.models.published import PublishedInput, published_input
from vpdeploy.recipe.tables import IMAGENET_MEAN, IMAGENET_STD, ModelTable

HALF = (0.5, 0.5, 0.5)


def of(name: str, **keys: Any) -> PublishedInput | None:
    return published_input(ModelTable(name=name, **keys))


@pytest.mark.parametrize(("name", "keys", "size"), [
    ("cifar_resnet8", {}, 32),
    ("cifar_resnet8", {"weights": "a.pt"}, 32),
    ("torchvision:resnet18", {}, 224),
    ("torchvision:inception_v3", {}, 299),
    ("torchvision:efficientnet_b1", {"weights": "DEFAULT"}, 240),
    ("torchvision:regnet_y_16gf", {"weights": "IMAGENET1K_SWAG_E2E_V1"}, 384),
    ("torchvision:regnet_y_16gf", {"weights": "a.safetensors"}, 224),
    ("torchvision:vit_b_16", {"weights": "IMAGENET1K_SWAG_E2E_V1"}, 384),
    ("torchvision:vit_b_16", {"args": {"image_size": 64}}, 64),
    ("torchvision:maxvit_t", {}, 224),
    ("torchvision:maxvit_t", {"args": {"input_size": [448, 448]}}, 448),
    ("torchvision:resnet18", {"args": {"depth": 3}}, 224),  # told where it is built
    ("timm:resnet18", {}, 224),
    ("timm:efficientvit_b3.r288_in1k", {}, 288),
    ("timm:efficientvit_b3", {"weights": "r256_in1k"}, 256),
    ("timm:vit_tiny_patch16_224", {"args": {"img_size": 64}}, 64),
])  # fmt: skip
def test_sizes(name, keys, size):
    found = of(name, **keys)
    assert found is not None and found.image_size == size


def test_the_default_weights_size_is_another_than_the_plain_networks():
    assert of("torchvision:vit_h_14", weights="DEFAULT") == PublishedInput(518)
    assert of("torchvision:vit_h_14") == PublishedInput(224)  # its DEFAULT entry says 518
    assert of("torchvision:vit_h_14", weights="a.pth") == PublishedInput(224)


def test_the_usual_size_where_no_entry_fits(monkeypatch):
    monkeypatch.setattr("vpdeploy.models.torchvision_networks.published_inputs", lambda *_: [PublishedInput(512)])
    assert of("torchvision:vit_b_16") == PublishedInput(224)


def test_mean_and_std_are_the_entrys():
    assert of("torchvision:efficientnet_v2_l") == PublishedInput(480, HALF, HALF)
    assert of("timm:vit_tiny_patch16_224") == PublishedInput(224, HALF, HALF)
    assert of("torchvision:resnet18") == PublishedInput(224, IMAGENET_MEAN, IMAGENET_STD)


def test_code_that_nobody_published_has_none():
    assert of("net.py:factory") is None and of("package.net:factory") is None and of("resnet18") is None


@pytest.mark.parametrize(("name", "weights", "begins"), [
    ("torchvision:resnet19", None, "model.name: got 'torchvision:resnet19'"),
    ("torchvision:resnet18", "V9", "model.weights: got 'V9'"),
    ("timm:resnet19", None, "model.name: got 'timm:resnet19'"),
    ("timm:resnet18", "V9", "model.weights: got 'V9'"),
])  # fmt: skip
def test_unknown_names(name, weights, begins):
    with pytest.raises(ModelError) as e:
        of(name, weights=weights)
    assert str(e.value).startswith(begins)


def test_nothing_is_drawn_from_global_streams(monkeypatch):
    def drawing(name: str, **_: Any) -> torch.nn.Module:
        torch.rand(1, device="cpu")
        random.random()
        return torch.nn.Identity()

    monkeypatch.setattr("torchvision.models.get_model", drawing)
    before = torch.get_rng_state(), random.getstate()
    assert of("torchvision:resnet18") == PublishedInput(224)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]


def test_a_network_that_cannot_be_built_without_real_numbers():
    assert of("torchvision:regnet_y_400mf") == PublishedInput(224)
