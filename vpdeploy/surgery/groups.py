"""Which channels must go together: torch-pruning's groups as plain data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from vpdeploy.errors import SurgeryError
from vpdeploy.models.gather import ChannelGather
from vpdeploy.surgery.graph import analysable_copy, build_graph, side_of
from vpdeploy.values import ChannelGroup, ChannelGroups, Member, Side

READERS = (_ConvNd, nn.Linear, ChannelGather)


def find_groups(backbone: nn.Module, example: Tensor) -> ChannelGroups:
    """All channel groups of ``backbone``, in the order of their roots. example: float32 [n, 3, h, w].

    Groups that can never be removed are excluded with the reason; the others still have to be probed
    (``surgery.exactness.probe``). ``backbone`` is unchanged.

    Raises: SurgeryError when torch-pruning cannot analyse the network.
    """
    twin = analysable_copy(backbone)
    graph = build_graph(twin, example)
    place = {name: i for i, (name, _) in enumerate(twin.named_modules())}
    try:
        found = list(graph.get_all_groups(root_module_types=[_ConvNd, nn.Linear]))
    except Exception as e:  # for example ZeroDivisionError on channel shuffles
        raise SurgeryError(
            f"network {type(backbone).__name__}: torch-pruning cannot group its channels: {type(e).__name__}: {e}"
        ) from e
    groups = [_as_group(graph, twin, items, place) for items in found]
    groups.sort(key=lambda group: place[group.root])
    return ChannelGroups(tuple(_exclude_overlaps(_exclude_tied(_exclude_computed(groups, twin), twin))))


def _as_group(
    graph: tp.DependencyGraph, twin: nn.Module, items: tp.dependency.Group, place: dict[str, int]
) -> ChannelGroup:
    members: list[Member] = []
    reasons: list[str] = []
    names = {module: name for name, module in twin.named_modules()}
    for item in items:
        module = item.dep.target.module
        if isinstance(module, nn.Parameter):
            name, side = graph._param_to_name[module], "both"
        elif module in names:
            name, side = names[module], side_of(graph, module, item.dep.handler)
            if side == "in" and not isinstance(module, READERS):
                reasons.append(f"it is read by {name}, a {type(module).__name__}, which cannot lose inputs")
        else:
            if type(module).__name__ == "_OutputOp":
                reasons.append("its channels are the network's outputs")
            continue
        pairs = sorted(zip(item.idxs, item.root_idxs, strict=True))
        members.append(Member(name, side, tuple(i for i, _ in pairs), tuple(c for _, c in pairs)))
    width = len(items[0].idxs)
    if not reasons and all(member.side != "in" for member in members):
        reasons.append("no layer reads it: its channels are the network's outputs, or lead nowhere")
    group = ChannelGroup(_root(members, width, place), width, tuple(_merge(members)))
    return replace(group, status="excluded", reason=reasons[0]) if reasons else group


def _root(members: Sequence[Member], width: int, place: dict[str, int]) -> str:
    """The first writer, in module order, whose outputs are exactly the group's channels."""
    whole = tuple(range(width))
    writers = [m.module for m in members if m.side == "out" and m.indices == whole and m.channels == whole]
    return min(writers or [members[0].module], key=lambda name: place.get(name, len(place)))


def _merge(members: Sequence[Member]) -> Iterator[Member]:
    """One member for each module and side, in a stable order."""
    seen: dict[tuple[str, Side], dict[int, int]] = {}
    for member in members:
        seen.setdefault((member.module, member.side), {}).update(zip(member.indices, member.channels, strict=True))
    for (module, side), pairs in sorted(seen.items()):
        yield Member(module, side, tuple(sorted(pairs)), tuple(pairs[i] for i in sorted(pairs)))


def _exclude_overlaps(groups: Iterable[ChannelGroup]) -> Iterator[ChannelGroup]:
    """An index that two groups claim cannot be removed by either alone: the later one is excluded."""
    owner: dict[tuple[str, Side, int], str] = {}
    for group in groups:
        claims: list[tuple[str, Side, int]] = [(m.module, m.side, i) for m in group.members for i in m.indices]
        taken = next((owner[claim] for claim in claims if claim in owner), None)
        if taken is not None and group.status != "excluded":
            group = replace(group, status="excluded", reason=f"it shares channels with the group of {taken}")
        for claim in claims:
            owner.setdefault(claim, group.root)
        yield group


def _exclude_computed(groups: Iterable[ChannelGroup], twin: nn.Module) -> Iterator[ChannelGroup]:
    """A weight that is computed from other tensors cannot be cut: torch-pruning would lay a parameter in its place."""
    modules = dict(twin.named_modules())
    for group in groups:
        names = [member.module for member in group.members if member.module in modules]
        reasons = (_how_to_fold(modules[name], name, leaf) for name in names for leaf in _computed(modules[name]))
        if group.status != "excluded" and (reason := next(reasons, None)) is not None:
            group = replace(group, status="excluded", reason=reason)
        yield group


