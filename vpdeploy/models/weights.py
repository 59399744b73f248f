"""Tensors from checkpoint files, and into networks. Files are never unpickled beyond tensors and plain containers."""

from __future__ import annotations

import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vpdeploy.errors import ModelError

# Where training scripts put the network in what they save; the trained weights before their moving averages.
NESTED = (
    "state_dict", "model_state_dict", "model", "net", "network", "backbone", "module", "weights", "params",
    "state_dict_ema", "model_ema", "ema_state_dict", "ema",
)  # fmt: skip
WRAPPERS = ("module.", "_orig_mod.")  # DataParallel and torch.compile
LISTED = 10


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, on the CPU: a .safetensors file or one written by ``torch.save``.

    A state_dict nested under a common key is found, the prefixes of DataParallel and torch.compile are removed.

    Raises: ModelError when the file is missing or damaged, holds pickled objects, or holds no tensors.
    """
    if not path.is_file():
        what = "a folder" if path.is_dir() else "no such file"
        raise ModelError(
            f"{path}: {what}; expected a checkpoint: a .safetensors file or what torch.save(model.state_dict()) wrote: "
            "check model.weights"
        )
    content = _load_safetensors(path) if path.suffix == ".safetensors" else _load_torch(path)
    tensors = {_unwrapped(name): value for name, value in _state_dict(content, path).items()}
    tensors.pop("n_averaged", None)  # AveragedModel's counter beside the weights
    return tensors


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as e:
        raise ModelError(
            f"{path}: damaged, or no safetensors file: {e}; expected what safetensors wrote: fetch or save it again"
        ) from e


def _load_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols and TorchScript; such files fail below
            return torch.load(path, weights_only=True, map_location="cpu")
    except OSError as e:
        raise ModelError(f"{path}: cannot be read: {e}") from e
    except Exception as e:  # the unpickler meets damaged bytes with almost any exception
        text = str(e)
        named = re.search(r"GLOBAL (\S+)", text)
        # Opcodes that torch never writes, in a file that begins like a pickle: written by the pickle module itself.
        pickled = "Unsupported operand" in text and path.read_bytes()[:1] == pickle.PROTO
        if named or pickled or "TorchScript" in text:
            what = f" ({named[1]})" if named else " (TorchScript)" if "TorchScript" in text else ""
            raise ModelError(
                f"{path}: holds pickled objects{what}, which can run code when read; expected tensors only: "
                "save model.state_dict() and give that file"
            ) from e
        reason = text.splitlines()[0][:200] if text else "ends too early"
        raise ModelError(
            f"{path}: damaged, or no checkpoint: {type(e).__name__}: {reason}; expected what "
            "torch.save(model.state_dict()) wrote: fetch or save it again"
        ) from e


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """The mapping of names to tensors inside ``content``; plain values beside the tensors (an epoch) are left out."""
    while isinstance(content, Mapping):
        inner = next((content[key] for key in NESTED if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    tensors = {}
    if isinstance(content, Mapping):
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        keys = _some([repr(key) for key in content]) if isinstance(content, Mapping) else ""
        got = (
            f"a dictionary with the keys {keys or 'none'}"
            if isinstance(content, Mapping)
            else f"a {type(content).__name__}"
        )
        raise ModelError(
            f"{path}: got {got}; expected names and tensors, at the top or under one of {', '.join(NESTED)}: "
            "save model.state_dict() and give that file"
        )
    return tensors


def _unwrapped(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name.replace("._orig_mod.", ".")


def fit_names(backbone: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` under the names of ``backbone``: "model." goes and "module." returns where that makes more fit."""
    own = backbone.state_dict().keys()
    renamings: tuple[Callable[[str], str], ...] = (
        lambda name: name,
        lambda name: name.removeprefix("model."),  # Lightning's name for the network
        lambda name: f"module.{name}",  # a network that has such a part itself
    )
    candidates = [{rename(name): value for name, value in tensors.items()} for rename in renamings]
    return max(candidates, key=lambda candidate: len(own & candidate.keys()))  # the first of equals


def load_weights(backbone: nn.Module, tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Fill ``backbone`` with ``tensors``; every name and shape must fit.

    Only num_batches_tracked may be missing: old checkpoints have none, and nothing here reads it.

    Raises: ModelError that lists what is missing, unexpected or of another shape; ``backbone`` is then of no use.
    """
    own = backbone.state_dict()
    shapes = [
        f"{name} {list(tensors[name].shape)} where the network has {list(value.shape)}"
        for name, value in own.items()
        if isinstance(value, Tensor) and name in tensors and tensors[name].shape != value.shape
    ]
    if shapes:
        missing = [name for name in own if name not in tensors]
        unexpected = [name for name in tensors if name not in own]
    else:
        missing, unexpected = _fill(backbone, tensors, where=where)
    missing = [name for name in missing if name.rpartition(".")[2] != "num_batches_tracked"]
    found = (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
    problems = [f"  {len(names)} {kind}: {_some(names)}" for kind, names in found if names]
    if problems:
        raise ModelError(
            f"{where}: its {len(tensors)} tensors do not fit; expected the {len(own)} of {type(backbone).__name__}; "
            "give the checkpoint of this network, or name the network that it is of\n" + "\n".join(problems)
        )


def _fill(backbone: nn.Module, tensors: Mapping[str, Tensor], *, where: str) -> tuple[list[str], list[str]]:
    """Copy, through the network's own translations of older layouts: (missing, unexpected) names."""
    state: OrderedDict[str, Any] = OrderedDict(tensors)
    # torchvision's MNASNet refuses a state without its version; the parts' own entries stay out, because those of
    # ViT translate older names exactly when no version is told.
    state._metadata = {"": {"version": getattr(backbone, "_version", 1)}}  # type: ignore[attr-defined]
    try:
        missing, unexpected = backbone.load_state_dict(state, strict=False)
    except (RuntimeError, ValueError, TypeError) as e:
        raise ModelError(f"{where}: cannot be loaded into {type(backbone).__name__}: {e}") from e
    return list(missing), list(unexpected)


def _some(names: Sequence[str]) -> str:
    rest = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {rest} more" if rest > 0 else "")
