"""The input that a network is published for, where a recipe is silent about it. torch is imported only to ask a library of
networks: ``check`` reads this.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module

from vpdeploy.models.names import CIFAR_RESNETS, PUBLISHERS
from vpdeploy.recipe.tables import CHECKPOINT_SUFFIXES, IMAGENET_MEAN, IMAGENET_STD, ModelTable

CIFAR_SIZE = 32
USUAL_SIZE = 224
# What networks call the side of the images that they are built for.
SIZE_ARGUMENTS = ("image_size", "img_size", "input_size")


@dataclass(frozen=True)
class PublishedInput:
    """``image_size``: side of the square image, pixels; ``mean`` and ``std`` per colour, in [0, 1]."""

    image_size: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD


def published_input(table: ModelTable) -> PublishedInput | None:
    """What the weights of ``table`` were trained on, or the network's default ones; None for code that nobody published.

    A network that is built without those weights may be of another size (torchvision's vit_h_14 takes 224, its default
    weights 518): the size is one that the network takes as ``table`` builds it.

    Raises: ModelError for names that the library does not know.
    """
    if table.name in CIFAR_RESNETS:
        return PublishedInput(CIFAR_SIZE)
    library, _, name = table.name.partition(":")
    if f"{library}:" not in PUBLISHERS:
        return None
    from_file = table.weights is None or table.weights.endswith(CHECKPOINT_SUFFIXES)
    weights = None if from_file else table.weights
    inputs = import_module(PUBLISHERS[f"{library}:"]).published_inputs(name, weights)
    sizes = [*_asked(table), *(one.image_size for one in inputs), USUAL_SIZE]
    first = inputs[0] if inputs else PublishedInput(USUAL_SIZE)
    return PublishedInput(_taken(table, list(dict.fromkeys(sizes))), first.mean, first.std)


def _asked(table: ModelTable) -> Iterator[int]:
    """The sizes that the recipe's own arguments to the network name."""
    for key in SIZE_ARGUMENTS:
        value = table.args.get(key)
        side = value[-1] if isinstance(value, (list, tuple)) and value else value
        if isinstance(side, int):
            yield side


def _taken(table: ModelTable, sizes: Sequence[int]) -> int:
    """The first of ``sizes`` that the network takes, tried without memory or arithmetic; the first where none can be tried:
    the forward of the real network, later, has the last word.
    """
    import torch

    from vpdeploy.models.build import architecture_of, seeded

    architecture = architecture_of(table)
    with seeded(0), torch.device("meta"), torch.no_grad():
        try:
            network = architecture.make(None).eval()
        except Exception:  # arguments that are wrong, or code that needs real numbers while it builds
            return sizes[0]
        for size in sizes:
            try:
                network(torch.empty(1, 3, size, size))
            except Exception:  # whatever a network says to a size that it does not take
                continue
            return size
    return sizes[0]
