"""Between search and cut: prompts of fewer tokens (arXiv:2305.17223). One pass over the training images, no step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from vpdeploy.data.prepared import batches
from vpdeploy.models.tokens.prompt import PREFIX, split_prompt, token_parameters
from vpdeploy.recipe.tables import Recipe
from vpdeploy.scoring.condense import gradient_scores, kept_tokens, norm_scores, random_scores
from vpdeploy.scoring.straight_through import hard_mask
from vpdeploy.training.methods.task import SearchTask, as_row, inner, masked_network, with_tensors
from vpdeploy.training.network import Compute, Prompted, TrainingData, to_pixels
from vpdeploy.training.streams import stream
from vpdeploy.values import Dense, Found


def condense(task: SearchTask, found: Found, data: TrainingData, *, recipe: Recipe, compute: Compute) -> Found:
    """``found`` with the tokens that ``condense.keep`` lets stay; the others are removed, not set to zero: a token of zeros has a
    key still. They are scored behind the mask that ``found`` amounts to under the budget, in evaluation mode.
    """
    table = recipe.condense
    pixels, tokens = split_prompt(found.prompt)
    if table.score == "gradient":
        start = replace(task, dense=Dense(with_tensors(task.dense, found), found.label_map))
        network = masked_network(start, data, recipe, compute, trains=False, prompt=found.prompt).eval()
        gates = hard_mask(task.selector, as_row(found.scores, task)).float().to(compute.device)
        scores = gradient_scores(token_parameters(inner(network)), _logits(network, gates, data, recipe))
    elif table.score == "norm":
        scores = norm_scores(tokens)
    else:
        scores = random_scores(tokens, generator=stream(recipe.seed, "condense", 0, "scores"))
    stays = kept_tokens(scores, keep=table.keep, scope=table.scope)
    left = {PREFIX + name: rows[stays[name]].clone() for name, rows in tokens.items() if name in stays}
    return replace(found, prompt={**pixels, **left})


def _logits(network: Prompted, gates: Tensor, data: TrainingData, recipe: Recipe) -> Iterator[tuple[Tensor, Tensor]]:
    device = network.compute.device
    for images, labels in batches(data.train, torch.arange(len(data.train)), recipe.condense.batch_size):
        yield network(to_pixels(images, device), gates), labels.to(device)
