"""The canvas: where the image stands on it, what the prompt adds, and in which order."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vpdeploy.prompts.canvas import Canvas
from vpdeploy.prompts.pixels import PadPrompt

MEAN, STD = (0.5, 0.25, 0.0), (0.25, 0.5, 1.0)


def canvas(image_size: int, canvas_size: int, *, delta: float | None = None, size: int = 1) -> Canvas:
    prompt = None if delta is None else PadPrompt(canvas_size, size)
    if prompt is not None and delta is not None:
        with torch.no_grad():
            for parameter in prompt.parameters():
                parameter.fill_(delta)
    return Canvas(image_size, canvas_size, mean=MEAN, std=STD, prompt=prompt)


@given(st.integers(1, 9), st.integers(0, 7))
def test_the_image_stands_in_the_centre_on_zeros(size: int, more: int) -> None:
    image = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(size)) + 0.01
    placed = canvas(size, size + more).place(image)
    assert placed.shape == (2, 3, size + more, size + more)
    rows, columns = (placed[0, 0].sum(dim=1).nonzero().flatten(), placed[0, 0].sum(dim=0).nonzero().flatten())
    before, after = int(rows[0]), size + more - 1 - int(rows[-1])
    assert torch.equal(rows, columns)  # the same margin left as above
    assert 0 <= after - before <= 1  # an odd margin's extra pixel is below and to the right
    assert torch.equal(placed[..., before : before + size, before : before + size], image)
    assert placed.count_nonzero() == image.count_nonzero()


def test_a_canvas_of_the_images_size_leaves_the_image_alone() -> None:
    image = torch.rand(1, 3, 4, 4)
    assert torch.equal(canvas(4, 4).place(image), image)


def test_pad_then_prompt_then_clamp_then_normalise() -> None:
    shown = canvas(2, 4, delta=0.75).eval()(torch.full((1, 3, 2, 2), 0.5))[0]
    for colour, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
        inside, frame = (0.5 - mean) / std, (0.75 - mean) / std
        row = [frame, inside, inside, frame]
        assert shown[colour].tolist() == [[frame] * 4, row, row, [frame] * 4]


@pytest.mark.parametrize(("delta", "bound"), [(0.75, 1.0), (-0.75, 0.0)])
def test_what_prompt_and_image_give_together_is_clamped(delta: float, bound: float) -> None:
    placed = canvas(4, 4, delta=delta).place(torch.full((1, 3, 4, 4), 0.5))[0, 0]
    assert placed.tolist() == [[bound] * 4, [bound, 0.5, 0.5, bound], [bound, 0.5, 0.5, bound], [bound] * 4]


def test_the_prompt_can_be_left_out_of_one_forward() -> None:
    prompted, plain = canvas(2, 4, delta=0.75), canvas(2, 4)
    image = torch.rand(1, 3, 2, 2)
    assert torch.equal(prompted.place(image, prompted=False), plain.place(image))


def test_the_prompt_is_all_that_a_canvas_keeps() -> None:
    """mean and std are the recipe's, not a checkpoint's."""
    assert {name.partition(".")[0] for name in canvas(2, 4, delta=0.0).state_dict()} == {"prompt"}
    assert not canvas(2, 4).state_dict()
