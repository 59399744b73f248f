"""What is proved of a cut, on the network that was cut and on real images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vpdeploy.errors import SurgeryError
from vpdeploy.surgery.exactness import relative_difference
from vpdeploy.surgery.gates import Gated, mask_row
from vpdeploy.surgery.trace import on_cpu, twin_of
from vpdeploy.values import Certificate, ChannelGroup, ChannelGroups, ChannelMask, GroupRecord, Selection


def masked_vs_pruned(
    backbone: nn.Module, pruned: nn.Module, groups: Sequence[ChannelGroup], mask: ChannelMask, *, canvas: Tensor
) -> float:
    """Largest relative difference of the logits, masked against removed, on the real network in float64.

    canvas: what the backbone sees, [n, 3, C, C]. This number goes into the certificate.
    """
    x = canvas.detach().cpu().double()
    masked_network = Gated(twin_of(backbone, on_cpu(torch.float64)), groups)
    small = twin_of(pruned, on_cpu(torch.float64))
    with torch.no_grad():
        masked = masked_network(x, mask_row(groups, mask, dtype=torch.float64))
        return relative_difference(masked, small(x))


AGREEMENT = 1e-6  # float64, real weights: 1e-16 to 1e-12 was measured; more means that something else was computed


def certify(
    source: nn.Module, pruned: nn.Module, groups: ChannelGroups, selection: Selection, *, canvas: Tensor
) -> Certificate:
    """What is proved of a cut. source: the dense network that was cut; canvas: real images as it sees them, [n, 3, C, C].

    Raises: SurgeryError when masking and removal do not give the same logits.
    """
    agreement = masked_vs_pruned(source, pruned, groups.prunable, selection.mask, canvas=canvas)
    if not agreement <= AGREEMENT:
        raise SurgeryError(
            f"masked and pruned logits differ by {agreement:.2g} of the largest on {len(canvas)} real images; expected at "
            f"most {AGREEMENT:g}: removal is not exact for this network, please report it with the recipe"
        )
    widths = selection.mask.widths()
    records = tuple(
        GroupRecord(g.root, g.width, widths.get(g.root, g.width), g.status, g.reason, g.difference)
        for g in groups.groups
    )
    return Certificate(agreement, len(canvas), selection.budget, selection.requested, selection.reached, records)
