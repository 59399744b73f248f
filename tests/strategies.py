"""Random networks, masks and costs for the laws. Every network takes [n, 3, SIDE, SIDE] and gives [n, CLASSES]."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from vpdeploy.models.cifar_resnet import BasicBlock
from vpdeploy.surgery.cost import CostModel, Sum
from vpdeploy.surgery.exactness import probe
from vpdeploy.surgery.groups import example_input, find_groups
from vpdeploy.values import ChannelGroup, ChannelGroups, ChannelMask, Member

SIDE = 8
CLASSES = 5
ACTIVATIONS: tuple[type[nn.Module], ...] = (nn.ReLU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Sigmoid)
Widths = Sequence[int]
Activation = type[nn.Module]


class Head(nn.Module):
    """Mean over the map, then one linear layer."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean((2, 3)))


def conv_norm(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """A block with a downsampling shortcut, then one with an identity: the stream is one group with three writers."""

    def __init__(self, widths: Widths, activation: Activation):
        super().__init__()
        stem, inner, stream, second = widths
        self.stem, self.act = conv_norm(3, stem), activation()
        self.a1, self.a2 = conv_norm(stem, inner), conv_norm(inner, stream, stride=2)
        self.down = conv_norm(stem, stream, kernel=1, stride=2)
        self.b1, self.b2 = conv_norm(stream, second), conv_norm(second, stream)
        self.head = Head(stream)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.stem(x))
        x = self.act(self.a2(self.act(self.a1(x))) + self.down(x))
        return self.head(self.act(self.b2(self.act(self.b1(x))) + x))


class DenseBlock(nn.Module):
    """Concatenation with the norm at the reader: gated at the writer, a norm's shift would survive."""

    def __init__(self, widths: Widths, activation: Activation):
        super().__init__()
        a, b, c, d = widths
        self.stem, self.act = nn.Conv2d(3, a, 3, padding=1), activation()
        self.norm1, self.conv1 = nn.BatchNorm2d(a), nn.Conv2d(a, b, 3, padding=1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(a + b), nn.Conv2d(a + b, c, 3, padding=1)
        self.norm3, self.transition = nn.BatchNorm2d(a + b + c), nn.Conv2d(a + b + c, d, 1)
        self.head = Head(d)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.conv1(self.act(self.norm1(x)))], dim=1)
        x = torch.cat([x, self.conv2(self.act(self.norm2(x)))], dim=1)
        return self.head(F.avg_pool2d(self.transition(self.act(self.norm3(x))), 2))


