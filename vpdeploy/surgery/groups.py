"""Which channels must go together: the components of the labels that a forward joined, as plain data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from vpdeploy.models.attention.known import find_known
from vpdeploy.models.gather import ChannelGather
from vpdeploy.surgery.labels import Ints
from vpdeploy.surgery.limit import Limit
from vpdeploy.surgery.trace import Trace, look
from vpdeploy.values import ChannelGroup, ChannelGroups, Member, Side

READERS = (_ConvNd, nn.Linear, ChannelGather)


def find_groups(backbone: nn.Module, example: Tensor, *, limit: Limit | None = None) -> ChannelGroups:
    """All channel groups of ``backbone``, in the order of their roots. example: float32 [n, 3, h, w].

    Groups that can never be removed are excluded with the reason; the others still have to be probed
    (``surgery.exactness.probe``); what may refuse them there is their ``reason`` until then. ``backbone`` is unchanged.

    Raises: SurgeryError when its forward fails; LimitError past ``limit``.
    """
    return groups_of(look(backbone, example, limit=limit), backbone)


def groups_of(seen: Trace, backbone: nn.Module) -> ChannelGroups:
    """The groups of ``backbone`` from what its forward showed."""
    table = _Table.of(seen)
    parts = table.alike((seen.components.rigid, seen.components.normalised))
    found = [group for rows in parts if (group := _as_group(rows, table, seen, backbone)) is not None]
    place = {name: number for number, name in enumerate(seen.labels)}
    found.sort(key=lambda group: min((place[m.tensor], min(m.indices)) for m in group.members if m.side == "out"))
    return ChannelGroups(tuple(_exclude_tied(_exclude_computed(found, backbone), backbone)), seen.path, seen.shape)


@dataclass(frozen=True)
class _Table:
    """Every position of every axis as a row, sorted by component, then axis, then position."""

    axes: tuple[tuple[str, int], ...]
    component: Ints
    axis: Ints  # number in ``axes``
    index: Ints
    side: Ints  # of the axis there: 0 both, 1 in, 2 out
    readers: Mapping[tuple[str, int], set[str]]  # of an axis: the modules whose products read along it

    @staticmethod
    def of(seen: Trace) -> _Table:
        side = np.zeros(len(seen.components.of), np.int64)
        for role in seen.roles:
            side[role.labels] = np.maximum(side[role.labels], 1 if role.side == "in" else 2)
        axes = tuple((name, axis) for name, sizes in seen.labels.items() for axis, row in enumerate(sizes) if len(row))
        rows = [seen.labels[name][axis] for name, axis in axes]
        labels = np.concatenate(rows)
        number = np.repeat(np.arange(len(axes)), [len(row) for row in rows])
        index = np.concatenate([np.arange(len(row)) for row in rows])
        component = seen.components.of[labels]
        touched = np.zeros(len(side), bool)
        touched[component[side[labels] > 0]] = True  # only what some product writes or reads is a channel
        chosen = np.flatnonzero(touched[component])
        chosen = chosen[np.lexsort((index[chosen], number[chosen], component[chosen]))]
        return _Table(
            axes, component[chosen], number[chosen], index[chosen], side[labels[chosen]], _readers(seen, axes)
        )

    def alike(self, fates: Sequence[Mapping[int, str]]) -> Iterable[list[slice]]:
        """Components that touch the same axes equally often and share their fate: the channels of one group, as rows."""
        edges = [0, *(np.flatnonzero(np.diff(self.component)) + 1).tolist(), len(self.component)]
        kinds: dict[tuple[object, ...], list[slice]] = {}
        for a, b in pairwise(edges) if len(self.component) else ():
            fate = tuple(int(self.component[a]) in fate for fate in fates)
            kinds.setdefault((self.axis[a:b].tobytes(), self.side[a:b].tobytes(), fate), []).append(slice(a, b))
        return kinds.values()


def _as_group(parts: list[slice], table: _Table, seen: Trace, twin: nn.Module) -> ChannelGroup | None:
    """The group of these components; None where nothing writes them, as on the network's input."""
    rows = table.axis[parts[0]]
    sides = table.side[parts[0]]
    if not (sides == 2).any():
        return None
    positions = np.stack([table.index[part] for part in parts])  # [channels, rows]
    root = _root_row(rows, sides, [len(seen.labels[name][axis]) for name, axis in table.axes], width=len(parts))
    order = np.argsort(positions[:, root], kind="stable")
    positions, parts = positions[order], [parts[i] for i in order]
    members = []
    for number in dict.fromkeys(rows.tolist()):
        mine = np.flatnonzero(rows == number)
        indices = positions[:, mine].ravel()
        channels = np.repeat(np.arange(len(parts)), len(mine))
        ascending = np.argsort(indices, kind="stable")
        side: Side = ("both", "in", "out")[int(sides[mine].max())]
        name, axis = table.axes[number]
        members.append(
            Member(name, axis, side, tuple(indices[ascending].tolist()), tuple(channels[ascending].tolist()))
        )
    name, axis = table.axes[int(rows[root])]
    group = ChannelGroup(
        _root_name(name, next(m for m in members if (m.tensor, m.axis) == (name, axis)), len(seen.labels[name][axis])),
        len(parts),
        tuple(members),
    )
    component = int(table.component[parts[0]][0])
    reason = seen.components.rigid.get(component) or _no_gate(group, table.readers, twin)
    if reason is not None:
        return replace(group, status="excluded", reason=reason)
    normalised = seen.components.normalised.get(component)
    if normalised is None:
        return replace(group, reason=seen.components.suspect.get(component, ""))
    return replace(group, status="approximate", reason=normalised)


