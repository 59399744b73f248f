"""Prepared and raw batches: in memory and streamed alike."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch

from vpdeploy.data import raw
from vpdeploy.data.prepared import Images, batches, prepare
from vpdeploy.data.raw import raw_batches, some_images
from vpdeploy.data.refs import ImageRefs
from vpdeploy.data.resize import resize
from vpdeploy.errors import DataError
from vpdeploy.progress import Display
from vpdeploy.recipe.tables import InputTable

SIDE = 12
SIZES = ((12, 12), (30, 17), (5, 9), (140, 130))  # the same, larger, smaller, and above the size resized in blocks


def pictures(n: int, *, bad: frozenset[int] = frozenset(), sizes=SIZES) -> tuple[ImageRefs, list[np.ndarray]]:
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*sizes[i % len(sizes)], 3), dtype=np.uint8) for i in range(n)]

    def read(i: int) -> np.ndarray:
        if i in bad:
            raise DataError(f"image {i}: truncated")
        return images[i]

    return ImageRefs(tuple(f"image {i}" for i in range(n)), tuple(i % 3 for i in range(n)), read), images


def ready(
    refs: ImageRefs, *, max_bad: Literal["fail", "skip"] = "fail", how="stretch", workers=2, in_memory=True
) -> Images:
    table = InputTable.model_validate({"image_size": SIDE, "resize": how})
    return prepare(
        refs, table, max_bad=max_bad, workers=workers, display=Display(quiet=True), label="train",
        memory_fraction=0.3 if in_memory else 0.0,
    )  # fmt: skip


def walked(images, order, batch_size=7):
    got = list(batches(images, order, batch_size))
    return torch.cat([x for x, _ in got]), torch.cat([y for _, y in got]), [len(y) for _, y in got]


@pytest.mark.parametrize("how", ["stretch", "shorter-side-crop"])
@pytest.mark.parametrize("in_memory", [True, False])
def test_every_image_is_the_deployed_resize_rounded(how, in_memory):
    refs, raw_images = pictures(20)
    images = ready(refs, how=how, in_memory=in_memory)
    assert images.in_memory is in_memory and len(images) == 20 and images.names == refs.names
    pixels, labels, lengths = walked(images, torch.arange(20))
    assert lengths == [7, 7, 6] and labels.tolist() == list(refs.labels) and labels.dtype == torch.int64
    assert pixels.dtype == torch.uint8 and pixels.shape == (20, 3, SIDE, SIDE)
    for image, got in zip(raw_images, pixels, strict=True):
        expected = resize(torch.from_numpy(image)[None], SIDE, how=how)[0] * 255
        assert (got - expected).abs().max() <= 0.5 + 1e-4


def test_streamed_equals_in_memory():
    # More images than one chunk holds, so that blocks are cut differently in the two.
    refs, _ = pictures(600, sizes=((70, 66), (12, 12), (16, 20), (16, 20)))
    order = torch.randperm(600, generator=torch.Generator().manual_seed(0))
    one, two = (walked(ready(refs, in_memory=in_memory), order, 64) for in_memory in (True, False))
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1]) and one[2] == two[2]
    assert one[1].tolist() == [refs.labels[i] for i in order.tolist()]


@pytest.mark.parametrize("first", [(16, 20), (70, 66)])  # tiny images are left to one thread
@pytest.mark.parametrize("workers", [0, 1, 5])
def test_the_number_of_threads_changes_nothing(workers, first):
    refs, _ = pictures(300, sizes=(first, (12, 12)))
    before = torch.get_num_threads()
    pixels = ready(refs, workers=workers).pixels
    assert pixels is not None and torch.equal(pixels, ready(refs).pixels)  # type: ignore[arg-type]
    assert torch.get_num_threads() == before
    streamed = ready(refs, workers=workers, in_memory=False)
    assert torch.equal(walked(streamed, torch.arange(300))[0], pixels)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("in_memory", [True, False])
def test_bad_images_are_skipped_and_named(in_memory):
    bad = frozenset({0, 5, 19})
    refs, _ = pictures(20, bad=bad)
    images = ready(refs, max_bad="skip", in_memory=in_memory)
    kept = [i for i in range(20) if i not in bad]
    assert images.skipped == ("image 0: truncated", "image 5: truncated", "image 19: truncated")
    assert len(images) == 17 and images.names == tuple(f"image {i}" for i in kept)
    pixels, labels, _ = walked(images, torch.arange(17))
    assert labels.tolist() == images.labels.tolist() == [i % 3 for i in kept]
    whole, _ = pictures(20)
    assert torch.equal(pixels, walked(ready(whole), torch.tensor(kept))[0])


def test_a_bad_image_fails_in_memory_at_once_and_streamed_when_reached():
    refs, _ = pictures(20, bad=frozenset({9, 13}))
    text = r'^image 9: truncated; or set data\.on_bad_image = "skip" to leave bad images out$'
    with pytest.raises(DataError, match=text):
        ready(refs)
    images = ready(refs, in_memory=False)
    walk = batches(images, torch.arange(20), 5)
    assert len(next(walk)[1]) == 5
    with pytest.raises(DataError, match=text):
        next(walk)


def test_nothing_but_bad_images():
    refs, _ = pictures(3, bad=frozenset(range(3)))
    with pytest.raises(DataError, match=r"^train: all 3 images are bad, the first: image 0: truncated$"):
        ready(refs, max_bad="skip")


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_walk_may_repeat_leave_out_or_stop_early(in_memory):
    refs, _ = pictures(20)
    images = ready(refs, in_memory=in_memory)
    pixels, labels, _ = walked(images, torch.tensor([3, 3, 1]))
    assert torch.equal(pixels[0], pixels[1]) and labels.tolist() == [0, 0, 1]
    assert list(batches(images, torch.arange(0), 4)) == []
    walk = batches(images, torch.arange(20), 1)
    next(walk)
    walk.close()  # type: ignore[attr-defined]


# --- raw batches ----------------------------------------------------------------------------------------------------


def test_raw_batches_hold_every_image_once_by_size():
    refs, images = pictures(23)
    seen = []
    for pixels, labels, positions in raw_batches(refs, max_bad="fail", batch_size=4, bad=[]):
        assert pixels.dtype == np.uint8 and labels.dtype == positions.dtype == np.int64
        assert 1 <= len(pixels) <= 4 and len(pixels) == len(labels) == len(positions)
        for image, label, i in zip(pixels, labels, positions, strict=True):
            np.testing.assert_array_equal(image, images[i])
            assert label == refs.labels[i]
        seen += positions.tolist()
    assert sorted(seen) == list(range(23))


def test_raw_batches_of_alternating_sizes_are_full():
    refs, _ = pictures(16, sizes=((4, 4), (5, 5)))
    assert [len(p) for _, _, p in raw_batches(refs, max_bad="fail", batch_size=4, bad=[])] == [4, 4, 4, 4]


def test_raw_batches_bound_what_waits(monkeypatch):
    monkeypatch.setattr(raw, "MAX_WAITING_BYTES", 10 * 4 * 4 * 3)
    reads: list[int] = []
    refs, _ = pictures(60, sizes=tuple((3, w) for w in range(1, 31)))  # every size twice, far apart
    watched = ImageRefs(refs.names, refs.labels, lambda i: (reads.append(i), refs.read(i))[1])
    walk = raw_batches(watched, max_bad="fail", batch_size=2, bad=[])
    next(walk)
    assert len(reads) < 12
    assert sum(len(p) for _, _, p in walk) == 59


def test_raw_batches_skip_by_name_or_fail():
    refs, _ = pictures(6, bad=frozenset({2}), sizes=((4, 4),))
    bad: list[str] = []
    positions = [p.tolist() for _, _, p in raw_batches(refs, max_bad="skip", batch_size=4, bad=bad)]
    assert positions == [[0, 1, 3, 4], [5]] and bad == ["image 2: truncated"]
    with pytest.raises(DataError, match=r'^image 2: truncated; or set data\.on_bad_image = "skip"'):
        list(raw_batches(refs, max_bad="fail", batch_size=4, bad=[]))


def test_some_images_are_spread_and_others_stand_in_for_bad_ones():
    refs, images = pictures(10)
    chosen = some_images(refs, 4, max_bad="fail")
    assert [next(i for i, image in enumerate(images) if image is one) for one in chosen] == [0, 3, 6, 9]
    worse, images = pictures(10, bad=frozenset({0, 3, 6, 9, 1}))
    chosen = some_images(worse, 4, max_bad="skip")
    assert [next(i for i, image in enumerate(images) if image is one) for one in chosen] == [2, 4, 5, 7]
    assert len(some_images(refs, 32, max_bad="fail")) == 10
    with pytest.raises(DataError, match=r"^image 0: truncated; or set"):
        some_images(worse, 4, max_bad="fail")