def _computed(module: nn.Module) -> Iterator[str]:
    """Which of ``module``'s tensors are no parameters of its own, but made of others at every forward."""
    for leaf in ("weight", "bias"):
        own = leaf in module._parameters or leaf in module._buffers
        if not own and isinstance(getattr(module, leaf, None), Tensor):
            yield leaf


def _how_to_fold(module: nn.Module, name: str, leaf: str) -> str:
    where = f"{name or 'the network'} computes its {leaf} at every forward"
    if parametrize.is_parametrized(module, leaf):
        by = ", ".join(type(part).__name__ for part in module.parametrizations[leaf])  # type: ignore[index]
        call = f"torch.nn.utils.parametrize.remove_parametrizations(module, {leaf!r})"
    else:  # of these only spectral_norm's can be copied at all
        by, call = "a hook, as of torch.nn.utils.spectral_norm", "torch.nn.utils.remove_spectral_norm(module)"
    return (
        f"{where} ({by}); fold it before pruning: {call} in the factory, and a checkpoint saved again from the folded "
        "network"
    )


def _exclude_tied(groups: Iterable[ChannelGroup], twin: nn.Module) -> Iterator[ChannelGroup]:
    """A tensor that two modules share would have to be cut for both at once, and torch-pruning cuts for one."""
    tied = _tied_tensors(twin)
    for group in groups:
        names = (name for member in group.members for name, _ in tensor_axes(twin, member)) if tied else ()
        reason = next((tied[name] for name in names if name in tied), None)
        if reason is not None and group.status != "excluded":
            group = replace(group, status="excluded", reason=reason)
        yield group


def _tied_tensors(network: nn.Module) -> dict[str, str]:
    """Every tensor of two or more modules, under each of its names -> what shares it. A module used twice is one module."""
    owners: dict[int, list[tuple[str, str]]] = {}
    for path, module in network.named_modules():
        own = [*module.named_parameters(recurse=False, remove_duplicate=False)]
        own += [*module.named_buffers(recurse=False, remove_duplicate=False)]  # type: ignore[arg-type]
        for leaf, tensor in own:
            owners.setdefault(id(tensor), []).append((path, leaf))
    tied: dict[str, str] = {}
    for (path, leaf), *others in owners.values():
        for other, other_leaf in others:
            reason = f"{other or 'the network'} shares its {other_leaf} with {path or 'the network'}"
            tied.setdefault(f"{path}.{leaf}".lstrip("."), reason)
            tied[f"{other}.{other_leaf}".lstrip(".")] = reason
    return tied


def tensor_axes(backbone: nn.Module, member: Member) -> tuple[tuple[str, int], ...]:
    """The tensors that a member's channels run along: (tensor name, axis)."""
    tensors = dict(backbone.named_parameters())
    if member.module in tensors:  # a bare parameter: torch-pruning cuts its last axis longer than 1
        shape = tensors[member.module].shape
        return ((member.module, max(axis for axis, size in enumerate(shape) if size > 1)),)
    module = backbone.get_submodule(member.module)
    prefix = f"{member.module}." if member.module else ""
    return tuple((prefix + name, axis) for name, axis in _axes(module, member.side))


def _axes(module: nn.Module, side: Side) -> Iterator[tuple[str, int]]:
    if isinstance(module, ChannelGather):
        yield ("target", 0) if side == "out" else ("source", 0)
    elif isinstance(module, _ConvNd | nn.Linear):
        if side == "in":
            yield "weight", 0 if isinstance(module, _ConvTransposeNd) else 1
        else:
            yield "weight", 1 if isinstance(module, _ConvTransposeNd) and side == "out" else 0
            if module.bias is not None:
                yield "bias", 0
    else:
        names = ["weight", "bias", *(["running_mean", "running_var"] if isinstance(module, _BatchNorm) else [])]
        for name in names:
            tensor = getattr(module, name, None)
            if isinstance(tensor, Tensor) and tensor.numel() > 1:
                yield name, tensor.ndim - 1


def offsets(groups: Sequence[ChannelGroup]) -> dict[str, slice]:
    """Where each group stands when the channels of all groups are laid in one row."""
    ends = [0]
    for group in groups:
        ends.append(ends[-1] + group.width)
    return {group.root: slice(a, b) for group, (a, b) in zip(groups, pairwise(ends), strict=True)}


def example_input(side: int, *, batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    """A fixed input for tracing and probing: [batch, 3, side, side]."""
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=dtype)
