"""Shift and flip of a batch against a plain loop over its images."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vpdeploy.data.augment import augment


def picture(n: int, side: int) -> Tensor:
    return torch.randint(1, 256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(side))


def draw(n: int, side: int, how: str, seed: int) -> tuple[Tensor, Tensor]:
    """What augment draws: (down, right) [2, n] and flip [n]."""
    generator = torch.Generator().manual_seed(seed)
    margin = max(1, side // 8)
    shift = torch.zeros(2, n, dtype=torch.int64)
    if "crop" in how:
        shift = torch.randint(-margin, margin + 1, (2, n), generator=generator)
    flip = torch.rand(n, generator=generator) < 0.5 if "flip" in how else torch.zeros(n, dtype=torch.bool)
    return shift, flip


def one_by_one(images: Tensor, shift: Tensor, flip: Tensor) -> Tensor:
    out = torch.zeros_like(images)
    side = images.shape[-1]
    for i, image in enumerate(images):
        down, right = int(shift[0, i]), int(shift[1, i])
        for y in range(side):
            for x in range(side):
                if 0 <= y - down < side and 0 <= x - right < side:
                    out[i, :, y, x] = image[:, y - down, x - right]
        if flip[i]:
            out[i] = out[i].flip(2)
    return out


@pytest.mark.parametrize("how", ["crop", "flip", "crop-flip", "none"])
@pytest.mark.parametrize("side", [1, 2, 5, 16])
def test_equals_a_loop_over_images(how, side):
    images = picture(12, side)
    before = images.clone()
    got = augment(images, how, generator=torch.Generator().manual_seed(3))
    assert got.dtype == torch.uint8 and got.shape == images.shape and got.is_contiguous()
    assert torch.equal(got, one_by_one(images, *draw(12, side, how, 3)))
    assert torch.equal(images, before)


def test_any_memory_layout_gives_the_same():
    images = picture(6, 16)
    for other in (images.to(memory_format=torch.channels_last), images.repeat(1, 1, 1, 2)[..., :16]):
        a, b = (augment(x, "crop-flip", generator=torch.Generator().manual_seed(0)) for x in (images, other))
        assert torch.equal(a, b)


@given(st.integers(0, 2**31), st.sampled_from(["crop", "flip", "crop-flip"]))
def test_the_generator_alone_decides(seed, how):
    images = picture(4, 8)
    a, b = (augment(images, how, generator=torch.Generator().manual_seed(seed)) for _ in range(2))
    assert torch.equal(a, b)


def test_every_shift_occurs_and_half_are_flipped():
    n, side = 4000, 16
    images = torch.zeros(n, 3, side, side, dtype=torch.uint8)
    images[:, :, 8, 4] = 255
    out = augment(images, "crop-flip", generator=torch.Generator().manual_seed(0))
    at = out[:, 0].flatten(1).argmax(1)
    down, column = at // side - 8, at % side
    assert sorted(down.unique().tolist()) == [-2, -1, 0, 1, 2]
    assert sorted(column.unique().tolist()) == [2, 3, 4, 5, 6, 9, 10, 11, 12, 13]  # 4 + shift, or mirrored: 11 - shift
    flipped = float((column >= 8).float().mean())
    assert abs(flipped - 0.5) < 0.04  # five standard deviations of 4000 fair draws


def test_an_empty_batch_stays_empty():
    assert augment(picture(0, 8), "crop", generator=torch.Generator()).shape == (0, 3, 8, 8)
