"""What is proved of a cut, on the network that was cut and on real images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vpdeploy.errors import SurgeryError
from vpdeploy.surgery.exactness import relative_difference
from vpdeploy.surgery.gates import Gated, mask_row
from vpdeploy.surgery.norms import norms_without_statistics
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


def _mask_effect(backbone: nn.Module, groups: Sequence[ChannelGroup], mask: ChannelMask, *, canvas: Tensor) -> float:
    """How far masking moves the logits from the dense network's, relative: agreement of what it does not move is empty."""
    gated, x = Gated(twin_of(backbone, on_cpu(torch.float64)), groups), canvas.detach().cpu().double()
    row = mask_row(groups, mask, dtype=torch.float64)
    with torch.no_grad():
        return relative_difference(gated(x, torch.ones_like(row)), gated(x, row))


AGREEMENT = 1e-6  # float64, real weights: 1e-16 to 1e-12 was measured; more means that something else was computed
RANDOM_IMAGES = 2


def certify(
    source: nn.Module, pruned: nn.Module, groups: ChannelGroups, selection: Selection, *, canvas: Tensor
) -> Certificate:
    """What is proved of a cut. source: the dense network that was cut; canvas: real images as it sees them, [n, 3, C, C].

    Raises: SurgeryError when nothing was removed, or when masking and removal do not give the same logits; where
    approximate groups were cut, when they do not with norms that take no statistics.
    """
    mask, widths = selection.mask, selection.mask.widths()
    records = tuple(
        GroupRecord(g.root, g.width, widths.get(g.root, g.width), g.status, g.reason, g.difference)
        for g in groups.groups
    )
    if selection.requested < 1 and all(record.kept == record.width for record in records):
        raise SurgeryError(f"nothing was removed, though budget.{selection.budget} is {selection.requested:g}")
    noise = torch.randn((RANDOM_IMAGES, *canvas.shape[1:]), generator=torch.Generator().manual_seed(0))

    def differences() -> tuple[float, float]:
        return tuple(masked_vs_pruned(source, pruned, groups.prunable, mask, canvas=x) for x in (canvas, noise))  # type: ignore[return-value]

    real, random = differences()
    but_for_norms = None
    if any(record.status == "approximate" and record.kept < record.width for record in records):
        with norms_without_statistics():
            but_for_norms = max(differences())
    agreement = max(real, random) if but_for_norms is None else but_for_norms
    if not agreement <= AGREEMENT:
        raise SurgeryError(
            f"masked and pruned logits differ by {agreement:.2g} of the largest on {len(canvas)} real images and "
            f"{RANDOM_IMAGES} random ones; expected at most {AGREEMENT:g}: removal is not exact for this network, please "
            "report it with the recipe"
        )
    effect = _mask_effect(source, groups.prunable, mask, canvas=canvas)
    return Certificate(
        real,
        len(canvas),
        random,
        but_for_norms,
        effect,
        selection.budget,
        selection.requested,
        selection.reached,
        records,
    )
