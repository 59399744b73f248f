"""Law 1 for flattened maps, tokens, attention, norms over channels, recurrent and bilinear layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hard_networks import Case, around, check, check_law, conv, described, groups_of, network_of, piece
from strategies import conv_norm
from torch import Tensor, nn
from torch.nn import functional as F

from vpdeploy.surgery.exactness import EXACT

BOTH = "stem.0 8, last.0 6"
LAST = "last.0 6"
APPROXIMATE = r"takes statistics over its channels \({}\); removal is approximate: budget.allow_approximate"


class Flattened(nn.Module):
    """[n, 8, 4, 4] to a vector by ``flatten``, then two linear layers."""

    def __init__(self, flatten: Callable[[Tensor], Tensor], size: int = 128):
        super().__init__()
        self.stem, self.flatten = conv_norm(3, 8), flatten
        self.hidden, self.linear = nn.Linear(size, 7), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.silu(self.hidden(self.flatten(F.max_pool2d(F.silu(self.stem(x)), 2)))))


def flattened(flatten: Callable[[Tensor], Tensor], *, size: int = 128, refused: str = "") -> Case:
    why = {"stem.0": refused} if refused else {}
    return Case(lambda: Flattened(flatten, size), "hidden 7" if refused else "stem.0 8, hidden 7", why)


FLATTENED = {
    "channels first": flattened(lambda x: x.flatten(1)),
    "channels last": flattened(lambda x: x.permute(0, 2, 3, 1).flatten(1)),
    "channels last, by reshape": flattened(lambda x: x.permute(0, 3, 2, 1).reshape(len(x), -1)),
    "channels between": flattened(lambda x: x.permute(0, 2, 1, 3).reshape(len(x), -1)),
    "by what is left": flattened(lambda x: x.view(len(x), -1)),
    "by the batch": flattened(lambda x: x.view(len(x), -1, 16).mean(2), size=8),
    # A cut network would take two images for one.
    "by a size": flattened(
        lambda x: x.view(-1, 8 * 16), refused=r"^removing its channels fails in hidden: .*view gives the shape 2 x 128"
    ),
    "by both sizes": flattened(
        lambda x: x.view(len(x), 128), refused=r"^removing its channels fails: .*shape '\[2, 128\]' is invalid"
    ),
    "back to channels": flattened(
        lambda x: x.view(len(x), 8, 16).mean(2), size=8, refused=r"fails: .*shape '\[2, 8, 16\]' is invalid"
    ),
}


class Tokens(nn.Module):
    """Patches as tokens behind a class token, learned positions, ``block``, a linear layer on the class token."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.patch, self.block, self.head = nn.Conv2d(3, 8, 2, stride=2), block, nn.Linear(8, 5)
        self.token, self.positions = nn.Parameter(torch.ones(1, 1, 8)), nn.Parameter(torch.ones(1, 17, 8))
        self.more = nn.Embedding(17, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions + self.more(torch.arange(17))
        return self.head(F.silu(self.block(x)[:, 0]))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(x)))


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.mlp = nn.MultiheadAttention(8, 2, batch_first=True), MLP()

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x + self.attention(x, x, x, need_weights=False)[0])


