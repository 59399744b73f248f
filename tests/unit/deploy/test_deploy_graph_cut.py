"""A cut in the exported graph is a cut in torch and an export; what cannot be followed is said."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

from vpdeploy.deploy.bake import ConstantPrompt, Deployable
from vpdeploy.deploy.graph_cut import CannotCut, read_graph
from vpdeploy.deploy.onnx_file import to_onnx
from vpdeploy.measure.engines import Setting, Subject, open_session
from vpdeploy.models.attention.multihead import MultiheadAttention
from vpdeploy.models.gather import ChannelGather
from vpdeploy.prompts.canvas import Canvas
from vpdeploy.surgery.cut import cut
from vpdeploy.surgery.exactness import probe
from vpdeploy.surgery.groups import example_input, groups_of
from vpdeploy.surgery.plan import plan, tensors
from vpdeploy.surgery.shapes import shapes_of
from vpdeploy.surgery.trace import look
from vpdeploy.values import ChannelMask

SIDE = 8


class Convolutions(nn.Module):
    """Norms that fold, a depthwise layer, a shortcut of indices, a flattened map."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.wide, self.shortcut = nn.Conv2d(8, 12, 3, stride=2, padding=1), ChannelGather(8, 12, 2)
        self.head = nn.Linear(12 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.deep(x))
        x = F.relu(self.wide(x) + self.shortcut(x))
        return self.head(x.flatten(1))


class Tokens(nn.Module):
    """Linear layers over tokens: the exporter holds their weights transposed."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 10, 4, stride=4)
        self.up, self.down, self.head = nn.Linear(10, 24), nn.Linear(24, 10), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).permute(0, 2, 3, 1)
        return self.head((tokens + self.down(F.gelu(self.up(tokens)))).mean((1, 2)))


class Heads(nn.Module):
    """Attention of whole heads, whose number the exporter writes into reshapes."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 10, 2, stride=2)
        layers = (nn.Linear(10, 24) for _ in range(3))
        self.attention = MultiheadAttention(*layers, nn.Linear(24, 10), head_dim=4, dropout=0.0, batch_first=True)
        self.first, self.head = nn.Parameter(torch.randn(1, 1, 10)), nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.first.expand(len(x), -1, -1), tokens], 1)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.head(tokens[:, 0])


def exported(network: nn.Module, path: Path, *, prompt: bool = False) -> Deployable:
    noise = ConstantPrompt(torch.full((3, SIDE, SIDE), 0.1)) if prompt else None
    canvas = Canvas(SIDE, SIDE, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), prompt=noise)
    deployable = Deployable(network, canvas, form="float", image_size=SIDE, resize_how="stretch").eval()
    to_onnx(deployable.requires_grad_(False), path, opset=18, metadata={})
    return deployable


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    network = kind().eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.normal_(module.bias)
    return network.requires_grad_(False)


def arrays(network: nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in tensors(network).items()}


def logits(path: Path, images: np.ndarray) -> np.ndarray:
    return open_session(Subject(path), Setting())(images)


@pytest.mark.parametrize("kind", [Convolutions, Tokens, Heads])
def test_a_cut_in_the_graph_computes_what_a_cut_in_torch_does(kind, tmp_path):
    network, example = made(kind), example_input(SIDE, batch=1)
    seen = look(network, example)
    groups = probe(network, groups_of(seen, network), example=example).prunable
    assert groups
    exported(network, tmp_path / "dense.onnx")
    graph = read_graph(tmp_path / "dense.onnx", arrays(network))
    shapes = shapes_of(seen, network, groups)
    generator = np.random.default_rng(0)
    images = generator.random((3, 3, SIDE, SIDE), np.float32)
    for number in range(4):
        keep = {g.root: tuple(bool(k) for k in generator.random(g.width) < 0.6) for g in groups}
        keep = {root: (True, True, *row[2:]) for root, row in keep.items()}
        cuts = plan(network, groups, ChannelMask(keep))
        small, path = cut(network, cuts), tmp_path / f"{number}.onnx"
        graph.write_cut(cuts, path, partial(arrays, small))
        with torch.no_grad():
            expected = exported(small, tmp_path / "real.onnx")(torch.from_numpy(images)).numpy()
        assert np.allclose(logits(path, images), expected, rtol=1e-4, atol=1e-5)
        # and its bytes are what the terms say
        widths = np.array([sum(keep[g.root]) for g in groups], float)
        held = sum(onnx.numpy_helper.to_array(t).nbytes for t in onnx.load(path).graph.initializer)
        told = shapes.sum_of(graph.terms()).at(widths)
        indices = (
            sum(8 * g.width for g in groups) if kind is Convolutions else 0
        )  # of the shortcut: taken as when dense
        assert held <= told <= held + indices


def test_a_tensor_that_is_not_found_is_an_error(tmp_path):
    network, example = made(Convolutions), example_input(SIDE, batch=1)
    groups = probe(network, groups_of(look(network, example), network), example=example).prunable
    exported(network, tmp_path / "dense.onnx")
    model = onnx.load(tmp_path / "dense.onnx")
    for tensor in model.graph.initializer:
        if tensor.name == "backbone.wide.weight":
            tensor.CopyFrom(numpy_helper.from_array(2 * numpy_helper.to_array(tensor), "val_1000"))
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name == "backbone.wide.weight":
                node.input[place] = "val_1000"
    onnx.save(model, tmp_path / "odd.onnx")
    graph = read_graph(tmp_path / "odd.onnx", arrays(network))
    mask = ChannelMask({g.root: (True,) * (g.width - 2) + (False,) * 2 for g in groups})
    cuts = plan(network, groups, mask)
    with pytest.raises(CannotCut, match=r"wide\.weight"):
        graph.write_cut(cuts, tmp_path / "cut.onnx", lambda: arrays(cut(network, cuts)))


def test_without_the_prompt_the_rest_is_the_same(tmp_path):
    network = made(Convolutions)
    exported(network, tmp_path / "with.onnx", prompt=True)
    plain = exported(network, tmp_path / "plain.onnx")
    graph = read_graph(tmp_path / "with.onnx", arrays(network))
    assert graph.write_without_prompt(tmp_path / "without.onnx")
    images = np.random.default_rng(0).random((2, 3, SIDE, SIDE), np.float32)
    with torch.no_grad():
        expected = plain(torch.from_numpy(images)).numpy()
    assert np.allclose(logits(tmp_path / "without.onnx", images), expected, rtol=1e-4, atol=1e-5)
    assert not np.allclose(logits(tmp_path / "with.onnx", images), expected, rtol=1e-4, atol=1e-5)
    ops = [node.op_type for node in onnx.load(tmp_path / "without.onnx").graph.node]
    assert "Clip" not in ops
    assert not read_graph(tmp_path / "plain.onnx", arrays(network)).write_without_prompt(tmp_path / "none.onnx")
