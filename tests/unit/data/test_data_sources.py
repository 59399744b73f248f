"""Splits, limits and their messages; the embedded digits."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vpdeploy.data.refs import ImageRefs
from vpdeploy.data.sources import open_source
from vpdeploy.data.splits import limit, proportional, split_off
from vpdeploy.errors import DataError
from vpdeploy.recipe.tables import DataTable

CLASSES = ("a", "b", "c")
sizes = st.lists(st.integers(0, 60), min_size=1, max_size=8).filter(sum)


def table(**values: object) -> DataTable:
    return DataTable.model_validate(values)


def refs_of(counts) -> ImageRefs:
    labels = tuple(k for k, count in enumerate(counts) for _ in range(count))
    names = tuple(str(i) for i in range(len(labels)))
    return ImageRefs(names, labels, lambda i: np.full((1, 1, 3), i % 256, dtype=np.uint8))


def classes_of(counts) -> tuple[str, ...]:
    return tuple(f"class {k}" for k in range(len(counts)))


@given(sizes, st.data())
def test_proportional_is_exact_and_within_one_of_the_quota(counts, data):
    total = data.draw(st.integers(0, sum(counts)))
    got = proportional(np.array(counts), total)
    quota = np.array(counts) * total / sum(counts)
    assert got.sum() == total
    assert (got <= np.array(counts)).all() and (np.abs(got - quota) < 1).all()


@given(sizes.filter(lambda s: min(s) >= 4), st.floats(0.26, 0.7), st.integers(0, 5))
def test_split_off_is_a_stratified_partition(counts, fraction, seed):
    refs = refs_of(counts)
    stays, off = split_off(refs, fraction, seed=(seed, 0), key="k", part="val", classes=classes_of(counts))
    assert sorted(map(int, stays.names + off.names)) == list(range(len(refs)))
    assert len(off) == round(len(refs) * fraction)
    for k, count in enumerate(counts):
        assert abs(off.labels.count(k) - count * len(off) / len(refs)) < 1
    for part in (stays, off):
        assert [refs.labels[int(name)] for name in part.names] == list(part.labels)
        assert all(part.read(i)[0, 0, 0] == int(part.names[i]) % 256 for i in range(len(part)))
    assert list(map(int, off.names)) == sorted(map(int, off.names))


@given(sizes, st.integers(1, 200), st.integers(0, 5))
def test_limit_keeps_an_exact_number_in_proportion(counts, count, seed):
    refs = refs_of(counts)
    kept = limit(refs, count, seed=(seed, 2))
    assert len(kept) == min(count, len(refs)) and len(set(kept.names)) == len(kept)
    for k, size in enumerate(counts):
        assert abs(kept.labels.count(k) - size * len(kept) / len(refs)) < 1
    assert limit(refs, 0, seed=(seed, 2)) is refs


def test_draws_depend_on_the_seed_and_its_stream_alone():
    refs = refs_of((50, 50, 50))
    draws = [limit(refs, 30, seed=seed).names for seed in ((1, 2), (1, 2), (2, 2), (1, 3))]
    assert draws[0] == draws[1]
    assert len({draws[0], draws[2], draws[3]}) == 3


@pytest.mark.parametrize(
    ("counts", "fraction", "text"),
    [
        (
            (20, 3),
            0.1,
            "'b' has 3 images, of which 0.1 puts 0 into val; {}: raise it to 0.334, or add images of that class",
        ),
        ((20, 1), 0.1, "'b' has 1 image, of which 0.1 puts 0 into val; {}: add images of that class"),
        ((20, 2), 0.9, "'b' has 2 images, of which 0.9 puts 2 into val; {}: lower it, or add images of that class"),
    ],
)
def test_a_class_without_an_image_on_one_side(counts, fraction, text):
    with pytest.raises(DataError) as caught:
        split_off(refs_of(counts), fraction, seed=(0, 1), key="data.val_fraction", part="val", classes=CLASSES[:2])
    expected = text.format("expected at least 1 in val and 1 in train")
    assert str(caught.value) == f"data.val_fraction: class {expected}"


def test_the_fraction_that_the_message_names_suffices():
    stays, off = split_off(refs_of((20, 3)), 0.334, seed=(0, 1), key="k", part="val", classes=CLASSES[:2])
    assert Counter(off.labels)[1] >= 1 and Counter(stays.labels)[1] >= 1


# --- open_source ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return open_source(table(name="digits"), seed=7)


def test_digits(digits):
    from sklearn.datasets import load_digits

    raw: Any = load_digits()
    assert digits.classes == tuple("0123456789")
    assert (len(digits.train) + len(digits.val) + len(digits.test)) == 1797
    assert len(digits.test) == round(0.2 * 1797) and len(digits.val) == round(0.1 * (1797 - 359))
    for refs in (digits.train, digits.val, digits.test):
        i = int(refs.names[3].removeprefix("digits/"))
        image = refs.read(3)
        assert image.shape == (8, 8, 3) and image.dtype == np.uint8 and image.max() == 255
        assert np.abs(image - raw.images[i][..., None] * 255 / 16).max() <= 0.5
        assert refs.labels[3] == raw.target[i]
    everything = digits.train.names + digits.val.names + digits.test.names
    assert len(set(everything)) == 1797


def test_the_same_seed_gives_the_same_splits(digits):
    again, other = open_source(table(name="digits"), seed=7), open_source(table(name="digits"), seed=8)
    assert again.val.names == digits.val.names and again.test.names == digits.test.names
    assert other.val.names != digits.val.names and other.test.names != digits.test.names
    assert again.fingerprint == other.fingerprint == digits.fingerprint


def test_limits_leave_the_other_splits_alone(digits):
    few = open_source(table(name="digits", limit_train=100, limit_test=50), seed=7)
    assert len(few.train) == 100 and set(few.train.names) < set(digits.train.names)
    assert len(few.test) == 50 and set(few.test.names) < set(digits.test.names)
    assert few.val.names == digits.val.names
    assert max(Counter(few.train.labels).values()) - min(Counter(few.train.labels).values()) <= 1


def folder(root, counts) -> str:
    """``counts``: split/class -> number of images."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.new("RGB", (1, 1)).save(root / name / f"{i}.png")
    return str(root)


