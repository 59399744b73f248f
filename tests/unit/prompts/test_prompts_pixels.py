"""Pixel prompts: how many values they learn, where those stand on the canvas, and how a moving one moves."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vpdeploy.prompts.pixels import FixPrompt, PadPrompt, RandomPrompt, build_prompt

frames = st.integers(3, 24).flatmap(lambda c: st.tuples(st.just(c), st.integers(1, (c - 1) // 2)))


def filled(prompt: nn.Module, seed: int = 0) -> nn.Module:
    """Every learned value different from 0, and from one another."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.1)
    return prompt


def learned(prompt: nn.Module) -> int:
    return sum(p.numel() for p in prompt.parameters())


@given(frames)
def test_a_frame_has_4p_c_minus_p_values_per_colour(frame: tuple[int, int]) -> None:
    c, p = frame
    prompt = PadPrompt(c, p)
    assert learned(prompt) == 3 * 4 * p * (c - p)
    shown = filled(prompt)()
    assert shown.shape == (3, c, c)
    is_frame = torch.ones(c, c, dtype=torch.bool)
    is_frame[p : c - p, p : c - p] = False
    assert torch.equal(shown != 0, is_frame.expand(3, c, c))
    # Each value stands in one place: what is shown is what is learned, no more and no less.
    values = torch.cat([q.detach().flatten() for q in prompt.parameters()])
    assert torch.equal(shown[shown != 0].sort().values, values.sort().values)


def test_every_side_of_a_frame_stands_on_its_side() -> None:
    prompt = PadPrompt(5, 1)
    with torch.no_grad():
        for value, side in enumerate((prompt.top, prompt.bottom, prompt.left, prompt.right), start=1):
            side.fill_(value)
    expected = [[1, 1, 1, 1, 1], [3, 0, 0, 0, 4], [3, 0, 0, 0, 4], [3, 0, 0, 0, 4], [2, 2, 2, 2, 2]]
    assert prompt()[0].tolist() == expected


@given(st.integers(1, 12).flatmap(lambda c: st.tuples(st.just(c), st.integers(1, c))))
def test_a_fixed_square_stands_at_the_top_left(square: tuple[int, int]) -> None:
    c, s = square
    prompt = FixPrompt(c, s)
    assert learned(prompt) == 3 * s * s
    shown = filled(prompt)()
    assert shown.shape == (3, c, c)
    assert torch.equal(shown[:, :s, :s], prompt.square)
    assert shown.count_nonzero() == 3 * s * s


def places(prompt: RandomPrompt, count: int) -> list[tuple[int, int]]:
    """Where the square stands in ``count`` forwards."""
    found = []
    for _ in range(count):
        shown = prompt()
        assert shown.shape == (3, prompt.canvas_size, prompt.canvas_size)
        top, left = (int(v) for v in shown[0].nonzero()[0])
        side = prompt.square.shape[-1]
        assert torch.equal(shown[:, top : top + side, left : left + side], prompt.square)  # whole, never cut off
        assert shown.count_nonzero() == prompt.square.numel()
        found.append((top, left))
    return found


def test_a_random_square_moves_in_training_over_every_place() -> None:
    prompt = RandomPrompt(6, 4, seed=1)
    filled(prompt.train())
    assert learned(prompt) == 3 * 4 * 4
    assert set(places(prompt, 200)) == {(top, left) for top in range(3) for left in range(3)}


def test_a_random_square_stands_still_in_evaluation_by_seed() -> None:
    prompts = [RandomPrompt(32, 4, seed=seed) for seed in range(6)]
    again = RandomPrompt(32, 4, seed=0)
    where = []
    for prompt in [*prompts, again]:
        filled(prompt)
        places(prompt.train(), 3)  # training draws do not move the place of evaluation
        assert len(set(places(prompt.eval(), 5))) == 1
        where.append(tuple(prompt.place.tolist()))
        assert places(prompt, 1) == [where[-1]]
    assert where[0] == where[-1]
    assert len(set(where)) > 1


def test_a_random_squares_place_is_part_of_its_state() -> None:
    prompt, other = RandomPrompt(32, 4, seed=1), RandomPrompt(32, 4, seed=2)
    assert not torch.equal(prompt.place, other.place)
    other.load_state_dict(prompt.state_dict())
    assert torch.equal(prompt.place, other.place)


def test_a_random_square_can_be_copied() -> None:
    prompt = RandomPrompt(32, 4, seed=1)
    filled(prompt.train())
    assert places(copy.deepcopy(prompt), 5) == places(prompt, 5)


@pytest.mark.parametrize("kind", ["pad", "fix", "random"])
def test_every_prompt_starts_at_zero_and_learns(kind: str) -> None:
    prompt = build_prompt(kind, canvas_size=9, size=2, seed=0)
    assert prompt is not None
    shown = prompt()
    assert shown.shape == (3, 9, 9) and shown.count_nonzero() == 0
    shown.sum().backward()
    assert all(p.grad is not None and bool((p.grad == 1).all()) for p in prompt.parameters())


def test_no_prompt_is_none() -> None:
    assert build_prompt("none", canvas_size=9, size=2, seed=0) is None