def _root_row(rows: Ints, sides: Ints, sizes: Sequence[int], *, width: int) -> int:
    """The first axis that is written and holds exactly the group's channels, or else the first that is written."""
    written = np.flatnonzero(sides == 2).tolist()
    once = [row for row in written if (rows == rows[row]).sum() == 1 and sizes[int(rows[row])] == width]
    return (once or written)[0]


def _root_name(tensor: str, member: Member, size: int) -> str:
    """The writer's name, with the range of its channels where they are a part of all."""
    path, _, leaf = tensor.rpartition(".")
    name = path if leaf in ("weight", "target") and path else tensor
    indices = sorted(member.indices)
    if len(indices) == size:
        return name
    starts = [b for a, b in pairwise([-2, *indices]) if b != a + 1]
    ends = [a + 1 for a, b in pairwise([*indices, size + 2]) if b != a + 1]
    return f"{name}[{','.join(f'{a}:{b}' for a, b in zip(starts, ends, strict=True))}]"


def _no_gate(group: ChannelGroup, readers_of: Mapping[tuple[str, int], set[str]], twin: nn.Module) -> str | None:
    """Why no gate can stand before every reader, or None."""
    readers = [member for member in group.members if member.side == "in"]
    if not readers:
        return "no layer reads it: its channels are the network's outputs, meet activations alone in products, or lead nowhere"
    if group.width < 2:
        return "it is one channel wide" if group.unit == 1 else f"all its {group.unit} channels go together"
    modules = dict(twin.named_modules())
    for member in readers:
        module = modules.get(member.module)
        if not isinstance(module, READERS) or (member.tensor.rpartition(".")[2], member.axis) != _read_axis(module):
            kind = f"a parameter of a {type(module).__name__}" if module is not None else "a parameter"
            left = module is not None and find_known(module) is not None
            more = "; this attention was left as it is, and `vpdeploy inspect` tells why" if left else ""
            return f"it is read by {member.tensor}, {kind}, before which no gate can stand{more}"
        others = readers_of[member.tensor, member.axis] - {member.module}
        if others:
            return f"{min(others) or 'the network'} reads {member.tensor} itself, where no gate can stand"
    for member in group.members:
        both = readers_of.get((member.tensor, member.axis), set()) if member.side == "out" else set()
        if both:
            return f"{min(both) or 'the network'} reads {member.tensor} along an axis that another product writes"
    return None


def _readers(seen: Trace, axes: Sequence[tuple[str, int]]) -> dict[tuple[str, int], set[str]]:
    """By whom each axis is read along in a product: the modules that make it."""
    starts = np.array([seen.labels[name][axis][0] for name, axis in axes])
    found: dict[tuple[str, int], set[str]] = {}
    for role in seen.roles:
        if role.side == "in":
            for number in np.unique(np.searchsorted(starts, role.labels, side="right") - 1).tolist():
                found.setdefault(axes[number], set()).add(role.module)
    return found


def _read_axis(module: nn.Module) -> tuple[str, int]:
    if isinstance(module, ChannelGather):
        return "source", 0
    return "weight", 0 if isinstance(module, _ConvTransposeNd) else 1


def _exclude_computed(groups: Iterable[ChannelGroup], twin: nn.Module) -> Iterator[ChannelGroup]:
    """A weight that is computed from other tensors at every forward: what becomes of its channels is not known."""
    modules = dict(twin.named_modules())
    for group in groups:
        names = [member.module.partition(".parametrizations.")[0] for member in group.members]
        reasons = (_how_to_fold(modules[n], n, leaf) for n in names if n in modules for leaf in _computed(modules[n]))
        yield group if (reason := next(reasons, None)) is None else replace(group, status="excluded", reason=reason)


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
    """A tensor that two modules share is cut for both at once; that their gates agree is not known."""
    tied = _tied_tensors(twin)
    for group in groups:
        reason = next((tied[member.tensor] for member in group.members if member.tensor in tied), None)
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


def offsets(groups: Sequence[ChannelGroup]) -> dict[str, slice]:
    """Where each group stands when the channels of all groups are laid in one row."""
    ends = [0]
    for group in groups:
        ends.append(ends[-1] + group.width)
    return {group.root: slice(a, b) for group, (a, b) in zip(groups, pairwise(ends), strict=True)}


def example_input(side: int, *, batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    """A fixed input for tracing and probing: [batch, 3, side, side]."""
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=dtype)
