"""Masks on single weights: each product's weight times its part of one row."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd


class MaskedWeights(nn.Module):
    """``backbone`` with the weight of every convolution and linear layer multiplied by its part of a row of values, as ``Gated``
    does it with channels. The backbone given is used as it is: hand in a copy.

    Calling it takes the backbone's input and one row of values [all masked weights, in order]; its gradient reaches them.
    """

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.shapes = weight_shapes(backbone)
        self.channels = sum(shape.numel() for shape in self.shapes.values())

    def forward(self, x: Tensor, values: Tensor) -> Tensor:
        return functional_call(self.backbone, self.masked(values), (x,))

    def masked(self, values: Tensor) -> dict[str, Tensor]:
        """Weight name -> the weight times its values."""
        weights = dict(self.backbone.named_parameters())
        return {
            name: weights[name] * part.to(weights[name].dtype) for name, part in parts_of(values, self.shapes).items()
        }


def weight_shapes(backbone: nn.Module) -> dict[str, torch.Size]:
    """Of the weights that masks are on: those of convolutions and linear layers, each once, in the order of the modules."""
    weights: dict[str, Tensor] = {}
    for path, module in backbone.named_modules():
        if isinstance(module, _ConvNd | nn.Linear) and not any(module.weight is other for other in weights.values()):
            weights[f"{path}.weight".lstrip(".")] = module.weight
    return {name: weight.shape for name, weight in weights.items()}


def parts_of(row: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """A row of all masked weights, by name."""
    parts = row.split([shape.numel() for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


@torch.no_grad()
def set_to_zero(backbone: nn.Module, mask: Mapping[str, Tensor]) -> nn.Module:
    """``backbone``, changed: every weight in ``mask`` (by name, True = keep) has zeros where it is not kept."""
    weights = dict(backbone.named_parameters())
    for name, kept in mask.items():
        weights[name].masked_fill_(~kept.to(weights[name].device, torch.bool), 0.0)
    return backbone
