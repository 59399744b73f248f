"""Law 1 for convolutions of every kind, squeeze-excite, and weights that are not plain parameters; their kept widths."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hard_networks import around, check, conv, groups_of, network_of, piece
from strategies import SIDE, conv_norm, image, shuffled
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from torchvision.ops import FrozenBatchNorm2d

from vpdeploy.errors import ModelError
from vpdeploy.models.plain import plain
from vpdeploy.scoring.select import allowed_widths, build_selector, select
from vpdeploy.surgery.cost import build_cost_model
from vpdeploy.surgery.cut import cut
from vpdeploy.surgery.groups import example_input, find_groups
from vpdeploy.surgery.plan import plan
from vpdeploy.values import ChannelGroups

ALL = "stem.0 8, piece.a 8, last.0 6"
BOTH = "stem.0 8, last.0 6"
LAST = "last.0 6"


def up(inputs: int, outputs: int, **options: int):
    return lambda: nn.ConvTranspose2d(inputs, outputs, 2, stride=2, **options)


class SqueezeExcite(nn.Module):
    def __init__(self, width: int, squeezed: int):
        super().__init__()
        self.a, self.b = nn.Conv2d(width, squeezed, 1), nn.Conv2d(squeezed, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.b(F.silu(self.a(x.mean((2, 3), keepdim=True)))))


class Bottleneck(nn.Module):
    """Of ResNeXt and, with squeeze-excite, RegNet-Y."""

    def __init__(self, width: int, inner: int, *, groups: int, squeezed: int = 0):
        super().__init__()
        self.a, self.b = conv_norm(width, inner, kernel=1), conv_norm(inner, inner, groups=groups)
        self.c = conv_norm(inner, width, kernel=1)
        self.se = SqueezeExcite(inner, squeezed) if squeezed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x + self.c(self.se(F.silu(self.b(F.silu(self.a(x)))))))


CONVOLUTIONS = {
    # As many positions of each group; whole groups where there are more groups than channels in each.
    "grouped": piece(lambda m, x: m.a(x), "stem.0 4, piece.a 6, last.0 6", out=12, a=conv(8, 12, groups=2)),
    "grouped, whole groups": piece(
        lambda m, x: m.a(x), "stem.0 8, last.0 6", width=16, out=16, a=conv(16, 16, groups=8)
    ),
    "two, shuffled between": piece(
        lambda m, x: m.b(shuffled(m.a(x), 4)), "stem.0 4, piece.b 4, last.0 6", width=16, out=16,
        refused={"piece.a": "^all its 16 channels go together"}, a=conv(16, 16, groups=4), b=conv(16, 16, groups=4),
    ),
    "depthwise": piece(lambda m, x: m.a(x), BOTH, a=conv(8, 8, groups=8)),
    "depthwise, two for each": piece(lambda m, x: m.a(x), BOTH, out=16, a=conv(8, 16, groups=8)),
    "transposed": piece(lambda m, x: m.a(x), "stem.0 8, piece.a 6, last.0 6", out=6, a=up(8, 6)),
    "transposed, grouped": piece(lambda m, x: m.a(x), "stem.0 4, piece.a 6, last.0 6", out=12, a=up(8, 12, groups=2)),
    "transposed, whole groups": piece(lambda m, x: m.a(x), BOTH, width=16, out=8, a=up(16, 8, groups=8)),
    "transposed, depthwise": piece(lambda m, x: m.a(x), BOTH, a=up(8, 8, groups=8)),
    "transposed, depthwise, two for each": piece(lambda m, x: m.a(x), BOTH, out=16, a=up(8, 16, groups=8)),
    "ResNeXt": around(lambda: Bottleneck(16, 32, groups=8), "stem.0 16, piece.a.0 8, last.0 6", width=16),
    "RegNet": around(
        lambda: Bottleneck(16, 32, groups=4, squeezed=8),
        "stem.0 16, piece.a.0 8, piece.b.0 8, piece.se.a 8, last.0 6", width=16,
    ),
    "squeeze-excite": around(lambda: SqueezeExcite(8, 6), "stem.0 8, piece.a 6, last.0 6"),
    "reflect": piece(lambda m, x: m.a(x), ALL, a=conv(8, 8, padding_mode="reflect")),
    "replicate": piece(lambda m, x: m.a(x), ALL, a=conv(8, 8, padding_mode="replicate")),
    # It writes the map into an empty one.
    "circular": piece(
        lambda m, x: m.a(x), "piece.a 8, last.0 6", a=conv(8, 8, padding_mode="circular"),
        refused={"stem.0": r"^copy in piece\.a combines its channels with values that stay"},
    ),
    "dilated": piece(lambda m, x: m.a(x), ALL, a=lambda: nn.Conv2d(8, 8, 3, padding="same", dilation=2)),
    "1d": piece(lambda m, x: m.a(x.flatten(2)).unflatten(2, (8, 8)), ALL, a=lambda: nn.Conv1d(8, 8, 3, padding=1)),
    "3d": piece(lambda m, x: m.a(x.unsqueeze(2)).squeeze(2), ALL, a=lambda: nn.Conv3d(8, 8, (1, 3, 3), padding=(0, 1, 1))),
    "over channels": piece(
        lambda m, x: x * m.a(x.mean((2, 3)).unsqueeze(1)).transpose(1, 2).unsqueeze(-1), LAST,
        a=lambda: nn.Conv1d(1, 1, 3, padding=1), refused={"stem.0": r"^convolution in piece\.a mixes positions"},
    ),
    "called twice": piece(lambda m, x: m.a(F.silu(m.a(x))), BOTH, a=conv(8, 8)),
}  # fmt: skip


class MaskedConv(nn.Conv2d):
    """Some entries are held at zero by a buffer of the weight's shape."""

    def __init__(self, *args: int, **kwargs: int):
        super().__init__(*args, **kwargs)
        self.register_buffer("mask", torch.rand(self.weight.shape))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * (self.mask > 0), self.bias, self.stride, self.padding)


