"""A network that can be made on demand, wherever its code comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Architecture:
    """``make(k)`` gives the network freshly initialised with k classes, ``make(None)`` with as many as it likes.

    ``takes_classes`` says whether k is heard. ``adapt`` turns the tensors of an older or fuller checkpoint of this
    network into those of the network made here. ``classifiers`` names its last layers where the publisher does, all of k
    classes; empty where the last one in module order is meant.
    """

    make: Callable[[int | None], nn.Module]
    takes_classes: bool
    adapt: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict
    classifiers: tuple[str, ...] = ()
