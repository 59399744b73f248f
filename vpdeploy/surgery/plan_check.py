"""Could this plan have been made for this network? Plans are read from files, which anybody may have written."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np
from torch import nn
from torch.nn.modules.conv import _ConvNd

from vpdeploy.errors import SurgeryError
from vpdeploy.models.attention.known import KNOWN
from vpdeploy.models.attention.replace import PREFIX
from vpdeploy.models.gather import ChannelGather
from vpdeploy.surgery.layers import Integers, Loss
from vpdeploy.surgery.plan import Flags, attributes_of, tensor_shapes
from vpdeploy.values import PrunePlan, Side

T = TypeVar("T")
SHOWN = 5  # problems in a message


def check_fit(backbone: nn.Module, plan: PrunePlan) -> None:
    """Raises: SurgeryError listing where names or shapes differ from those the plan was made for."""
    have, want = tensor_shapes(backbone), plan.fits
    wrong = [f"{name} is missing" for name in want if name not in have]
    wrong += [f"{name} is not in the plan" for name in have if name not in want]
    wrong += [
        f"{n} is {have[n]}, planned for {tuple(want[n])}" for n in want if n in have and have[n] != tuple(want[n])
    ]
    if wrong:
        raise SurgeryError(
            f"the plan does not fit network {type(backbone).__name__}: {_listed(wrong)}; "
            "use the network that the plan was made from"
        )


def check_plan(backbone: nn.Module, plan: PrunePlan) -> None:
    """Raises: SurgeryError listing what no plan for ``backbone`` says: indices that an axis does not have, attributes or
    widths that do not follow from what is kept.
    """
    check_fit(backbone, plan)
    wrong = list(_wrong_indices(plan))
    wrong = wrong or [*_wrong_attributes(backbone, plan), *_wrong_widths(backbone, plan)]  # which follow from indices
    if wrong:
        raise SurgeryError(
            f"the plan says what no plan for {type(backbone).__name__} does: {_listed(wrong)}; it was damaged or written by "
            "hand: make it again, and keep it by save_plan(plan, path)"
        )


def _listed(wrong: Sequence[str]) -> str:
    return "; ".join(wrong[:SHOWN]) + (f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else "")


def _wrong_indices(plan: PrunePlan) -> Iterator[str]:
    for name, what in plan.replacements.items():
        if what not in [PREFIX + known.path for known in KNOWN]:
            yield f"replacements: {name}: {what!r} is none that vpdeploy knows"
    for name, axes in plan.kept.items():
        if name not in plan.fits:
            yield f"kept: {name} is no tensor of the network"
            continue
        shape = plan.fits[name]
        for axis, indices in axes.items():
            where = f"kept: {name}, axis {axis}"
            if not 0 <= axis < len(shape):
                yield f"{where}: expected one of its {len(shape)} axes, counted from 0"
            elif not indices:
                yield f"{where}: keeps nothing; expected at least one index"
            elif any(b <= a for a, b in pairwise(indices)):
                yield f"{where}: expected indices that strictly ascend"
            elif indices[0] < 0 or indices[-1] >= shape[axis]:
                yield f"{where}: got indices from {indices[0]} to {indices[-1]}; expected 0 to {shape[axis] - 1}"


# --- attributes -----------------------------------------------------------------------------------------------------


def _wrong_attributes(backbone: nn.Module, plan: PrunePlan) -> Iterator[str]:
    modules = dict(backbone.named_modules(remove_duplicate=False))
    paths = [name.rpartition(".")[0] for name in plan.kept]
    for path in dict.fromkeys([*paths, *plan.attributes]):
        if path not in modules:
            yield f"attributes: {path} is no module of the network"
            continue
        try:
            expected = attributes_of(backbone, path, _losses(modules[path], path, plan))
        except SurgeryError as e:
            yield str(e)
            continue
        if dict(plan.attributes.get(path, {})) != expected:
            got = dict(plan.attributes.get(path, {}))
            yield f"attributes: {path}: got {got}; expected {expected}, which follows from what is kept"
        elif (apart := _apart(modules[path], path, plan, expected)) is not None:
            yield apart


def _losses(module: nn.Module, path: str, plan: PrunePlan) -> list[Loss]:
    """What ``module`` loses. Raises: SurgeryError for unequal parts of a convolution's groups."""
    losses = []
    for leaf, axes in _own(path, plan.kept).items():
        for axis, indices in axes.items():
            kept = np.zeros(plan.fits[_name(path, leaf)][axis], bool)
            kept[list(indices)] = True
            if not kept.all():
                side = _side(module, _name(path, leaf), axis, kept)
                losses.append(Loss(leaf, axis, side, tuple(np.flatnonzero(~kept).tolist())))
    return losses


