"""From a recipe's [data] table to three splits of image names. Nothing is decoded here, and torch is not imported."""

from __future__ import annotations

import difflib

from vpdeploy.data.digits import open_digits
from vpdeploy.data.folders import open_imagefolder
from vpdeploy.data.refs import DataSource, ImageRefs, Opened
from vpdeploy.data.splits import limit, split_off
from vpdeploy.data.torchvision_sets import SETS, open_torchvision
from vpdeploy.errors import DataError
from vpdeploy.recipe.tables import DataTable

__all__ = ["DataSource", "ImageRefs", "open_source"]

KNOWN = ("digits", "imagefolder", *SETS)
DIGITS_TEST_FRACTION = 0.2
# The second number of each seed: one stream must not change when another draws more.
TEST, VAL, LIMIT_TRAIN, LIMIT_TEST = range(4)


def open_source(table: DataTable, *, seed: int) -> DataSource:
    """The three splits that ``table`` asks for.

    val is the set's own where it stands beside train and test (then ``val_fraction`` is not used), otherwise split off
    train; ``limit_train`` cuts what is left. The same files, table and seed give the same splits.

    Raises: DataError when the data is missing, or too poor to be split.
    """
    opened = _open(table)
    train, val, test = _own_splits(opened, table, seed=seed)
    if val is None:
        train, val = split_off(
            train, table.val_fraction, seed=(seed, VAL), key="data.val_fraction", part="val", classes=opened.classes
        )
    return DataSource(
        opened.classes,
        limit(train, table.limit_train, seed=(seed, LIMIT_TRAIN)),
        val,
        limit(test, table.limit_test, seed=(seed, LIMIT_TEST)),
        opened.fingerprint,
        opened.files,
    )


def _open(table: DataTable) -> Opened:
    if table.name == "digits":
        return open_digits()
    if table.name == "imagefolder":
        return open_imagefolder(table.root, max_pixels=table.max_pixels)
    if table.name in SETS:
        return open_torchvision(table)
    raise DataError(unknown_set(table.name))


def unknown_set(name: str) -> str:
    near = difflib.get_close_matches(name, KNOWN, n=1, cutoff=0.5)
    advice = f"did you mean {near[0]!r}?" if near else "choose one of them"
    return f"data.name: got {name!r}; expected one of {', '.join(KNOWN)}; {advice}"


def _own_splits(opened: Opened, table: DataTable, *, seed: int) -> tuple[ImageRefs, ImageRefs | None, ImageRefs]:
    """(train, val, test); val is None when it is yet to be split off train."""
    splits = opened.splits
    if "test" in splits:
        return splits["train"], splits.get("val"), splits["test"]
    if "val" in splits:
        return splits["train"], None, splits["val"]
    fraction = table.test_fraction or (DIGITS_TEST_FRACTION if table.name == "digits" else None)
    if fraction is None:
        raise DataError(_no_test(opened, table))
    whole = splits["train"] if "train" in splits else splits["all"]
    train, test = split_off(
        whole, fraction, seed=(seed, TEST), key="data.test_fraction", part="test", classes=opened.classes
    )
    return train, None, test


def _no_test(opened: Opened, table: DataTable) -> str:
    if table.name != "imagefolder":
        return f"data: {opened.where} brings no test split; set data.test_fraction (0.2, say) to split one off"
    folders = ", ".join(opened.classes[:8]) + (", ..." if len(opened.classes) > 8 else "")
    return (
        f"data: {opened.where} has no test split, only class folders ({folders}); expected train/CLASS/* and"
        " test/CLASS/*: add test/, or set data.test_fraction to split one off"
    )
