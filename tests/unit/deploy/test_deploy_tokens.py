"""Networks with tokens of every kind as ONNX files, at several batches."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from transformers import SIDE, VITS, replaced, swin, timm_vit, torchvision_vit

from vpdeploy.deploy.bake import Deployable
from vpdeploy.deploy.onnx_file import to_onnx
from vpdeploy.errors import ModelError
from vpdeploy.models.tokens.cross import CrossAttention, FoldedCross
from vpdeploy.models.tokens.fold import check_tokens, fold
from vpdeploy.models.tokens.prompt import new_tokens, put_tokens
from vpdeploy.prompts.canvas import Canvas
from vpdeploy.recipe.tables import TokensTable

ONNX_FLOAT32 = 1e-4  # relative to the largest logit: another library's exponential too
MATTERS = 0.05
AFTER = "after-attention"


def prompted(network: nn.Module, kind: str, count: int, position: str) -> tuple[nn.Module, nn.Module]:
    """With large tokens, and without."""
    plain = replaced(network).float()
    table = TokensTable(kind=kind, count=count, position=position)  # type: ignore[arg-type]
    twin, generator = copy.deepcopy(plain), torch.Generator().manual_seed(3)
    drawn = new_tokens(twin, table, generator=generator)
    put_tokens(twin, {name: torch.randn(rows.shape, generator=generator) for name, rows in drawn.items()}, table)
    return twin, plain


@pytest.mark.parametrize(
    ("make", "kind", "count", "position", "cross"),
    [
        (torchvision_vit, "vpt-deep", 3, AFTER, None),
        (swin, "vpt-deep", 3, AFTER, None),
        (timm_vit, "vpt-shallow", 3, AFTER, None),
        (VITS["timm, mean of patches"], "vpt-shallow", 3, AFTER, None),
        (torchvision_vit, "cvpt", 3, AFTER, FoldedCross),
        (torchvision_vit, "cvpt", 3, "before-attention", FoldedCross),
        (torchvision_vit, "cvpt", 20, "beside-attention", CrossAttention),
        (timm_vit, "cvpt", 20, AFTER, CrossAttention),
        (timm_vit, "cvpt", 3, "before-mlp", FoldedCross),
        (timm_vit, "cvpt", 20, "after-mlp", CrossAttention),
        (swin, "ffn-memory", 3, AFTER, None),
    ],
)
def test_the_file_computes_what_the_unfolded_network_does(
    tmp_path: Path, make: Any, kind: str, count: int, position: str, cross: Any
) -> None:
    network, plain = prompted(make(), kind, count, position)
    images = torch.rand(8, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    canvas = Canvas(SIDE, SIDE, mean=(0.5,) * 3, std=(0.5,) * 3, prompt=None)
    with torch.no_grad():
        expected, without = (of(canvas(images)).numpy() for of in (network, plain))
    scale = np.abs(expected).max()
    assert np.abs(expected - without).max() > MATTERS * scale
    fold(network, canvas_size=SIDE)
    assert cross is None or any(isinstance(module, cross) for module in network.modules())
    deployable = (
        Deployable(network, canvas, form="float", image_size=SIDE, resize_how="stretch").eval().requires_grad_(False)
    )
    to_onnx(deployable, tmp_path / "n.onnx", opset=18, metadata={})
    session = onnxruntime.InferenceSession(tmp_path / "n.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 3, 8):
        (found,) = session.run(["logits"], {"image": images[:batch].numpy()})
        assert np.abs(found - expected[:batch]).max() <= ONNX_FLOAT32 * scale


def test_what_does_not_run_with_tokens_is_told_before_training() -> None:
    network = replaced(torchvision_vit()).float()
    before = copy.deepcopy(network.state_dict())
    check_tokens(network, TokensTable(kind="cvpt"), canvas_size=SIDE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())

    with pytest.raises(
        ModelError, match="Walking does not run with tokens of kind 'vpt-shallow': TypeError: 'WithTokens' obj"
    ):
        check_tokens(Walking(network), TokensTable(kind="vpt-shallow"), canvas_size=SIDE)


class Walking(nn.Module):
    """Goes through its blocks one by one."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.embed = network.get_submodule("conv_proj")
        self.blocks = nn.Sequential(*network.get_submodule("encoder.layers").children())
        self.head = network.get_submodule("heads")

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=1))
