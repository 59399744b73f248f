"""Law 1 where code moves, splits, joins or folds channels: removal follows, or is refused with the place and the reason."""

from __future__ import annotations

import pytest
import torch
from hard_networks import Case, Piece, around, check, conv, piece
from strategies import conv_norm, shuffled
from torch import Tensor, nn
from torch.nn import functional as F

BOTH = "stem.0 8, last.0 6"
LAST = "last.0 6"
ORDER = [2, 0, 1, 3, 5, 4, 7, 6]


def refused(function, reason: str, *, root: str = "stem.0", prunable: str = LAST, **more) -> Case:
    return piece(function, prunable, refused={root: reason}, **more)


def manual_shuffle(piece: Piece, x: Tensor) -> Tensor:
    return x.view(len(x), 2, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2)


def fixed_shuffle(piece: Piece, x: Tensor) -> Tensor:
    return x.view(-1, 2, 4, 8, 8).transpose(1, 2).reshape(-1, 8, 8, 8)


def half_through(piece: Piece, x: Tensor) -> Tensor:
    still, moving = shuffled(x).chunk(2, 1)
    return torch.cat([still, F.silu(piece.a(moving))], 1)


def two_readers(parts):
    """The sum of what each layer of the piece makes of its part."""
    return lambda piece, x: sum(layer(part) for layer, part in zip(piece.children(), parts(x), strict=True))


class ShuffleUnit(nn.Module):
    """Of ShuffleNetV2: half of the channels pass, or with ``stride`` 2 both branches see all of them."""

    def __init__(self, width: int, *, stride: int = 1):
        super().__init__()
        half, self.stride = width // 2, stride
        seen = width if stride == 2 else half
        self.b = nn.Sequential(
            *conv_norm(seen, half, kernel=1), nn.ReLU(), *conv_norm(half, half, groups=half, stride=stride),
            *conv_norm(half, half, kernel=1), nn.ReLU(),
        )  # fmt: skip
        if stride == 2:
            self.a = nn.Sequential(*conv_norm(width, width, groups=width, stride=2), *conv_norm(width, half, kernel=1))

    def forward(self, x: Tensor) -> Tensor:
        a, b = (self.a(x), x) if self.stride == 2 else x.chunk(2, 1)
        return shuffled(torch.cat([a, self.b(b)], 1))


SHUFFLES = {
    "by views": piece(lambda m, x: shuffled(x, 2), "stem.0 4, last.0 6"),
    "by views in four": piece(lambda m, x: shuffled(x, 4), "stem.0 2, last.0 6"),
    "by -1": piece(manual_shuffle, "stem.0 4, last.0 6"),
    "nn.ChannelShuffle": piece(lambda m, x: m.s(x), "stem.0 4, last.0 6", s=lambda: nn.ChannelShuffle(2)),
    "one half through a layer": piece(half_through, "stem.0 2, piece.a 4, last.0 6", a=conv(4, 4)),
    "a unit of ShuffleNetV2": around(lambda: ShuffleUnit(16), "piece.b.5 8, piece.b.0 8, last.0 6", width=16),
    "units of ShuffleNetV2": around(
        lambda: nn.Sequential(ShuffleUnit(16, stride=2), ShuffleUnit(16), ShuffleUnit(16)),
        "stem.0 16, piece.0.b.0 8, piece.0.b.5 2, piece.1.b.0 8, piece.2.b.0 8, last.0 6",
        width=16,
    ),
    "fixed sizes": refused(fixed_shuffle, r"fails in last\.0.*view in piece gives the shape 2 x 2 x 4 x 8 x 8"),
    "index_select": refused(
        lambda m, x: x.index_select(1, torch.tensor(ORDER)), "^index_select in piece takes its channels by number"
    ),
    "a list": refused(lambda m, x: x[:, ORDER], "^index in piece takes its channels by number"),
    "a buffer": refused(
        lambda m, x: x[:, m.order], "^index in piece takes its channels", order=lambda: torch.tensor(ORDER)
    ),
    "roll": refused(lambda m, x: x.roll(3, 1), "^roll in piece moves its channels by number"),
    "flip": refused(lambda m, x: x.flip(1), "^flip in piece moves its channels by number"),
    "roll and flip of the map": piece(lambda m, x: x.roll((1, 2), (2, 3)).flip(3), BOTH),
    "sort": refused(lambda m, x: x.sort(1)[0], "^sort in piece runs over its channels"),
}