def _side(module: nn.Module, tensor: str, axis: int, kept: Flags) -> Side:
    """Which side of ``module`` the axis is, as ``surgery.groups`` tells it."""
    if isinstance(module, ChannelGather):
        return "in" if tensor.endswith("source") else "out"
    if not isinstance(module, _ConvNd | nn.Linear) or not tensor.endswith("weight"):
        return "both"
    if isinstance(module, _ConvNd) and module.groups > 1 and axis == 0:
        rows = kept.reshape(module.groups, -1)
        if (rows == rows[:, :1]).all():
            return "both"  # whole groups go
        if not (rows == rows[0]).all():
            raise SurgeryError(
                f"kept: {tensor}, axis 0: expected whole groups of its {module.groups}, or the same of each"
            )
    return "out" if axis == _written_axis(module) else "in"


def _written_axis(module: nn.Module | None) -> int | None:
    """Of its weight, or of a gather's target; None where it is not known."""
    if isinstance(module, _ConvNd):
        return 1 if module.transposed else 0
    return 0 if isinstance(module, nn.Linear | ChannelGather) else None


def _apart(module: nn.Module, path: str, plan: PrunePlan, changed: Integers) -> str | None:
    """Where the tensors of one layer are not of one width, or None."""
    names = [_name(path, leaf) for leaf in _own(path, plan.fits)]
    if isinstance(module, _ConvNd | nn.Linear):
        bias, key = _name(path, "bias"), "out_features" if isinstance(module, nn.Linear) else "out_channels"
        width = changed.get(key, getattr(module, key))
        left = len(plan.kept.get(bias, {}).get(0, range(getattr(module, key))))
        return f"kept: {bias}: got {left} indices; expected {width}" if bias in names and left != width else None
    if isinstance(module, ChannelGather) or not changed:
        return None  # its sides, or parameters that stand by themselves, go apart
    losing = next(name for name in names if name in plan.kept)
    for name in names:
        if plan.fits[name] == plan.fits[losing] and plan.kept.get(name) != plan.kept[losing]:
            return f"kept: {name} is not cut like {losing} of the same layer"
    return None


def _own(path: str, of_tensors: Mapping[str, T]) -> dict[str, T]:
    """The entries of ``of_tensors`` for the tensors of the module ``path`` itself, by their names there."""
    return {name.rpartition(".")[2]: value for name, value in of_tensors.items() if name.rpartition(".")[0] == path}


def _name(path: str, leaf: str) -> str:
    return f"{path}.{leaf}" if path else leaf


# --- widths ---------------------------------------------------------------------------------------------------------

ROOT = re.compile(r"(?P<name>.*?)(\[(?P<ranges>\d+:\d+(,\d+:\d+)*)\])?")


def _wrong_widths(backbone: nn.Module, plan: PrunePlan) -> Iterator[str]:
    if plan.kept and all(dense == kept for dense, kept in plan.widths.values()):
        yield "widths: no group loses channels; expected those that the indices remove"
    for root, (dense, kept) in plan.widths.items():
        written = written_by(backbone, root)
        if written is None:
            yield f"widths: {root} names no layer of the network"
            continue
        shares = [_share(plan, written.tensor, axis, written.ranges) for axis in written.axes]
        if not any(dense > 0 and all_ % dense == 0 and left * dense == kept * all_ for left, all_ in shares):
            told = " or ".join(f"{left} of {all_}" for left, all_ in shares)
            yield f"widths: {root}: got {kept} of {dense}; expected what is kept of {written.tensor}: {told}"


@dataclass(frozen=True)
class Written:
    """What a group's root names: a tensor, which axes of it may be the written one, "8:24,32:40" of it or "" for all."""

    tensor: str
    axes: tuple[int, ...]
    ranges: str


def written_by(network: nn.Module, root: str) -> Written | None:
    """What ``root`` names in ``network``; None when that holds nothing of its name."""
    match = ROOT.fullmatch(root)
    name, ranges = (match["name"], match["ranges"] or "") if match else (root, "")
    shapes = tensor_shapes(network)
    tensor = next((t for t in (_name(name, "weight"), _name(name, "target"), name) if t in shapes), None)
    if tensor is None:
        return None
    axis = _written_axis(dict(network.named_modules(remove_duplicate=False)).get(name))
    return Written(tensor, tuple(range(len(shapes[tensor]))) if axis is None else (axis,), ranges)


def _share(plan: PrunePlan, tensor: str, axis: int, ranges: str) -> tuple[int, int]:
    """How many positions of an axis, of those in ``ranges``, are kept, and of how many."""
    size = plan.fits[tensor][axis]
    kept = np.zeros(size, bool)
    kept[list(plan.kept.get(tensor, {}).get(axis, range(size)))] = True
    mine = np.zeros(size, bool)
    for part in (ranges or f"0:{size}").split(","):
        a, b = part.split(":")
        mine[int(a) : int(b)] = True
    return int((kept & mine).sum()), int(mine.sum())
