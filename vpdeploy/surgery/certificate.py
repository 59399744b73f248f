"""What is proved of a cut, on the network that was cut and on real images."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vpdeploy.errors import SurgeryError
from vpdeploy.models.copies import on_cpu
from vpdeploy.surgery.bench import relative_difference
from vpdeploy.surgery.gates import Gated, mask_row
from vpdeploy.surgery.masked_weights import MaskedWeights
from vpdeploy.surgery.norms import norms_without_statistics
from vpdeploy.surgery.paths import first_change
from vpdeploy.surgery.trace import twin_of
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
RANDOM_IMAGES = 2
EFFECT_IMAGES = 2  # on which the dense network runs, too
PRODUCTS = 4 * 10**10  # of the dense network on all real images: a few seconds in float64 on two cores


def enough_images(macs: float, *, at_most: int) -> int:
    """On how many real images a network of ``macs`` is certified: fewer for a large one, at least 2."""
    return max(2, min(at_most, int(PRODUCTS / max(macs, 1))))


def certify(
    source: nn.Module, pruned: nn.Module, groups: ChannelGroups, selection: Selection, *, canvas: Tensor
) -> Certificate:
    """What is proved of a cut. source: the dense network that was cut; canvas: real images as it sees them, [n, 3, C, C].

    Raises: SurgeryError when nothing was removed, or when masking and removal do not give the same logits; where
    approximate groups were cut, when they do not with norms that take no statistics.
    """
    widths = selection.mask.widths()
    records = tuple(
        GroupRecord(g.root, g.width, widths.get(g.root, g.width), g.status, g.reason, g.difference)
        for g in groups.groups
    )
    if selection.requested < 1 and all(record.kept == record.width for record in records):
        raise SurgeryError(f"nothing was removed, though budget.{selection.budget} is {selection.requested:g}")
    gated = Gated(twin_of(source, on_cpu(torch.float64)), groups.prunable)
    row = mask_row(groups.prunable, selection.mask, dtype=torch.float64)
    budget = (selection.budget, selection.requested, selection.reached)
    return _proved(gated, row, source, pruned, canvas=canvas, budget=budget, records=records)


def certify_weights(
    source: nn.Module, zeroed: nn.Module, groups: ChannelGroups, mask: Tensor, *, requested: float, canvas: Tensor
) -> Certificate:
    """As ``certify``, of single weights: those that ``mask`` [all masked weights] does not keep are 0 in ``zeroed``."""
    records = tuple(GroupRecord(g.root, g.width, g.width, g.status, g.reason, g.difference) for g in groups.groups)
    masked = MaskedWeights(twin_of(source, on_cpu(torch.float64)))
    budget = ("weight_ratio", requested, float(mask.double().mean()))
    return _proved(masked, mask.double(), source, zeroed, canvas=canvas, budget=budget, records=records)


def _proved(
    gated: Gated | MaskedWeights,
    row: Tensor,
    source: nn.Module,
    pruned: nn.Module,
    *,
    canvas: Tensor,
    budget: tuple[str, float, float],
    records: tuple[GroupRecord, ...],
) -> Certificate:
    """Of ``gated``, a twin of ``source`` in float64, under ``row`` against ``pruned``. Raises: as ``certify``."""
    small = twin_of(pruned, on_cpu(torch.float64))
    real = canvas.detach().to("cpu", torch.float64)
    noise = torch.randn((RANDOM_IMAGES, *real.shape[1:]), generator=torch.Generator().manual_seed(0)).double()

    def difference(x: Tensor) -> float:
        return relative_difference(gated(x, row), small(x))

    with torch.no_grad():
        on_real, on_noise, but_for_norms = difference(real), difference(noise), None
        few = real[:EFFECT_IMAGES]
        dense = gated(few, torch.ones_like(row))
        effect = relative_difference(dense, gated(few, row))
        spread = _spread(torch.cat([dense, gated(noise, torch.ones_like(row))]))
        if any(record.status == "approximate" and record.kept < record.width for record in records):
            with norms_without_statistics():
                but_for_norms = max(difference(few), difference(noise))
    agreement = max(on_real, on_noise) if but_for_norms is None else but_for_norms
    if not math.isfinite(max(on_real, on_noise)):
        raise SurgeryError(
            "the logits of the network, masked or pruned, are not finite; expected numbers: look for NaN or infinite weights, "
            "and at the losses if it was trained here"
        )
    if not agreement <= AGREEMENT:
        raise SurgeryError(
            f"masked and pruned logits differ by {agreement:.2g} of the largest on {len(real)} real images and "
            f"{RANDOM_IMAGES} random ones; expected at most {AGREEMENT:g}: {_cause(source, pruned, few)}"
        )
    if not spread >= AGREEMENT:
        raise SurgeryError(
            f"the network gives {len(few) + len(noise)} images logits that differ by {spread:.2g} of the largest; expected "
            f"at least {AGREEMENT:g}, or that masked and pruned agree proves nothing: its classifier may still be zero, give it "
            "weights first"
        )
    return Certificate(on_real, len(real), on_noise, but_for_norms, effect, *budget, records)


def _spread(logits: Tensor) -> float:
    """The largest range of one logit over the images, of the largest there is. logits: [n, k]."""
    scale = float(logits.abs().max())
    return float((logits.amax(dim=0) - logits.amin(dim=0)).max()) / scale if scale else 0.0


def _cause(dense: nn.Module, pruned: nn.Module, images: Tensor) -> str:
    change = first_change(dense, pruned, images)
    if change is None:
        return "removal is not exact for this network, please report it with the network's code"
    return f"the forward depends on widths; {change}. Write it so that it does the same at any width, or ask for another ratio"
