"""Law 11: on a canvas larger than the image the first step moves the frame, and a clamped pixel can return."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import COMPUTE, network
from tolerances import CLOSED_FORM_FLOAT64
from torch import Tensor

from vpdeploy.prompts.canvas import Canvas
from vpdeploy.prompts.clamp import clamp
from vpdeploy.prompts.pixels import build_prompt
from vpdeploy.training.network import Prompted

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
PIXELS = st.one_of(st.sampled_from([-1.0, -0.0, 0.0, 1.0, 2.0]), st.floats(-3, 3, allow_subnormal=False))
GRADIENTS = st.floats(-5, 5, allow_subnormal=False)


def backward(x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """What the clamp gives for ``x``, and the gradient that reaches ``x`` when ``gradient`` comes in."""
    leaf = x.clone().requires_grad_(True)
    out = clamp(leaf)
    out.backward(gradient)
    assert leaf.grad is not None
    return out.detach(), leaf.grad


def framed(image_size: int, canvas_size: int, *, kind: str = "pad", size: int) -> Canvas:
    prompt = build_prompt(kind, canvas_size=canvas_size, size=size, seed=3)
    return Canvas(image_size, canvas_size, mean=MEAN, std=STD, prompt=prompt).double()


@given(st.lists(st.tuples(PIXELS, GRADIENTS), min_size=1, max_size=30))
def test_only_a_step_further_out_is_stopped(pairs: list[tuple[float, float]]) -> None:
    x, gradient = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    out, found = backward(x, gradient)
    assert torch.equal(out, x.clamp(0, 1))
    for value, came, passed in zip(x.tolist(), gradient.tolist(), found.tolist(), strict=True):
        step_down, step_up = came > 0, came < 0  # descent moves against the gradient
        stopped = (value <= 0 and step_down) or (value >= 1 and step_up)
        assert passed == (0.0 if stopped else came), (value, came)


@given(st.lists(st.tuples(st.floats(0, 1, exclude_min=True, exclude_max=True), GRADIENTS), min_size=1, max_size=30))
def test_inside_the_gradient_is_the_identity(pairs: list[tuple[float, float]]) -> None:
    x, gradient = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    assert torch.equal(backward(x, gradient)[1], gradient)


@pytest.mark.parametrize("bound", [0.0, 1.0])
def test_torchs_own_clamp_is_no_substitute(bound: float) -> None:
    """Why there is one of our own: beyond a bound, torch's lets no step back in pass."""
    inward = torch.tensor([-1.0 if bound == 0 else 1.0], dtype=torch.float64)
    beyond = torch.tensor([bound + (-0.5 if bound == 0 else 0.5)], dtype=torch.float64)
    leaf = beyond.clone().requires_grad_(True)
    leaf.clamp(0, 1).backward(inward)
    assert leaf.grad is not None and leaf.grad.item() == 0
    assert torch.equal(backward(beyond, inward)[1], inward)


def test_nothing_is_recorded_without_a_gradient() -> None:
    x = torch.tensor([-0.5, 0.5, 1.5], requires_grad=True)
    with torch.no_grad():
        assert not clamp(x).requires_grad
    assert torch.equal(clamp(x.detach()), torch.tensor([0.0, 0.5, 1.0]))


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 2**16))
def test_the_first_step_moves_the_frame(image_size: int, border: int, seed: int) -> None:
    """Zero delta on zero padding: the frame's gradient is the incoming one wherever descent brightens, and nowhere else."""
    canvas = framed(image_size, image_size + 2 * border, size=border)
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(2, 3, image_size, image_size, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, *(image_size + 2 * border,) * 2, generator=generator, dtype=torch.float64)
    (canvas(image) * weight).sum().backward()
    assert canvas.prompt is not None
    came = 2 * weight * canvas.inverse_std  # of both images
    found = torch.cat([p.grad.flatten() for p in canvas.prompt.parameters() if p.grad is not None])
    passed = came.clamp(max=0)
    inner = slice(border, border + image_size)
    expected = [passed[:, :border], passed[:, -border:], passed[:, inner, :border], passed[:, inner, -border:]]
    torch.testing.assert_close(
        found, torch.cat([part.flatten() for part in expected]), rtol=CLOSED_FORM_FLOAT64, atol=0
    )
    assert found.count_nonzero() == sum(int((part < 0).sum()) for part in expected) > 0


@given(st.sampled_from(["pad", "fix", "random"]), st.integers(0, 2**16))
def test_the_first_step_through_a_network_moves_the_prompt(kind: str, seed: int) -> None:
    canvas = framed(8, 12, kind=kind, size=2)
    net = Prompted(canvas, network(seed=seed).double(), COMPUTE).train()
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(4, 3, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (4,), generator=generator)
    torch.nn.functional.cross_entropy(net(images), labels).backward()
    assert canvas.prompt is not None
    for name, parameter in canvas.prompt.named_parameters():
        assert parameter.grad is not None and parameter.grad.count_nonzero() > 0, name


@given(st.floats(-1, 2), st.floats(0.05, 0.95))
def test_a_pixel_outside_the_range_returns(start: float, target: float) -> None:
    """Descent on the distance to a colour inside the range reaches it from anywhere."""
    canvas = framed(4, 8, size=2)
    assert canvas.prompt is not None
    with torch.no_grad():
        for parameter in canvas.prompt.parameters():
            parameter.fill_(start)
    optimizer = torch.optim.SGD(canvas.prompt.parameters(), lr=0.25)
    image = torch.zeros(1, 3, 4, 4, dtype=torch.float64)
    for _ in range(80):  # from 1 beyond a bound each step takes at least 0.25 * 2 * 0.05
        optimizer.zero_grad()
        placed = canvas.place(image)[0]
        (placed - target).square().sum().backward()
        optimizer.step()
    for parameter in canvas.prompt.parameters():
        torch.testing.assert_close(
            parameter.detach(), torch.full_like(parameter, target), rtol=0, atol=CLOSED_FORM_FLOAT64
        )