class Separable(nn.Module):
    """Depthwise separable convolution with squeeze-excite: one group passes through four layers."""

    def __init__(self, widths: Widths, activation: Activation):
        super().__init__()
        a, squeezed, b, c = widths
        self.expand, self.depthwise = conv_norm(3, a), conv_norm(a, a, stride=2, groups=a)
        self.squeeze, self.excite = nn.Conv2d(a, squeezed, 1), nn.Conv2d(squeezed, a, 1)
        self.project, self.last, self.act = conv_norm(a, b, kernel=1), conv_norm(b, c), activation()
        self.head = Head(c)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.depthwise(self.act(self.expand(x))))
        x = x * torch.sigmoid(self.excite(self.act(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        return self.head(self.act(self.last(self.project(x))))


class PreActivation(nn.Module):
    """Norms before convolutions: the residual stream itself is never normalised."""

    def __init__(self, widths: Widths, activation: Activation):
        super().__init__()
        stream, inner, second, _ = widths
        self.stem, self.act = nn.Conv2d(3, stream, 3, padding=1), activation()
        self.n1, self.c1 = nn.BatchNorm2d(stream), nn.Conv2d(stream, inner, 3, padding=1)
        self.n2, self.c2 = nn.BatchNorm2d(inner), nn.Conv2d(inner, stream, 3, padding=1)
        self.n3, self.c3 = nn.BatchNorm2d(stream), nn.Conv2d(stream, second, 1)
        self.c4 = nn.Conv2d(second, stream, 1)
        self.last, self.head = nn.BatchNorm2d(stream), Head(stream)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.c2(self.act(self.n2(self.c1(self.act(self.n1(x))))))
        x = x + self.c4(self.act(self.c3(self.act(self.n3(x)))))
        return self.head(self.act(self.last(x)))


def flattened(widths: Widths, activation: Activation) -> nn.Module:
    """One channel of the convolution is SIDE^2 / 4 inputs of the linear layer."""
    a, b, hidden, _ = widths
    return nn.Sequential(
        *conv_norm(3, a), activation(), nn.MaxPool2d(2), nn.Conv2d(a, b, 3, padding=1), activation(), nn.Flatten(),
        nn.Linear(b * SIDE**2 // 4, hidden), activation(), nn.Linear(hidden, CLASSES),
    )  # fmt: skip


def cifar(widths: Widths, activation: Activation) -> nn.Module:
    """The CIFAR ResNet's blocks, narrow: two residual streams joined by a ChannelGather."""
    a, b = sorted(widths[:2])
    blocks = (BasicBlock(a, a, 1), BasicBlock(a, a + b, 2), BasicBlock(a + b, a + b, 1))
    return nn.Sequential(*conv_norm(3, a), activation(), *blocks, Head(a + b))


def mixed(widths: Widths, activation: Activation) -> nn.Module:
    """Every kind of layer whose products have a form of their own."""
    return Mixed(widths, activation)


class Mixed(nn.Module):
    """Transposed, grouped and depthwise convolution, concatenation, linear layers on a map and on a vector."""

    def __init__(self, widths: Widths, activation: Activation):
        super().__init__()
        a, b, c, d = widths
        self.stem, self.act = nn.Conv2d(3, a, 3, stride=2, padding=1), activation()
        self.up, self.side = nn.ConvTranspose2d(a, b, 2, stride=2), nn.Conv2d(3, 4, 1)
        self.grouped = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(b, b, 3, padding=1, groups=b)
        self.join = nn.Conv2d(b + 6, c, 3, padding=1, bias=False)
        self.hidden, self.linear = nn.Linear(c, d, bias=False), nn.Linear(d, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.act(self.up(self.act(self.stem(x)))))
        y = self.act(self.join(torch.cat([y, self.act(self.grouped(self.side(x)))], dim=1)))
        return self.linear(self.act(self.hidden(y.mean((2, 3)))))


class Grouped(nn.Module):
    """Grouped convolutions: few groups, which lose the same positions each, and many, which go as a whole."""

    def __init__(self, widths: Widths, activation: Activation):
        super().__init__()
        a, b, c, d = widths
        self.stem, self.act = conv_norm(3, 2 * a), activation()
        self.few, self.up = conv_norm(2 * a, 2 * b, groups=2), nn.ConvTranspose2d(2 * b, 4, 2, stride=2, groups=2)
        self.middle, self.many = conv_norm(4, 2 * c, kernel=1), conv_norm(2 * c, 2 * c, groups=c, stride=2)
        self.last, self.multiplied = conv_norm(2 * c, d), nn.Conv2d(d, 2 * d, 3, groups=d)
        self.head = Head(2 * d)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.up(self.act(self.few(self.act(self.stem(x))))))
        x = self.act(self.many(self.act(self.middle(x))))
        return self.head(self.act(self.multiplied(self.act(self.last(x)))))


def shuffled(x: Tensor, parts: int = 2) -> Tensor:
    """The channels of each part in turn (arXiv:1707.01083). x: [n, c, h, w]."""
    return x.unflatten(1, (parts, -1)).transpose(1, 2).flatten(1, 2)


class Shuffled(nn.Module):
    """A ShuffleNet unit: half of the channels pass, half go through a branch, and both are shuffled."""

    def __init__(self, widths: Widths, activation: Activation):
        super().__init__()
        a, b, c, d = widths
        self.stem, self.act = conv_norm(3, 2 * a), activation()
        self.expand, self.depthwise = conv_norm(a, b, kernel=1), conv_norm(b, b, groups=b)
        self.project, self.middle, self.last = conv_norm(b, a, kernel=1), conv_norm(2 * a, c), conv_norm(c, d)
        self.head = Head(d)

    def forward(self, x: Tensor) -> Tensor:
        passed, branch = self.act(self.stem(x)).chunk(2, dim=1)
        branch = self.act(self.project(self.depthwise(self.act(self.expand(branch)))))
        return self.head(self.act(self.last(self.act(self.middle(shuffled(torch.cat([passed, branch], dim=1)))))))


class Heads(nn.Module):
    """A transformer block without norms, and a class token: heads of two channels, the inner width, the stream."""

    def __init__(self, widths: Widths, activation: Activation):
        super().__init__()
        stream, heads, inner, last = widths
        self.patches, self.act = nn.Conv2d(3, stream, 2, stride=2), activation()
        self.token = nn.Parameter(torch.zeros(1, 1, stream))
        self.position = nn.Parameter(torch.zeros(1, SIDE**2 // 4 + 1, stream))
        self.q, self.k, self.v = (nn.Linear(stream, 2 * heads) for _ in "qkv")
        self.proj, self.first, self.second = (
            nn.Linear(2 * heads, stream), nn.Linear(stream, inner), nn.Linear(inner, stream)
        )  # fmt: skip
        self.hidden, self.linear = nn.Linear(stream, last), nn.Linear(last, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)  # [n, positions, stream]
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.position
        q, k, v = (project(x).unflatten(-1, (-1, 2)).transpose(1, 2) for project in (self.q, self.k, self.v))
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.second(self.act(self.first(x)))
        return self.linear(self.act(self.hidden(x[:, 0])))


FAMILIES: dict[str, Callable[[Widths, Activation], nn.Module]] = {
    "residual": Residual,
    "dense-block": DenseBlock,
    "separable": Separable,
    "pre-activation": PreActivation,
    "flattened": flattened,
    "cifar": cifar,
    "mixed": mixed,
    "grouped": Grouped,
    "shuffled": Shuffled,
    "heads": Heads,
}


def randomised(network: nn.Module, *, seed: int) -> nn.Module:
    """Every parameter and norm statistic random, float64, eval mode: a fresh BatchNorm hides what masking leaves behind."""
    generator = torch.Generator().manual_seed(seed)
    network = network.double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            scale = 0.5 if parameter.ndim < 2 else (2 / max(1, parameter[0].numel())) ** 0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * scale)
            parameter += 0.3 if parameter.ndim < 2 else 0.0
        for name, buffer in network.named_buffers():
            if buffer.is_floating_point():
                drawn = torch.rand(buffer.shape, generator=generator, dtype=buffer.dtype)
                buffer.copy_(drawn + 0.25 if name.endswith("running_var") else drawn * 2 - 1)
    return network


@st.composite
def networks(draw: st.DrawFn, family: str) -> nn.Module:
    """A network of ``family`` with random widths, activation, weights and statistics, in float64."""
    widths = draw(st.lists(st.integers(3, 9), min_size=4, max_size=4))
    network = FAMILIES[family](widths, draw(st.sampled_from(ACTIVATIONS)))
    return randomised(network, seed=draw(st.integers(0, 2**16)))


def probed(network: nn.Module) -> ChannelGroups:
    return probe(network, find_groups(network, example_input(SIDE)), example=example_input(SIDE))


@st.composite
def masks(draw: st.DrawFn, groups: Sequence[ChannelGroup]) -> ChannelMask:
    """Any share of every group's channels, at least one, in any place."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    kept = [draw(st.integers(1, group.width)) for group in groups]
    rows = [rng.permutation(group.width) < k for group, k in zip(groups, kept, strict=True)]
    return ChannelMask({g.root: tuple(bool(k) for k in row) for g, row in zip(groups, rows, strict=True)})


def image(seed: int, *, n: int = 3, side: int = SIDE, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@st.composite
def costs(draw: st.DrawFn, *, max_width: int = 40) -> tuple[tuple[ChannelGroup, ...], CostModel]:
    """Random groups, and a cost in which they are coupled: whole numbers, so that float64 sums are exact."""
    widths = draw(st.lists(st.integers(1, max_width), min_size=1, max_size=5))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    tensors, g = int(rng.integers(1, 7)), len(widths)
    share = rng.integers(0, 3, (2, tensors, g)) * (rng.random((2, tensors, g)) < 0.5)
    share[0, 0] += share.sum((0, 1)) == 0  # every group costs something
    constant = rng.integers(0, 4, (2, tensors))
    constant[:, 0] += 1  # and a network is never free
    rest, positions = rng.integers(1, 10, tensors), rng.integers(0, 17, tensors)
    positions[0] += 1
    numbers = [array.astype(float) for array in (share, constant, rest)]
    products = Sum(*numbers[:2], numbers[2] * positions)
    groups = tuple(
        group_of(f"layer{i}", width, unit=int(rng.choice([1, 1, 1, 2, 3, 8]))) for i, width in enumerate(widths)
    )
    return groups, CostModel(products, Sum(*numbers), np.array(widths, float))


def group_of(root: str, width: int, *, unit: int = 1) -> ChannelGroup:
    """A group that one layer writes, ``unit`` outputs for each channel."""
    channels = tuple(channel for channel in range(width) for _ in range(unit))
    return ChannelGroup(root, width, (Member(f"{root}.weight", 0, "out", tuple(range(width * unit)), channels),))
