"""The CIFAR ResNets compute what their published checkpoints were trained to compute."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vpdeploy.errors import ModelError
from vpdeploy.models.build import build
from vpdeploy.models.cifar_resnet import cifar_resnet
from vpdeploy.models.weights import load_weights, read_tensors
from vpdeploy.recipe.tables import ModelTable

SHARED = Path(os.environ.get("VPDEPLOY_TEST_DATA") or Path(__file__).resolve().parents[3].parent / "shared")
CHECKPOINTS = {depth: next(iter(SHARED.glob(f"checkpoints/resnet{depth}-*.th")), None) for depth in (20, 32, 44, 56)}


def functional_forward(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """The network written down again, from its tensors alone, with the slice-and-pad shortcut."""

    def norm(x: Tensor, name: str) -> Tensor:
        t = [tensors[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(x, t[0], t[1], t[2], t[3], training=False)

    x = F.relu(norm(F.conv2d(x, tensors["conv1.weight"], padding=1), "bn1"))
    blocks = sorted(
        {tuple(name.split(".")[:2]) for name in tensors if name.startswith("layer")}, key=lambda b: (b[0], int(b[1]))
    )
    for stage, number in blocks:
        name, stride = f"{stage}.{number}", 2 if number == "0" and stage != "layer1" else 1
        out = F.conv2d(x, tensors[f"{name}.conv1.weight"], stride=stride, padding=1)
        out = F.conv2d(F.relu(norm(out, f"{name}.bn1")), tensors[f"{name}.conv2.weight"], padding=1)
        pad = (out.shape[1] - x.shape[1]) // 2
        x = F.relu(norm(out, f"{name}.bn2") + F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, pad, pad)))
    return F.linear(F.avg_pool2d(x, x.shape[-1]).flatten(1), tensors["linear.weight"], tensors["linear.bias"])


@pytest.mark.parametrize("depth", CHECKPOINTS)
def test_published_checkpoints_load_and_compute_the_same(depth):
    path = CHECKPOINTS[depth]
    if path is None:
        pytest.skip(f"no checkpoints/resnet{depth}-*.th below ../shared; VPDEPLOY_TEST_DATA can name the folder")
    built = build(ModelTable.model_validate({"name": f"cifar_resnet{depth}", "weights": str(path)}), classes=10, seed=0)
    assert (built.head, built.classifier, built.source_classes) == ("keep", "linear", 10)
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = functional_forward({name: t.double() for name, t in read_tensors(path).items()}, x)
    with torch.no_grad():
        got = built.backbone.double()(x)
    assert expected.std() > 0.5  # the comparison is not of constants
    assert (got - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_random_network_computes_the_same_with_random_statistics():
    net = cifar_resnet(14, 7).double().eval()
    stream = torch.Generator().manual_seed(3)
    tensors = {
        name: torch.rand(t.shape, dtype=torch.float64, generator=stream) + 0.5 if t.ndim == 1 else t.detach()
        for name, t in net.state_dict().items()
        if t.ndim
    }
    load_weights(net, tensors, where="test")
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64, generator=stream)
    expected = functional_forward(tensors, x)
    assert (net(x) - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("depth", [8, 20, 110])
def test_depth_counts_weight_layers(depth):
    weights = [name for name, t in cifar_resnet(depth).named_parameters() if t.ndim >= 2]
    assert len(weights) == depth


@pytest.mark.parametrize("side", [(8, 8), (17, 33)])
def test_any_input_size(side):
    assert cifar_resnet(8, 5).eval()(torch.rand(2, 3, *side)).shape == (2, 5)


@pytest.mark.parametrize("depth", [2, 18, 0])
def test_other_depths_are_refused(depth):
    with pytest.raises(ModelError, match=f"got depth {depth}; expected 6n \\+ 2, such as 8, 14, 20"):
        cifar_resnet(depth)
