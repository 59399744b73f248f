"""Tokens that begin as the network's own: prototypes of what its blocks read (SPT, arXiv:2402.02382)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vpdeploy.models.tokens.blocks import Block
from vpdeploy.models.tokens.prompt import token_blocks
from vpdeploy.recipe.tables import TokensTable

CLUSTERED = 4096  # rows that k-means looks at


@torch.no_grad()
def prototypes(
    network: nn.Module, canvas: Tensor, table: TokensTable, *, generator: torch.Generator
) -> dict[str, Tensor]:
    """``table.count`` tokens for each block that gets some, made of those of images that it reads: name of the block -> [N, c].

    canvas: [n, 3, C, C], normalised. Of a vision transformer's first block, what its patch embedding gives, before positions are
    added; of later ones the output of the block before, without the class token. ``network`` has no tokens yet.
    """
    blocks = token_blocks(network, table.kind)
    seen: dict[str, Tensor] = {}
    embedding = next((module for module in network.modules() if isinstance(module, nn.Conv2d)), None)

    def of_block(name: str) -> Any:
        return lambda module, inputs: seen.update({name: inputs[0].detach()})

    hooks = [block.module.register_forward_pre_hook(of_block(name)) for name, block in blocks.items()]
    if embedding is not None:
        hooks.append(embedding.register_forward_hook(lambda module, inputs, out: seen.update({"": out.detach()})))
    training = network.training
    try:
        network.eval()(canvas)
    finally:
        network.train(training)
        for hook in hooks:
            hook.remove()
    made = {}
    for number, (name, block) in enumerate(blocks.items()):
        rows = _of_images(seen[name], seen.get(""), block, first=number == 0).float().cpu()
        made[name] = _prototypes(rows, table, generator)
    return made


def _of_images(x: Tensor, embedded: Tensor | None, block: Block, *, first: bool) -> Tensor:
    """x: what ``block`` reads, [n, L, c] or [n, h, w, c]; embedded: [n, c, h, w], or of another width -> [n, P, c]."""
    if x.ndim == 4:
        return x.flatten(1, 2)
    if embedded is None or embedded.shape[1] != block.width:
        return x  # a stem of its own: which tokens are patches cannot be told
    patches = embedded.flatten(2).transpose(1, 2)
    return patches if first else x[:, x.shape[1] - patches.shape[1] :]


def _prototypes(rows: Tensor, table: TokensTable, generator: torch.Generator) -> Tensor:
    """rows: [n, P, c] -> [N, c]."""
    if table.prototype in ("mean", "max"):
        windows = rows.tensor_split(min(table.count, rows.shape[1]), dim=1)
        pooled = [part.mean(dim=1) if table.prototype == "mean" else part.amax(dim=1) for part in windows]
        rows = torch.stack(pooled, dim=1)
    flat = rows.flatten(0, 1)
    order = torch.randperm(len(flat), generator=generator)
    if table.prototype != "k-means":
        return flat[order.repeat(-(-table.count // len(order)))[: table.count]].clone()
    from sklearn.cluster import KMeans  # seconds to import

    seed = int(torch.randint(2**31, (1,), generator=generator))
    looked_at = flat[order[: max(CLUSTERED, table.count)]].numpy()
    centres = KMeans(table.count, random_state=seed).fit(looked_at).cluster_centers_
    return torch.from_numpy(centres.astype(np.float32))
