"""The one resize: what it keeps, for every size."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from vpdeploy.data.resize import PIXEL_SCALE, resize

HOWS = ["stretch", "shorter-side-crop"]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("how", HOWS)
@settings(max_examples=30, deadline=None)
@given(h=st.integers(1, 90), w=st.integers(1, 90), size=st.integers(1, 48), seed=st.integers(0, 99))
def test_any_size_becomes_a_square_within_the_range_of_its_pixels(how, h, w, size, seed):
    image = noise(2, h, w, 3, seed=seed)
    result = resize(image, size, how=how)
    assert result.shape == (2, 3, size, size) and result.dtype == torch.float32 and result.is_contiguous()
    lowest, highest = image.amin((1, 2)) / 255, image.amax((1, 2)) / 255
    assert (result.amin((2, 3)) >= lowest - 1e-5).all() and (result.amax((2, 3)) <= highest + 1e-5).all()
    assert result.min() >= 0 and result.max() <= 1


@settings(max_examples=60, deadline=None)
@given(
    h=st.integers(1, 300) | st.integers(3000, 70000), w=st.integers(1, 90), size=st.integers(1, 48), turn=st.booleans()
)
def test_it_is_the_antialiased_bilinear_resize_that_torch_computes_in_float64(h, w, size, turn):
    """The tolerance is float32's: a sum of t positive terms is off by at most t units in the last place of its value."""
    h, w = (h, w) if h < 3000 else (h, 2)
    h, w = (w, h) if turn else (h, w)
    image = noise(1, h, w, 3)
    wanted = F.interpolate(image.permute(0, 3, 1, 2).double(), size=(size, size), mode="bilinear", antialias=True) / 255
    taps = sum(2 * max(1, m / size) + 1 for m in (h, w))
    tolerance = (taps + 8) * torch.finfo(torch.float32).eps
    assert torch.allclose(resize(image, size, how="stretch").double(), wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("how", HOWS)
def test_an_image_of_the_right_size_is_only_scaled(how):
    image = noise(3, 17, 17, 3)
    assert torch.equal(resize(image, 17, how=how), image.permute(0, 3, 1, 2).float() * PIXEL_SCALE)


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (700, 1), (4000, 3)])
def test_the_smallest_and_the_most_oblong_images_work(how, shape):
    image = torch.full((1, *shape, 3), 51, dtype=torch.uint8)
    assert torch.allclose(resize(image, 9, how=how), torch.tensor(0.2), atol=1e-6)


@pytest.mark.parametrize("how", HOWS)
def test_each_image_of_a_batch_is_resized_on_its_own(how):
    image = noise(3, 40, 23, 3)
    alone = torch.cat([resize(one[None], 16, how=how) for one in image])
    assert torch.allclose(resize(image, 16, how=how), alone, atol=1e-6)


@pytest.mark.parametrize(("h", "w", "top", "left"), [(20, 31, 0, 5), (31, 20, 5, 0), (20, 30, 0, 5), (1, 4, 0, 1)])
def test_the_crop_is_the_central_square(h, w, top, left):
    image = noise(2, h, w, 3)
    side = min(h, w)
    square = image[:, top : top + side, left : left + side]
    assert torch.equal(resize(image, 8, how="shorter-side-crop"), resize(square, 8, how="stretch"))


def test_a_reduction_averages_what_it_leaves_out():
    """Without antialiasing a fine checkerboard becomes black or white instead of grey."""
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    board = (((rows + columns) % 2) * 255).to(torch.uint8)[None, ..., None].expand(1, 64, 64, 3)
    inner = resize(board, 8, how="stretch")[..., 1:-1, 1:-1]
    assert torch.allclose(inner, torch.tensor(0.5), atol=0.01)
