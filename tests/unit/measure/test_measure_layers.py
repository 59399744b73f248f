"""The time of an exported file, layer by layer: nothing is lost, and what is fused counts with its product."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from vpdeploy.deploy.bake import Deployable
from vpdeploy.deploy.onnx_file import to_onnx
from vpdeploy.measure.engines import Setting
from vpdeploy.measure.engines.onnxruntime_engine import profile
from vpdeploy.measure.layers import layer_times, layers_of
from vpdeploy.measure.macs import count_macs
from vpdeploy.prompts.canvas import Canvas

SIDE = 16


class Block(nn.Module):
    """A convolution with its norm and activation, a sum, a linear layer in a transformer's shape, a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.branch = nn.Conv2d(16, 16, 3, padding=1)
        self.tokens = nn.Linear(16, 32)
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = self.stem(x)
        x = (x + self.branch(x)).relu()
        return self.head(nn.functional.gelu(self.tokens(x.flatten(2).transpose(1, 2))).mean(1))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("layers") / "whole.onnx"
    canvas = Canvas(SIDE, SIDE, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), prompt=None)
    whole = Deployable(Block(), canvas, form="float", image_size=SIDE, resize_how="stretch").eval()
    to_onnx(whole, path, opset=18, metadata={})
    return whole, path


def images() -> np.ndarray:
    return np.random.default_rng(0).random((1, 3, SIDE, SIDE), np.float32)


def test_nodes_bear_the_names_of_their_modules_once_each(exported):
    names = [node.name for node in onnx.load(exported[1]).graph.node]
    assert len(set(names)) == len(names)
    for module, op in (("stem.0", "Conv"), ("branch", "Conv"), ("tokens", "MatMul"), ("head", "Gemm")):
        assert f"backbone.{module}/{op}" in names


def test_every_layer_has_its_time_and_nothing_is_lost(exported):
    whole, path = exported
    times = layer_times(path, images(), setting=Setting(), runs=5)
    assert set(times) == {"stem.0", "branch", "tokens", "head", ""}
    rows = layers_of(whole.backbone, times, count_macs(whole.backbone, canvas_size=SIDE).by_module)
    assert [(row.module, row.width) for row in rows] == [
        ("stem.0", 16), ("branch", 16), ("tokens", 32), ("head", 5), ("", 0),
    ]  # fmt: skip
    assert [row.macs for row in rows] == [27 * 16 * SIDE**2, 144 * 16 * SIDE**2, 16 * 32 * SIDE**2, 32 * 5, 0]
    assert sum(row.ms for row in rows) == pytest.approx(sum(times.values()), abs=1e-3)
    assert torch.tensor([row.ms for row in rows[:2]]).min() > 0


def test_what_is_fused_counts_with_its_product(exported):
    """The norm, the activation and the sum are gone from the graph that runs: their nodes are the convolutions'."""
    nodes = profile(exported[1], images(), setting=Setting(), runs=5)
    assert not {"BatchNormalization", "Relu"} & {str(node["op"]) for node in nodes}
    convolutions = sum(float(node["ms"]) for node in nodes if "Conv" in str(node["op"]))
    times = layer_times(exported[1], images(), setting=Setting(), runs=5)
    assert convolutions > 0 and times["stem.0"] > 0 and times["branch"] > 0