class StandardisedConv(nn.Conv2d):
    """The weights of each output are brought to mean 0: those of other inputs change when one goes."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Tied(nn.Module):
    """One weight in two layers."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.b(F.silu(self.a(x))))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def doubled() -> nn.Module:
    layer = conv(8, 8)()
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


def folded_by(kind: str) -> dict[str, str]:
    reason = rf"^piece\.a computes its weight at every forward \({kind}\); fold it .*remove_parametrizations\(module"
    return {"stem.0": reason, "piece.a.parametrizations.weight.original": reason}


there_and_back = dict(function=lambda m, x: F.linear(m.a(x.movedim(1, -1)), m.a.weight.t()).movedim(-1, 1))

WEIGHTS = {
    "frozen norm": piece(lambda m, x: m.n(m.a(x)), ALL, a=conv(8, 8), n=lambda: FrozenBatchNorm2d(8)),
    "a mask as a buffer": piece(lambda m, x: m.a(x), ALL, a=lambda: MaskedConv(8, 8, 3, padding=1)),
    "standardised": piece(
        lambda m, x: m.a(x), "piece.a 8, last.0 6", a=lambda: StandardisedConv(8, 8, 3, padding=1),
        refused={"stem.0": r"^mean in piece\.a takes one number over its channels"},
    ),
    "tied": around(Tied, LAST, {"stem.0": r"^piece\.b reads piece\.a\.weight itself, where no gate can stand"}),
    "tied, there and back": piece(
        **there_and_back, prunable=LAST, a=lambda: nn.Linear(8, 5),
        refused={"stem.0": r"^piece.* reads piece\.a\.weight "},
    ),
    "a bare parameter": piece(
        lambda m, x: F.conv2d(x, m.w, padding=1), "piece.w 6, last.0 6", out=6,
        w=lambda: nn.Parameter(torch.ones(6, 8, 3, 3)),
        refused={"stem.0": r"^it is read by piece\.w, a parameter of a Piece, before which no gate can stand"},
    ),
    "weight_norm": piece(
        lambda m, x: m.a(x), LAST, a=lambda: parametrizations.weight_norm(conv(8, 8)()),
        refused={
            "stem.0": r"^convolution in piece\.a reads by a weight that is made of other tensors at every forward",
            **{root + "1": why for root, why in folded_by("_WeightNorm").items() if root != "stem.0"},
        },
    ),
    "spectral_norm": piece(
        lambda m, x: m.a(x), LAST, a=lambda: parametrizations.spectral_norm(conv(8, 8)()),
        refused=folded_by("_SpectralNorm"),
    ),
    "a parametrization": piece(lambda m, x: m.a(x), LAST, a=doubled, refused=folded_by("Doubled")),
}  # fmt: skip

