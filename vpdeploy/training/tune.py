"""Stage 2: weights and prompt of the network that ships. Every arm takes this road with the same schedule and streams."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from vpdeploy.models.tokens.prompt import take_tokens
from vpdeploy.progress import Display
from vpdeploy.recipe.tables import Recipe
from vpdeploy.run_folder import Journal
from vpdeploy.surgery.masked_weights import set_to_zero
from vpdeploy.training.fit import at_rest
from vpdeploy.training.network import Compute, Prompted, TrainingData, add_prompt, prompt_state
from vpdeploy.training.teacher import teacher_of
from vpdeploy.training.weights import (
    WeightSchedule,
    freeze_all_but,
    train_weights,
)
from vpdeploy.values import Dense, Tuned


def tune(
    backbone: nn.Module,
    data: TrainingData,
    *,
    prompt: Mapping[str, Tensor] | None,
    dense: Dense,
    classifier: str,
    mask: Mapping[str, Tensor],
    label_map: Sequence[int] | None,
    recipe: Recipe,
    compute: Compute,
    journal: Journal,
    display: Display,
) -> Tuned:
    """Train a copy of ``backbone``, already cut. prompt: its state to start from, empty to start anew, None for none. dense: what
    ``tune.distill`` compares with, without a prompt. classifier: the one layer that trains with ``tune.what`` = "head". mask:
    weights, by name, whose entries that are not kept are 0 and stay so; empty where channels were cut.

    Raises: VpdeployError when the loss is not finite.
    """
    table = recipe.tune
    assert table.distill != "auto", "a run settles it"
    backbone = copy.deepcopy(backbone).requires_grad_(True)
    if table.what == "head":
        freeze_all_but(backbone, backbone.get_submodule(classifier))
    canvas = add_prompt(backbone, recipe, data, stage=None if prompt is None else "tune", state=prompt or {})
    network = Prompted(canvas, backbone, compute, label_map=label_map)
    schedule = WeightSchedule(
        streams="tune",
        seed=recipe.seed,
        epochs=table.epochs,
        batch_size=table.batch_size,
        optimizer=table.optimizer,
        weight_lr=table.weight_lr,
        prompt_lr=table.prompt_lr,
        weight_decay=table.weight_decay,
        label_smoothing=table.label_smoothing,
        augment=recipe.data.augment,
    )
    zeros = partial(set_to_zero, network.backbone, mask) if mask else None
    teacher = teacher_of(dense, data, recipe, compute, share=table.distill)
    train_weights(network, data, schedule=schedule, journal=journal, display=display, teacher=teacher, after_step=zeros)
    state = prompt_state(network)
    take_tokens(network.backbone)
    return Tuned(at_rest(network.backbone), state, None if label_map is None else tuple(label_map))
