"""Masks on single weights: each product's weight times its part of one row."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd


class MaskedWeights(nn.Module):
    """``backbone`` with every convolution's and linear layer's weight multiplied by its part of a row of values, as ``Gated`` does
    it with channels. The backbone given is used as it is: hand in a copy.

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
        parts = values.split([shape.numel() for shape in self.shapes.values()])
        return {
            name: weights[name] * part.view(shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }


def weight_shapes(backbone: nn.Module) -> dict[str, torch.Size]:
    """Of the weights that masks are on: those of convolutions and linear layers, each once, in the order of the modules."""
    weights: dict[str, nn.Parameter] = {}
    for path, module in backbone.named_modules():
        if isinstance(module, _ConvNd | nn.Linear) and not any(module.weight is other for other in weights.values()):
            weights[f"{path}.weight".lstrip(".")] = module.weight
    return {name: weight.shape for name, weight in weights.items()}


def parts_of(row: Tensor, shapes: dict[str, torch.Size]) -> dict[str, Tensor]:
    """A row of all masked weights by name."""
    edges = [0, *accumulate(shape.numel() for shape in shapes.values())]
    return {
        name: row[start:end].view(shape) for (name, shape), start, end in zip(shapes.items(), edges, edges[1:], strict=False)
    }