def test_val_alone_is_the_test_split(tmp_path):
    root = folder(tmp_path, {"train/a": 10, "train/b": 10, "val/a": 2, "val/b": 3})
    source = open_source(table(name="imagefolder", root=root), seed=0)
    assert [len(refs) for refs in (source.train, source.val, source.test)] == [18, 2, 5]
    assert all(name.startswith("val/") for name in source.test.names)
    assert all(name.startswith("train/") for name in source.val.names)


def test_val_beside_test_is_the_val_split(tmp_path):
    root = folder(tmp_path, {f"{split}/{k}": 2 for split in ("train", "val", "test") for k in "ab"})
    source = open_source(table(name="imagefolder", root=root, val_fraction=0.01), seed=0)
    assert [len(refs) for refs in (source.train, source.val, source.test)] == [4, 4, 4]
    assert all(name.startswith("val/") for name in source.val.names)


def test_bare_classes_need_a_test_fraction(tmp_path):
    root = folder(tmp_path, {"a": 20, "b": 20})
    source = open_source(table(name="imagefolder", root=root, test_fraction=0.5), seed=0)
    assert [len(refs) for refs in (source.train, source.val, source.test)] == [18, 2, 20]
    with pytest.raises(DataError) as caught:
        open_source(table(name="imagefolder", root=root), seed=0)
    assert str(caught.value) == (
        f"data: {root} has no test split, only class folders (a, b); expected train/CLASS/* and test/CLASS/*:"
        " add test/, or set data.test_fraction to split one off"
    )


def test_train_alone_is_split_like_bare_classes(tmp_path):
    root = folder(tmp_path, {"train/a": 10, "train/b": 10})
    source = open_source(table(name="imagefolder", root=root, val_fraction=0.25, test_fraction=0.2), seed=0)
    assert [len(refs) for refs in (source.train, source.val, source.test)] == [12, 4, 4]
    with pytest.raises(DataError, match="has no test split"):
        open_source(table(name="imagefolder", root=root), seed=0)


def test_unknown_name():
    with pytest.raises(DataError) as caught:
        open_source(table(name="cifar_10"), seed=0)
    assert "data.name: got 'cifar_10'; expected one of digits, imagefolder, cifar10" in str(caught.value)
    assert str(caught.value).endswith("did you mean 'cifar10'?")