HALVES = {"out": 5, "a": conv(4, 5), "b": conv(4, 5)}
SLICE_4 = r"fails in piece\.a.*slice in piece takes 4 of its 8 channels by number"
PARTS = {
    "chunk": piece(two_readers(lambda x: x.chunk(2, 1)), "stem.0 4, piece.a 5, last.0 6", **HALVES),
    "chunk of a share": piece(
        lambda m, x: x[:, : x.shape[1] // 2] * x[:, x.shape[1] // 2 :], "stem.0 4, last.0 6", out=4
    ),
    "split by a number": refused(
        two_readers(lambda x: x.split(4, 1)), r"fails in piece\.a.*split in piece splits its channels into 4, 4",
        prunable="piece.a 5, last.0 6", **HALVES,
    ),
    "split unequal": piece(
        two_readers(lambda x: x.split([3, 5], 1)), "piece.a 5, last.0 6", out=5, a=conv(3, 5), b=conv(5, 5),
        refused={root: "fails in piece: .*into 3, 5" for root in ("stem.0[0:3]", "stem.0[3:8]")},
    ),
    # Its halves are as long as what is left: removal is right only where both lose as many.
    "tensor_split": piece(
        two_readers(lambda x: x.tensor_split(2, 1)), "piece.a 5, last.0 6", **HALVES,
        refused={root: SLICE_4 for root in ("stem.0[0:4]", "stem.0[4:8]")},
    ),
    # Two pairs of channels each: both lose as many under every mask that takes a share of all groups.
    "tensor_split of what was shuffled": piece(
        two_readers(lambda x: shuffled(x).tensor_split(2, 1)), "piece.a 5, last.0 6", **HALVES,
        refused={root: r"fails in piece\.a.*takes 4 of its 8" for root in ("stem.0[0:2,4:6]", "stem.0[2:4,6:8]")},
    ),
    "tensor_split in three": piece(
        two_readers(lambda x: x.tensor_split(3, 1)), "piece.a 5, last.0 6", out=5, a=conv(3, 5), b=conv(3, 5),
        c=conv(2, 5), refused={
            "stem.0[0:3]": "takes 3 of its 8", "stem.0[3:6]": "takes 3 of its 8", "stem.0[6:8]": "takes 2 of its 8"
        },
    ),
    "unbind": refused(lambda m, x: torch.stack(x.unbind(1)[::2], 1), "^unbind in piece takes one of its", out=4),
    "every second": refused(
        lambda m, x: x[:, ::2], r"fails in last\.0.*takes 4 of its 8", root="stem.0[0:1,2:3,4:5,6:7]", out=4
    ),
    "one, by number": refused(
        lambda m, x: m.a(x) * x[:, 0].unsqueeze(1), "^select in piece takes one of its channels by number",
        prunable="piece.a 8, last.0 6", a=conv(8, 8),
    ),
    "one, as a slice": refused(
        lambda m, x: m.a(x) * x[:, :1], r"^masked and removed differ by .*slice in piece takes 1 of its 8",
        prunable="piece.a 8, last.0 6", a=conv(8, 8),
    ),
    "narrow": refused(
        lambda m, x: m.a(x.narrow(1, 0, 4)), SLICE_4, root="stem.0[0:4]", prunable="piece.a 5, last.0 6", out=5,
        a=conv(4, 5),
    ),
    # What is left of the last four stands behind the first four, which stay.
    "from a number on": piece(
        lambda m, x: m.a(x[:, :4]) + m.b(x[:, 4:]), "stem.0[4:8] 4, piece.a 5, last.0 6",
        refused={"stem.0[0:4]": SLICE_4}, **HALVES,
    ),
    "no rule": refused(
        lambda m, x: x.index_fill(1, torch.tensor([2]), 0.0),
        "^its channels pass through index_fill in piece, for which there is no rule",
    ),
    "a part times two, in place": piece(
        lambda m, x: twice_in_place(m.b(m.a(x))), "stem.0 8, piece.a 8, last.0 6",
        refused={"piece.b": "^masked and removed differ by .*slice in piece takes 4 of its 8"},
        a=conv(8, 8), b=conv(8, 8),
    ),
}  # fmt: skip


def twice_in_place(x: Tensor) -> Tensor:
    x.relu_().add_(1)
    x[:, :4].mul_(2)
    return x


CAT_A = {"a": conv(8, 5)}
JOINS = {
    "cat": piece(lambda m, x: torch.cat([x, F.silu(m.a(x))], 1), "stem.0 8, piece.a 5, last.0 6", out=13, **CAT_A),
    "cat with itself": piece(lambda m, x: torch.cat([x, x], 1), BOTH, out=16),
    "cat and a slice at a width": piece(
        lambda m, x: F.silu(m.b(torch.cat([x, m.a(x)], 1)[:, x.shape[1] :])),
        "stem.0 8, piece.a 5, piece.b 6, last.0 6", out=6, **CAT_A, b=conv(5, 6),
    ),
    "cat and a slice at a number": piece(
        lambda m, x: F.silu(m.b(torch.cat([x, m.a(x)], 1)[:, :10])), "piece.b 6, last.0 6", out=6, b=conv(10, 6), **CAT_A,
        refused={root: r"fails in piece\.b.*takes 10 of its 13" for root in ("stem.0", "piece.a[0:2]")},
    ),
    "cat and a slice from behind": piece(
        lambda m, x: torch.cat([x, m.a(x)], 1)[:, -5:], BOTH, out=5, refused={"piece.a": "takes 5 of its 13"}, **CAT_A
    ),
    "repeat": piece(lambda m, x: x.repeat(1, 2, 1, 1), BOTH, out=16),
    "repeat_interleave": piece(lambda m, x: x.repeat_interleave(2, 1), BOTH, out=16),
    "stack and maximum": piece(lambda m, x: torch.stack([x, m.a(x)], 1).amax(1), BOTH, a=conv(8, 8)),
    "pad shortcut": piece(
        lambda m, x: F.pad(x, (0, 0, 0, 0, 2, 2)) + m.a(x), BOTH, out=12, a=conv(8, 12),
        refused={"piece.a[0:2,10:12]": "^constant_pad_nd in piece pads its channels with zeros"},
    ),
    "pad at one end": piece(lambda m, x: F.pad(x, (0, 0, 0, 0, 0, 4)), BOTH, out=12),
    "zeros beside it": piece(
        lambda m, x: torch.cat([x, x.new_zeros(len(x), 4, 8, 8)], 1) + m.a(x), BOTH, out=12, a=conv(8, 12),
        refused={"piece.a[8:12]": "^cat in piece joins its channels with values that stay"},
    ),
    "as many zeros beside it": piece(
        lambda m, x: torch.cat([x, torch.zeros_like(x)], 1) + m.a(x), BOTH, out=16, a=conv(8, 16)
    ),
    "sliced into zeros": piece(
        lambda m, x: into_zeros(x) + m.a(x), LAST, out=12, a=conv(8, 12),
        refused={"stem.0": "^copy in piece combines its", "piece.a": "^add in piece combines its channels with"},
    ),
}  # fmt: skip


def into_zeros(x: Tensor) -> Tensor:
    wider = x.new_zeros(len(x), x.shape[1] + 4, *x.shape[2:])
    wider[:, 2 : 2 + x.shape[1]] = x
    return wider


def unshuffled_by_views(piece: Piece, x: Tensor) -> Tensor:
    return x.view(len(x), -1, 4, 2, 4, 2).permute(0, 1, 3, 5, 2, 4).reshape(len(x), -1, 4, 4)


def shuffled_by_views(piece: Piece, x: Tensor) -> Tensor:
    return x.view(len(x), -1, 2, 2, 8, 8).permute(0, 1, 4, 2, 5, 3).reshape(len(x), -1, 16, 16)


def corners(piece: Piece, x: Tensor) -> Tensor:
    return torch.cat([x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)], 1)


