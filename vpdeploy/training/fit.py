"""Stage 0: one dense network from which every arm starts."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from vpdeploy.data.prepared import batches
from vpdeploy.progress import Display
from vpdeploy.prompts.label_map import count_pairs, frequency_map
from vpdeploy.recipe.tables import Recipe
from vpdeploy.run_folder import Journal
from vpdeploy.training.evaluate import EVALUATION_BATCH
from vpdeploy.training.network import Compute, Prompted, TrainingData, build_canvas, to_pixels
from vpdeploy.training.weights import WeightSchedule, freeze_all_but, train_weights
from vpdeploy.values import Dense


def fit(
    backbone: nn.Module,
    data: TrainingData,
    *,
    recipe: Recipe,
    classifier: str,
    compute: Compute,
    journal: Journal,
    display: Display,
) -> Dense:
    """Train all of ``backbone``, its head, or nothing, as the recipe's ``fit.what`` (resolved) says; it is unchanged.

    With ``model.head`` "flm" or "ilm" the label map of the unprompted network comes with it.
    """
    table = recipe.fit
    network = Prompted(build_canvas(recipe, prompted=False), copy.deepcopy(backbone), compute)
    if recipe.model.head in ("flm", "ilm"):
        network.map_labels(map_by_frequency(network, data))
    if table.what != "none":
        network.backbone.requires_grad_(True)
        if table.what == "head":
            freeze_all_but(network.backbone, network.backbone.get_submodule(classifier))
        schedule = WeightSchedule(
            streams="fit",
            seed=recipe.seed,
            epochs=table.epochs,
            batch_size=table.batch_size,
            optimizer="sgd",
            weight_lr=table.weight_lr,
            prompt_lr=0.0,
            weight_decay=table.weight_decay,
            label_smoothing=table.label_smoothing,
            augment=recipe.data.augment,
        )
        train_weights(network, data, schedule=schedule, journal=journal, display=display)
    return Dense(at_rest(network.backbone), label_map_of(network))


def at_rest(backbone: nn.Module) -> nn.Module:
    """The backbone as every stage hands it on: on the CPU, float32, plain layout, eval mode, all of it trainable."""
    return backbone.to("cpu", memory_format=torch.contiguous_format).eval().requires_grad_(True)  # type: ignore[call-overload]


def label_map_of(network: Prompted) -> tuple[int, ...] | None:
    return None if network.label_map is None else tuple(int(i) for i in network.label_map)


def map_by_frequency(network: Prompted, data: TrainingData, *values: Tensor) -> tuple[int, ...]:
    """The frequency label map of ``network`` as it is, over the training images without augmentation."""
    was_training = network.training
    network.eval()
    counts = torch.zeros((), dtype=torch.int64)  # [source, target] from the first batch on
    with torch.no_grad():
        for pixels, labels in batches(data.train, torch.arange(len(data.train)), EVALUATION_BATCH):
            source = network.source_logits(to_pixels(pixels, network.compute.device), *values)
            predicted, sources = source.argmax(dim=1).cpu(), source.shape[1]
            counts = counts + count_pairs(predicted, labels, sources=sources, targets=data.classes)
    network.train(was_training)
    return frequency_map(counts)
