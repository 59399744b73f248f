"""timm's networks: which attention of theirs is replaced, and which is not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from vpdeploy.models.attention.replace import Replaced, replace_attention

timm = pytest.importorskip("timm")
from timm.layers import attention  # noqa: E402
from timm.models import eva, maxxvit, swin_transformer, swin_transformer_v2, vision_transformer  # noqa: E402

SAME_FLOAT32 = 1e-5
NOTHING = torch.zeros(1)  # for modules that are not called
SMALL = {"img_size": 32, "num_classes": 5}
TRANSFORMER = {**SMALL, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
SWIN = {**SMALL, "embed_dim": 12, "depths": (2, 2), "num_heads": (3, 3), "window_size": 4}


def coatnet(kind: str, rel_pos_type: str) -> Callable[[], nn.Module]:
    transformer = maxxvit.MaxxVitTransformerCfg(dim_head=8, rel_pos_type=rel_pos_type)
    config = maxxvit.MaxxVitCfg((16,), (1,), kind, 8, transformer_cfg=transformer)  # pyright: ignore
    return lambda: maxxvit.MaxxVit(config, **SMALL)


NETWORKS = {
    "vit": (lambda: vision_transformer.VisionTransformer(**TRANSFORMER), "timm.layers.attention.Attention", 2),
    "eva": (lambda: eva.Eva(**TRANSFORMER, use_rot_pos_emb=True), "timm.models.eva.EvaAttention", 2),
    "eva rope": (
        lambda: eva.Eva(**TRANSFORMER, attn_type="rope", use_rot_pos_emb=True),
        f"{attention.__name__}.AttentionRope",
        2,
    ),
    "swin": (
        lambda: swin_transformer.SwinTransformer(**SWIN),
        "timm.models.swin_transformer.WindowAttention",
        4,
    ),
    "swin v2": (
        lambda: swin_transformer_v2.SwinTransformerV2(**SWIN),
        "timm.models.swin_transformer_v2.WindowAttention",
        4,
    ),
    "maxvit": (coatnet("M", "bias_tf"), "timm.models.maxxvit.AttentionCl", 2),
    "coatnet": (coatnet("T", "mlp"), "timm.models.maxxvit.Attention2d", 1),
}


@pytest.mark.parametrize(("make", "kind", "count"), NETWORKS.values(), ids=NETWORKS.keys())
def test_networks_keep_their_logits(make: Callable[[], nn.Module], kind: str, count: int):
    torch.manual_seed(0)
    network = make().eval()
    for parameter in network.parameters():
        parameter.data.add_(torch.randn(parameter.shape) * 0.2)
    x = torch.randn(3, 3, 32, 32)
    found = replace_attention(network, x)
    assert list(found.replaced.values()) == [f"heads:{kind}"] * count and not found.left
    with torch.no_grad():
        logits, again = network(x), found.network(x)
    assert logits.std() > 1e-2 and (again - logits).abs().max() <= SAME_FLOAT32 * logits.abs().max()


class Own(attention.Attention):
    def forward(self, x, attn_mask=None, is_causal=False):
        return -super().forward(x, attn_mask, is_causal)


def key_bias(kind: Any, **options: Any) -> nn.Module:
    module = kind(24, num_heads=3, qkv_bias=True, **options)
    module.k_bias[3] = 1
    return module


def map_attention(rel_pos_cls: Any = None) -> nn.Module:
    return maxxvit.AttentionCl(24, dim_head=8, rel_pos_cls=rel_pos_cls)


def with_prefix(num_heads: int, **options: Any) -> nn.Module:
    return timm.layers.pos_embed_rel.RelPosMlp((2, 3), num_heads, prefix_tokens=1, **options)


def of_its_own(num_heads: int, **options: Any) -> nn.Module:
    class RelPosBias(timm.layers.pos_embed_rel.RelPosBias):
        def get_bias(self):
            return -super().get_bias()

    return RelPosBias((2, 3), num_heads, **options)


NORM = {"scale_norm": True, "norm_layer": nn.LayerNorm}
REASONS = [
    (lambda: attention.Attention(24, num_heads=3, **NORM), "its norm spans all heads"),
    (lambda: attention.AttentionRope(24, num_heads=3, **NORM), "its norm spans all heads"),
    (lambda: attention.AttentionRope(24, num_heads=4, qkv_fused=False, num_kv_heads=2), "heads share a key head"),
    (lambda: Own(24, num_heads=3), "Own has a forward() of its own, not that of timm.layers.attention.Attention"),
    (lambda: key_bias(eva.EvaAttention, scale_norm=False), "its k_bias is not zero"),
    (lambda: key_bias(swin_transformer_v2.WindowAttention, window_size=(2, 2)), "its k_bias is not zero"),
    (map_attention, "its rel_pos is a NoneType; known are RelPosBias, RelPosBiasTf, RelPosMlp"),
    (lambda: map_attention(of_its_own), "its rel_pos is a RelPosBias;"),
    (lambda: map_attention(with_prefix), "its rel_pos leaves room for tokens outside the map"),
]


@pytest.mark.parametrize(("make", "reason"), REASONS)
def test_what_cannot_be_replaced_is_left_with_the_reason(make: Callable[[], nn.Module], reason: str):
    network = nn.ModuleDict({"bad": make()})
    found = replace_attention(network, NOTHING)
    assert found == Replaced(network, {}, found.left)
    assert reason in found.left["bad"]


def test_a_bias_that_two_modules_share_is_left():
    bias = timm.layers.pos_embed_rel.RelPosBias((2, 3), 3)
    network = nn.ModuleDict({name: map_attention(lambda **options: bias) for name in "ab"})
    left = replace_attention(network, NOTHING).left
    assert "its rel_pos is used elsewhere" in left["b"] and len(left) == 2


def test_a_table_by_head_keeps_whether_it_learns():
    module = map_attention(lambda **options: timm.layers.pos_embed_rel.RelPosBiasTf((2, 3), **options))
    module.rel_pos.requires_grad_(False)
    new = replace_attention(module, NOTHING).network
    names = [name for name, parameter in new.named_parameters() if not parameter.requires_grad]
    assert names == ["attention.position_bias.table"]


def test_neither_timm_nor_torchvision_is_imported_for_it():
    code = (
        "import sys, torch; from torch import nn; from vpdeploy.models.attention.replace import replace_attention;"
        "assert len(replace_attention(nn.MultiheadAttention(4, 2), torch.zeros(1)).replaced) == 1;"
        "sys.exit(any(name.partition('.')[0] in ('timm', 'torchvision') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
