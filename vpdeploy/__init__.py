"""vpdeploy: structured pruning of vision models, from a trained network to a verified ONNX file."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vpdeploy.api import (
        Budget,
        ExportSpec,
        PruneResult,
        Scored,
        cut,
        export_onnx,
        find_groups,
        gated,
        load_plan,
        prune_once,
        save_plan,
    )
    from vpdeploy.surgery.limit import Limit

__all__ = [
    "Budget",
    "ExportSpec",
    "Limit",
    "PruneResult",
    "Scored",
    "cut",
    "export_onnx",
    "find_groups",
    "gated",
    "load_plan",
    "prune_once",
    "save_plan",
]


def __getattr__(name: str) -> Any:
    """Fetched when first asked for: importing torch takes seconds, and the command line often needs none of it."""
    if name not in __all__:
        raise AttributeError(f"module 'vpdeploy' has no attribute {name!r}")
    return getattr(import_module("vpdeploy.surgery.limit" if name == "Limit" else "vpdeploy.api"), name)
