"""Accuracy in torch, float32, with the prompt that the network carries."""

from __future__ import annotations

import torch
from torch import Tensor

from vpdeploy.data.prepared import Images, batches
from vpdeploy.training.network import Prompted, to_pixels

EVALUATION_BATCH = 256


def predict(network: Prompted, images: Images, *values: Tensor) -> Tensor:
    """The predicted class of every image, in order: int64 [n] on the CPU. The network's mode is put back."""
    was_training = network.training
    network.eval()
    parts: list[Tensor] = []
    with torch.no_grad():
        for pixels, _ in batches(images, torch.arange(len(images)), EVALUATION_BATCH):
            parts.append(network(to_pixels(pixels, network.compute.device), *values).argmax(dim=1).cpu())
    network.train(was_training)
    return torch.cat(parts)


def accuracy(network: Prompted, images: Images, *values: Tensor) -> float:
    """Top-1 as a fraction."""
    return float((predict(network, images, *values) == images.labels).double().mean())