class EinsumAttention(nn.Module):
    """The number of heads is baked in: what is left of a width is shared out among them anew."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(*x.shape[:2], 2, -1) for layer in (self.q, self.k, self.v))
        weights = torch.einsum("nqhc,nkhc->nhqk", q, k).softmax(-1)
        return x + self.out(torch.einsum("nhqk,nkhc->nqhc", weights, v).reshape(*x.shape[:2], -1))


class WindowAttention(nn.Module):
    """As Swin's: windows of 2 x 2, heads and their width baked in, a table of relative positions."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.table = nn.Parameter(torch.zeros(9, 2))
        self.register_buffer("index", torch.arange(16) % 9)

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        y = x.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, 4, c)
        q, k, v = self.qkv(y).reshape(len(y), 4, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        weights = q @ k.transpose(-2, -1) + self.table[self.index].view(4, 4, -1).permute(2, 0, 1)
        y = self.out((weights.softmax(-1) @ v).transpose(1, 2).reshape(len(y), 4, c))
        return x + y.view(n, h // 2, w // 2, 2, 2, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)


def encoder(*, norm_first: bool) -> Case:
    attention = "block.self_attn"
    return Case(
        lambda: Tokens(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, norm_first=norm_first)),
        "block.linear1 12",
        {
            "patch": rf"^it is read by {attention}\.in_proj_weight, a parameter of a MultiheadAttention",
            f"{attention}.in_proj_weight": rf"^{attention} reads {attention}\.out_proj\.weight itself",
        },
    )


TOKENS = {
    "class token and positions": Case(lambda: Tokens(MLP()), "patch 8, block.up 12"),
    "nn.MultiheadAttention": Case(
        lambda: Tokens(SelfAttention()),
        "block.mlp.up 12",
        {
            "patch": r"^it is read by block\.attention\.in_proj_weight, a parameter of a MultiheadAttention",
            "block.attention.in_proj_weight": r"^block\.attention reads block\.attention\.out_proj\.weight itself",
        },
    ),
    "nn.TransformerEncoderLayer": encoder(norm_first=False),
    "nn.TransformerEncoderLayer, norm first": encoder(norm_first=True),
    "einsum": Case(
        lambda: Tokens(EinsumAttention()),
        "patch 8",
        {"block.q": "^masked and removed differ by .*view in block gives the shape 2 x 17 x 2 x 4"},
    ),
    "windows": around(
        WindowAttention,
        LAST,
        {
            "stem.0": r"^removing its channels fails in piece: .*shape '\[32, 4, 3, 2, .\]' is invalid",
            "piece.qkv": r"^removing its channels fails in piece: .*view in piece gives the shape 32 x 4 x 3 x 2 x 4",
        },
    ),
    "the map on itself": piece(
        lambda m, x: (
            x
            + ((m.q(x).flatten(2).transpose(1, 2) @ m.k(x).flatten(2)).softmax(-1) @ m.v(x).flatten(2).transpose(1, 2))
            .transpose(1, 2)
            .reshape(len(x), -1, 8, 8)
        ),
        BOTH,
        q=conv(8, 6, 1),
        k=conv(8, 6, 1),
        v=conv(8, 8, 1),
    ),
}


def last_axis(**layers: Callable[[], nn.Module]) -> dict:
    return {"function": lambda m, x: m.n(x.movedim(1, -1)).movedim(-1, 1), **layers}


class ConvNeXtBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 3, padding=1, groups=width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.scale = nn.Parameter(torch.ones(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + self.scale * self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)


class RMSNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale


def statistics(layer: Callable[[], nn.Module], norm: str) -> Case:
    return piece(lambda m, x: m.n(x), LAST, n=layer, refused={"stem.0": r"^piece\.n " + APPROXIMATE.format(norm)})


def over(function: Callable[[Tensor], Tensor], reason: str) -> Case:
    return piece(lambda m, x: function(x), LAST, refused={"stem.0": reason})


NORMS = {
    "ConvNeXt": around(
        lambda: ConvNeXtBlock(8),
        "piece.up 16, last.0 6",
        {"stem.0": r"^piece\.norm " + APPROXIMATE.format("layer_norm")},
    ),
    "LayerNorm": piece(
        **last_axis(n=lambda: nn.LayerNorm(8)), prunable=LAST, refused={"stem.0": APPROXIMATE.format("layer_norm")}
    ),
    "GroupNorm of one": statistics(lambda: nn.GroupNorm(1, 8), "group_norm"),
    "GroupNorm of two": statistics(lambda: nn.GroupNorm(2, 8), "group_norm"),
    "GroupNorm of each": piece(lambda m, x: m.n(x), BOTH, n=lambda: nn.GroupNorm(8, 8)),
    "nn.RMSNorm": piece(
        **last_axis(n=lambda: nn.RMSNorm(8)), prunable=LAST,
        refused={"stem.0": r"piece\.n takes (one number|statistics) over its channels"},
    ),
    "RMSNorm": piece(
        **last_axis(n=lambda: RMSNorm(8)), prunable=LAST,
        refused={"stem.0": r"^mean in piece\.n takes one number over its channels"},
    ),
    "InstanceNorm": piece(lambda m, x: m.n(x), BOTH, n=lambda: nn.InstanceNorm2d(8)),
    "InstanceNorm with statistics": piece(
        lambda m, x: m.n(x), BOTH, n=lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
    ),
    "LocalResponseNorm": piece(
        lambda m, x: m.n(x), LAST, n=lambda: nn.LocalResponseNorm(3),
        refused={"stem.0": r"^its channels pass through avg_pool3d in piece\.n, for which there is no rule"},
    ),
    "normalize": over(lambda x: F.normalize(x, dim=1), "^linalg_vector_norm in piece takes one number over its channels"),
    "softmax": over(lambda x: x.softmax(1), "^softmax in piece runs over its channels"),
    "cumsum": over(lambda x: x.cumsum(1), "^cumsum in piece runs over its channels"),
    "fft": over(lambda x: torch.fft.fft2(x).real, "fft_c2c in piece, for which there is no rule"),
    "by the width": over(lambda x: x / x.shape[1], "^masked and removed differ by "),
    "the mean of all": piece(
        lambda m, x: x * m.a(x).mean(1, keepdim=True), BOTH, a=conv(8, 8),
        refused={"piece.a": "^mean in piece takes one number over its channels"},
    ),
    "softmax of the map": piece(lambda m, x: x.flatten(2).softmax(2).view_as(x), BOTH),
    "sigmoid": piece(lambda m, x: torch.sigmoid(x), BOTH),
    "PReLU": piece(lambda m, x: m.n(x), BOTH, n=lambda: nn.PReLU(8)),
}  # fmt: skip


class Recurrent(nn.Module):
    def __init__(self, layer: type[nn.Module]):
        super().__init__()
        self.first, self.stem = conv_norm(3, 4), conv_norm(4, 6)
        self.r, self.linear = layer(6, 7, batch_first=True), nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(F.silu(self.first(x))))
        return self.linear(self.r(x.flatten(2).transpose(1, 2)[:, :5])[0][:, -1])


class Outer(nn.Module):
    """Bilinear pooling of two maps, or of one with itself."""

    def __init__(self, *, itself: bool = False, layer: bool = False):
        super().__init__()
        self.first, self.a, self.b = conv_norm(3, 7), conv_norm(7, 6), conv_norm(7, 4)
        self.itself, self.bilinear = itself, nn.Bilinear(6, 4, 24) if layer else None
        self.linear = nn.Linear(36 if itself else 24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.first(x))
        a, b = F.silu(self.a(x)).flatten(2), F.silu(self.b(x)).flatten(2)
        if self.bilinear is not None:
            return self.linear(F.silu(self.bilinear(a.mean(2), b.mean(2))))
        return self.linear((a @ (a if self.itself else b).transpose(1, 2)).flatten(1) / 64)


ROUND = "where axes of different channels become one"
BEYOND = {
    "LSTM": Case(lambda: Recurrent(nn.LSTM), "first.0 4", {"stem.0": r" in r\b|of a LSTM"}),
    "GRU": Case(
        lambda: Recurrent(nn.GRU),
        "first.0 4",
        {"stem.0": r"r\.weight_ih_l0, a parameter of a GRU, before which no gate", "r.weight_ih_l0": r" in r\b"},
    ),
    "bilinear pooling": Case(Outer, "first.0 7", {"a.0": f"view gives .* 2 x 24, {ROUND}", "b.0": ROUND}),
    "of one map": Case(lambda: Outer(itself=True), "first.0 7", {"a.0": f"^view gives the shape 2 x 36, {ROUND}"}),
    "nn.Bilinear": Case(
        lambda: Outer(layer=True),
        "first.0 7",
        {
            root: r"^its channels pass through trilinear in bilinear, for which there is no rule"
            for root in ("a.0", "b.0")
        },
    ),
}

CASES = {**FLATTENED, **TOKENS, **NORMS, **BEYOND}
assert len(CASES) == len(FLATTENED) + len(TOKENS) + len(NORMS) + len(BEYOND)


# A norm without parameters has nothing to cut, and its num_features stays as it was.
@pytest.mark.filterwarnings("ignore:input's size at dim=1 does not match num_features:UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_layers_beyond_convolutions(name):
    check(CASES[name])


@pytest.mark.parametrize("name", ["ConvNeXt", "LayerNorm", "GroupNorm of one", "GroupNorm of two"])
def test_a_norm_over_the_channels_is_approximate_where_that_is_taken(name):
    network = network_of(CASES[name])
    groups = groups_of(network, allow_approximate=True)
    stem = groups.groups[0]
    assert (stem.root, stem.status) == ("stem.0", "approximate")
    assert stem.difference is not None and stem.difference > EXACT
    assert "takes statistics over its channels" in stem.reason
    exact = [group for group in groups.groups if group.status == "exact"]
    assert described(exact) == CASES[name].prunable
    check_law(network, exact)
