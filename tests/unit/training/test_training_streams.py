"""Random streams: each is its own, none depends on what ran before, and the global ones are put back."""

from __future__ import annotations

from typing import Any

import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vpdeploy.training.loop import training_batches
from vpdeploy.training.network import build_canvas, restart_prompt
from vpdeploy.training.streams import derive, seeded, stream

PARTS = st.tuples(st.integers(0, 2**31), st.lists(st.one_of(st.text(max_size=4), st.integers(0, 99)), max_size=4))
PURPOSES = ("order", "augment", "prompt", "global", "scores")


def batches(**values: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    plain: dict[str, Any] = {"seed": 7, "stage": "tune", "epoch": 0, "how": "crop-flip"}
    return list(training_batches(tiny.images(28, seed=0), 8, **{**plain, **values}))


def pixels(**values: Any) -> Tensor:
    return torch.cat([x for x, _, _ in batches(**values)])


def labels(**values: Any) -> list[int]:
    return torch.cat([y for _, y, _ in batches(**values)]).tolist()


@given(PARTS, PARTS)
def test_a_seed_depends_on_every_part(first: tuple[int, list[Any]], second: tuple[int, list[Any]]) -> None:
    (a, more), (b, rest) = first, second
    same = (a, more) == (b, rest)
    assert (derive(a, *more) == derive(b, *rest)) == same
    assert 0 <= derive(a, *more) < 2**63


def test_parts_do_not_run_into_one_another() -> None:
    assert len({derive(1, "a", "b"), derive(1, "ab"), derive(1, "a", "b", ""), derive(1, "1"), derive(1, 1)}) == 5


def test_a_stream_belongs_to_seed_stage_epoch_and_purpose() -> None:
    keys = [(s, stage, e, p) for s in (7, 8) for stage in ("fit", "tune") for e in (0, 1) for p in PURPOSES]
    first = {key: torch.rand(4, generator=stream(*key)).tolist() for key in keys}
    torch.rand(3)  # what else is drawn does not matter
    assert first == {key: torch.rand(4, generator=stream(*key)).tolist() for key in reversed(keys)}
    assert len({tuple(numbers) for numbers in first.values()}) == len(keys)


def test_places_say_which_images_a_batch_holds() -> None:
    images = tiny.images(28, seed=0)
    assert images.pixels is not None
    for seen, labels, places in batches(how="none"):
        assert torch.equal(seen, images.pixels[places]) and torch.equal(labels, images.labels[places])


def test_order_does_not_depend_on_augmentation() -> None:
    assert labels(how="none") == labels(how="flip") == labels(how="crop-flip")
    assert not torch.equal(pixels(how="none"), pixels(how="crop-flip"))


def test_batches_are_the_same_again_and_differ_between_epochs_stages_and_seeds() -> None:
    assert torch.equal(pixels(), pixels())
    orders = [labels(**values) for values in ({}, {"epoch": 1}, {"stage": "fit"}, {"seed": 8})]
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_the_prompts_places_belong_to_the_epoch() -> None:
    recipe = tiny.recipe({"prompt.pixels.kind": "random"})
    canvas = build_canvas(recipe, prompted=True)
    image = torch.full((1, 3, tiny.SIZE, tiny.SIZE), 0.5)

    def places(*, stage: str, epoch: int) -> list[list[int]]:
        assert canvas.prompt is not None
        with torch.no_grad():
            next(canvas.prompt.parameters()).fill_(0.25)
        restart_prompt(canvas.train(), seed=7, stage=stage, epoch=epoch)
        shown = [canvas.place(image) - canvas.place(image, prompted=False) for _ in range(6)]
        return [x[0, 0].nonzero()[0].tolist() for x in shown]

    first = places(stage="search", epoch=0)
    drawn = [places(stage="search", epoch=1), places(stage="tune", epoch=0)]
    assert first == places(stage="search", epoch=0)
    assert first not in drawn and drawn[0] != drawn[1]


def test_the_place_of_export_is_the_recipes() -> None:
    """Arms and stages build their prompts anew: all of them must mean the same place."""
    canvases = [build_canvas(tiny.recipe({"prompt.pixels.kind": "random"}), prompted=True) for _ in range(2)]
    first, second = (canvas.state_dict()["prompt.place"] for canvas in canvases)
    assert torch.equal(first, second)


def test_global_streams_are_seeded_for_a_block_and_put_back() -> None:
    def drawn(epoch: int) -> list[float]:
        with seeded(7, "fit", epoch):
            return torch.nn.functional.dropout(torch.ones(64)).tolist()

    with torch.random.fork_rng():
        torch.manual_seed(1)
        expected = torch.rand(4).tolist()
        torch.manual_seed(1)
        first = drawn(0)
        assert torch.rand(4).tolist() == expected
        assert drawn(0) == first != drawn(1)