CASES = {**CONVOLUTIONS, **WEIGHTS}


@pytest.mark.parametrize("name", CASES)
def test_convolutions_and_their_weights(name):
    check(CASES[name])


HOOKED = {
    "weight_norm": (weight_norm, "remove_weight_norm"),
    "spectral_norm": (spectral_norm, "remove_spectral_norm"),
    "pruned": (lambda layer: prune.l1_unstructured(layer, "weight", 0.3), "prune.remove"),
    "pruned by channels": (lambda layer: prune.ln_structured(layer, "weight", 0.3, n=2, dim=0), "prune.remove"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # the hooks are deprecated, and met
@pytest.mark.parametrize("refuse", [plain, lambda network: find_groups(network, example_input(SIDE))])
@pytest.mark.parametrize("name", HOOKED)
def test_weights_computed_by_hooks_are_refused_with_the_call_that_folds_them(name, refuse):
    hook, fold = HOOKED[name]
    network = nn.Sequential(*conv_norm(3, 8), hook(nn.Conv2d(8, 5, 1)), nn.Flatten(), nn.Linear(5 * SIDE**2, 5))
    network(torch.rand(2, 3, SIDE, SIDE))  # once it has run, its computed weight cannot be copied
    with pytest.raises(ModelError) as caught:
        refuse(network)
    assert "'2' of Sequential is a Conv2d whose weight is computed at every forward (torch.nn.utils." in str(
        caught.value
    )
    assert f"torch.nn.utils.{fold}(net.get_submodule('2'), 'weight')" in str(caught.value)


ROUNDED = {
    # the network, its group and how many outputs of the convolution one channel of the group is
    "ResNeXt": (lambda: Bottleneck(16, 64, groups=16), "piece.a.0", 4),
    "RegNet": (lambda: Bottleneck(16, 64, groups=4, squeezed=8), "piece.a.0", 4),
    "grouped": (lambda: nn.Conv2d(16, 64, 3, padding=1, groups=2), "piece", 2),
}


@pytest.mark.parametrize("round_to", [4, 8, 16])
@pytest.mark.parametrize("name", ROUNDED)
def test_a_grouped_convolution_keeps_a_multiple_of_its_groups_and_of_round_to(name, round_to):
    make, root, unit = ROUNDED[name]
    out = 64 if name == "grouped" else 16
    network = network_of(around(make, "", width=16, out=out))
    groups = groups_of(network)
    group = next(group for group in groups.prunable if group.root == root)
    assert group.unit == unit
    pruned = smaller(network, groups, round_to=round_to)
    layer = pruned.piece if name == "grouped" else pruned.piece.b[0]
    dense = network.piece if name == "grouped" else network.piece.b[0]
    assert layer.out_channels < dense.out_channels
    assert layer.out_channels % round_to == 0 and layer.out_channels % layer.groups == 0
    assert layer.in_channels % layer.groups == 0
    assert pruned(image(0)).shape == (3, 5)


@pytest.mark.parametrize("squeezed", [4, 6, 8, 16])
def test_a_squeeze_keeps_four_channels(squeezed):
    network = network_of(around(lambda: SqueezeExcite(16, squeezed), "", width=16))
    groups = groups_of(network)
    assert smaller(network, groups, round_to=8).piece.a.out_channels == 4


def smaller(network: nn.Module, groups: ChannelGroups, *, round_to: int) -> nn.Module:
    """``network`` with the fewest parameters that can be asked for."""
    cost = build_cost_model(network, groups.prunable, example=example_input(SIDE))
    least = [
        allowed_widths(group.width, unit=group.unit, round_to=round_to, max_removal=0.9)[0] for group in groups.prunable
    ]
    selector = build_selector(
        groups.prunable,
        cost,
        budget="params_ratio",
        requested=cost.params(np.array(least, float)) / cost.params(cost.dense_widths) + 1e-9,
        round_to=round_to,
        max_removal=0.9,
    )
    scores = {group.root: np.arange(group.width, dtype=float) for group in groups.prunable}
    return cut(network, plan(network, groups.prunable, select(selector, scores).mask))
