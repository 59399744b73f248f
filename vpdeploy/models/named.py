"""A network by its name alone, without a recipe."""

from __future__ import annotations

import os
from dataclasses import dataclass

from torch import nn

from vpdeploy.errors import ModelError
from vpdeploy.models.build import architecture_of, classifiers_of, made, seeded
from vpdeploy.models.classifier import class_count
from vpdeploy.models.names import unknown_network
from vpdeploy.models.published import USUAL_SIZE, PublishedInput, published_input
from vpdeploy.recipe.tables import ModelTable


@dataclass(frozen=True)
class NamedModel:
    """A freshly initialised network in eval mode, float32, on the CPU; ``classes`` is what its ``classifier`` tells apart."""

    backbone: nn.Module
    classifier: str
    classes: int
    input: PublishedInput


def model_from(name: str) -> NamedModel:
    """The network ``name`` as it is built when nothing else is said, and its own input: 224 for a user's own code.

    ``name``: what a recipe takes as model.name; paths start at the current folder. The same network every time.

    Raises: ModelError for names and code that give no network.
    """
    if not name:
        raise ModelError(unknown_network(name, torchvision=()))
    table = ModelTable(name=os.path.expanduser(name))
    with seeded(0):
        architecture = architecture_of(table)
        backbone = made(architecture, None)
    classifier = classifiers_of(backbone, table, architecture)[0]
    own = published_input(table) or PublishedInput(USUAL_SIZE)
    return NamedModel(backbone, classifier, class_count(backbone, classifier), own)
