"""vpdeploy for people with a training loop of their own: groups, one-shot pruning, learned scores, cuts and export.

Nothing here trains, reads data or writes folders. A model that is given is never changed; what comes back has its dtype,
device, memory layout and training mode.
"""

from vpdeploy.api.export import ExportSpec, export_onnx, made_up_pictures
from vpdeploy.api.pruning import (
    Budget,
    PruneResult,
    cut,
    find_groups,
    load_plan,
    prepare,
    prune_once,
    save_plan,
)
from vpdeploy.api.scored import Scored, gated

__all__ = [
    "Budget",
    "ExportSpec",
    "PruneResult",
    "Scored",
    "cut",
    "export_onnx",
    "find_groups",
    "gated",
    "load_plan",
    "made_up_pictures",
    "prepare",
    "prune_once",
    "save_plan",
]
