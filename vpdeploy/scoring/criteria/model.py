"""What one-shot criteria look at: a gated network at rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vpdeploy.surgery.gates import Gated
from vpdeploy.surgery.masked_weights import MaskedWeights
from vpdeploy.values import ChannelGroup

Batches = Iterable[
    tuple[Tensor, Tensor]
]  # (canvases float32 [n, 3, C, C], labels int64 [n]); may be walked more than once


@dataclass(frozen=True)
class Model:
    """A network in eval mode under ``gates`` (a row of mask values); ``label_map``: [classes], or None."""

    gated: Gated | MaskedWeights
    gates: Tensor
    label_map: Tensor | None = None

    @property
    def backbone(self) -> nn.Module:
        """Its parameters and buffers have the names that groups know."""
        return self.gated.backbone

    def weights_of(self, groups: Sequence[ChannelGroup]) -> list[str]:
        """The names of the tensors that products of ``groups`` use."""
        tensors = dict(self.backbone.named_parameters())
        names = {member.tensor for group in groups for member in group.members}
        return [name for name in sorted(names & tensors.keys()) if tensors[name].ndim > 1]

    def leaves(self, names: Sequence[str]) -> dict[str, Tensor]:
        """A copy of each of these tensors, by name, to be differentiated by."""
        tensors = dict(self.backbone.named_parameters())
        return {name: tensors[name].detach().clone().requires_grad_(True) for name in names}

    def __call__(
        self, x: Tensor, *, gates: Tensor | None = None, tensors: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """Logits [n, classes]; with other ``gates``, and with ``tensors`` (by name) for the backbone's own."""
        gates = self.gates if gates is None else gates
        replaced = {f"backbone.{name}": tensor for name, tensor in (tensors or {}).items()}
        logits = functional_call(self.gated, replaced, (x, gates))
        return logits if self.label_map is None else logits[:, self.label_map]


def channel_sums(entries: Mapping[str, Tensor], groups: Sequence[ChannelGroup]) -> dict[str, Tensor]:
    """Group root -> for each channel the sum of ``entries`` (tensor name -> its entries) over all slices that are its own:
    [g] float64.
    """
    sums: dict[str, Tensor] = {}
    for group in groups:
        total = torch.zeros(group.width, dtype=torch.float64)
        for member in group.members:
            if (entry := entries.get(member.tensor)) is not None:
                rows = entry.detach().to("cpu", torch.float64).movedim(member.axis, 0).flatten(1).sum(dim=1)  # [axis]
                total.index_add_(0, torch.tensor(member.channels), rows[list(member.indices)])
        sums[group.root] = total
    return sums
