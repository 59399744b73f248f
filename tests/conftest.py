"""One thread, fixed examples and no deadlines: a test says the same on every machine, however busy it is."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))  # strategies, tiny and tolerances, from every folder of tests
torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
settings.register_profile("laws", deadline=None, derandomize=True, max_examples=15, database=None)
settings.load_profile("laws")


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory) -> Iterator[None]:
    """What is kept between runs is kept for these tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real images and checkpoints: $VPDEPLOY_TEST_DATA, or ``shared`` beside the checkout."""
    folder = Path(os.environ.get("VPDEPLOY_TEST_DATA") or Path(__file__).resolve().parents[2] / "shared")
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: set VPDEPLOY_TEST_DATA to the folder with real images and checkpoints")
    return folder