FOLDS = {
    "F.glu": piece(lambda m, x: F.glu(x, 1), "stem.0 4, last.0 6", out=4),
    "nn.GLU": piece(lambda m, x: m.g(x), "stem.0 4, last.0 6", out=4, g=lambda: nn.GLU(1)),
    "chunk and sigmoid": piece(
        lambda m, x: x.chunk(2, 1)[0] * torch.sigmoid(x.chunk(2, 1)[1]), "stem.0 4, last.0 6", out=4
    ),
    "maxout": piece(lambda m, x: x.view(len(x), -1, 2, 8, 8).amax(2), "stem.0 4, last.0 6", out=4),
    "pixel_shuffle": piece(lambda m, x: F.pixel_shuffle(x, 2), "stem.0 4, last.0 6", width=16, out=4),
    "pixel_shuffle by views": piece(shuffled_by_views, "stem.0 4, last.0 6", width=16, out=4),
    "pixel_unshuffle": piece(lambda m, x: F.pixel_unshuffle(x, 2), BOTH, out=32),
    "pixel_unshuffle by views": piece(unshuffled_by_views, BOTH, out=32),
    "corners": piece(corners, BOTH, out=32),
    "unfold": piece(lambda m, x: F.unfold(x, 2, stride=2).unflatten(2, (4, 4)), BOTH, out=32),
}

CASES = {**SHUFFLES, **PARTS, **JOINS, **FOLDS}
assert len(CASES) == len(SHUFFLES) + len(PARTS) + len(JOINS) + len(FOLDS)


@pytest.mark.parametrize("name", CASES)
def test_moved_split_joined_and_folded_channels(name):
    check(CASES[name])
