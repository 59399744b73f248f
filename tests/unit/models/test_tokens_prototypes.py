"""Tokens that begin as those of images: whose they are, and how they are made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import WIDTH, images, replaced, swin, timm_vit, torchvision_vit

from vpdeploy.models.tokens.blocks import blocks_of
from vpdeploy.models.tokens.prompt import put_tokens, token_parameters
from vpdeploy.models.tokens.prototypes import prototypes
from vpdeploy.recipe.tables import TokensTable

COUNT = 4
SAME = 1e-5  # float32 of float64


def made(
    network: Any, *, kind: str = "vpt-deep", count: int = COUNT, seed: int = 0, **values: Any
) -> dict[str, Tensor]:
    table = TokensTable(kind=kind, count=count, init="prototype", **values)  # type: ignore[arg-type]
    return prototypes(network, images(3), table, generator=torch.Generator().manual_seed(seed))


def read_by_hand(vit: Any) -> list[Tensor]:
    """What each block of torchvision's ViT makes its prototypes of: [n, patches, c]."""
    with torch.no_grad():
        patches = vit._process_input(images(3))
        x = torch.cat([vit.class_token.expand(3, -1, -1), patches], dim=1) + vit.encoder.pos_embedding
        found = [patches]
        for block in list(vit.encoder.layers)[:-1]:
            x = block(x)
            found.append(x[:, 1:])
    return found


def distances(rows: Tensor, there: Tensor) -> Tensor:
    """From each row to the nearest of [n, P, c], relative."""
    there = there.flatten(0, 1).double()  # the distance of two alike is the root of what rounding leaves
    return torch.cdist(rows.double(), there).amin(dim=1) / there.norm(dim=1).mean()


def test_rows_are_of_the_patches_that_a_block_reads():
    plain = torchvision_vit()
    network = replaced(plain)
    before = network(images())
    tokens = made(network)
    assert list(tokens) == [block.name for block in blocks_of(network)]
    for rows, there in zip(tokens.values(), read_by_hand(plain), strict=True):
        assert rows.shape == (COUNT, WIDTH) and rows.dtype == torch.float32
        assert float(distances(rows, there).max()) < SAME
        assert len(rows.unique(dim=0)) == COUNT  # none is drawn twice
    assert torch.equal(network(images()), before)
    assert all(not torch.equal(rows, made(network, seed=1)[name]) for name, rows in tokens.items())
    assert all(torch.equal(rows, made(network)[name]) for name, rows in tokens.items())


@pytest.mark.parametrize("how", ["mean", "max"])
def test_pooled_over_windows_of_patches(how):
    """Two windows of eight of the sixteen patches."""
    plain = torchvision_vit()
    tokens = made(replaced(plain), count=2, prototype=how)
    for rows, there in zip(tokens.values(), read_by_hand(plain), strict=True):
        halves = there[:, :8], there[:, 8:]
        pooled = torch.stack([half.mean(1) if how == "mean" else half.amax(1) for half in halves], dim=1)
        assert float(distances(rows, pooled).max()) < SAME


def test_centres_of_clusters_are_means_of_what_is_nearest_to_them():
    plain = torchvision_vit()
    for rows, there in zip(made(replaced(plain), prototype="k-means").values(), read_by_hand(plain), strict=True):
        flat = there.flatten(0, 1).float()
        nearest = torch.cdist(flat, rows).argmin(dim=1)
        centres = torch.stack([flat[nearest == k].mean(dim=0) for k in range(COUNT)])
        torch.testing.assert_close(rows, centres, rtol=1e-3, atol=1e-3)


def test_more_tokens_than_there_are_rows_come_twice():
    tokens = made(replaced(torchvision_vit()), count=2 * 3 * 16)
    assert all(len(rows) == 96 and len(rows.unique(dim=0)) == 48 for rows in tokens.values())


def test_registers_are_no_patches_and_in_windows_all_tokens_are():
    network = replaced(timm_vit(reg_tokens=2))
    names = [block.name for block in blocks_of(network)]
    seen: dict[str, Tensor] = {}
    for name in names:
        network.get_submodule(name).register_forward_pre_hook(
            lambda m, inputs, name=name: seen.update({name: inputs[0]})
        )
    tokens = made(network)
    assert float(distances(tokens[names[1]], seen[names[1]][:, 3:]).max()) < SAME
    windows = replaced(swin())
    assert [tuple(rows.shape) for rows in made(windows).values()] == [(COUNT, 24)] * 2 + [(COUNT, 48)] * 2


@pytest.mark.parametrize("kind", ["vpt-deep", "vpt-shallow"])
def test_they_are_tokens_like_others(kind):
    network = replaced(torchvision_vit())
    tokens = made(network, kind=kind)
    put_tokens(network, {name: rows.double() for name, rows in tokens.items()}, TokensTable(kind=kind))  # type: ignore[arg-type]
    assert {name: rows.shape for name, rows in token_parameters(network).items()} == {
        name: rows.shape for name, rows in tokens.items()
    }
