"""A small network under a budget, for tests of what is measured before training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vpdeploy import pipeline
from vpdeploy.progress import Display
from vpdeploy.recipe.reading import parse_recipe
from vpdeploy.values import Price
from vpdeploy.workbench import Workbench, open_workbench


def workbench(folder: Path, budget: dict[str, Any], **tables: Any) -> Workbench:
    raw = {
        "model": {"name": "cifar_resnet8"},
        "data": {"name": "digits"},
        "input": {"image_size": 8, "canvas_size": 12},
        "prompt": {"pixels": {"size": 2}},
        "compute": {"precision": "fp32", "channels_last": "no"},
        "budget": budget,
        **tables,
    }
    return open_workbench(
        parse_recipe(raw, where="r", folder=folder), folder / "run", redo=None, display=Display(quiet=True)
    )


def priced(work: Workbench) -> Price:
    return pipeline.priced(work, pipeline.grouped(work))
