"""The equals of timm's attention with a bias by relative position: Swin, Swin V2, and MaxViT with its kin."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from vpdeploy.models.attention.layers import Copy, layer, separate
from vpdeploy.models.attention.position_bias import MlpBias, TableBias
from vpdeploy.models.attention.timm_tokens import separate_with_biases
from vpdeploy.models.attention.window import MapAttention, WindowAttention


def build_timm_swin(module: Any, copied: Copy) -> WindowAttention:
    """The equal of timm.models.swin_transformer.WindowAttention."""
    q, k, v = separate(module.qkv)
    head_dim = module.proj.in_features // module.num_heads
    return WindowAttention(
        q,
        k,
        v,
        copied(module.proj),
        position_bias=TableBias(
            copied(module.relative_position_bias_table),
            copied(module.relative_position_index.view(-1)),
            tokens=math.prod(module.window_size),
            persistent=False,
        ),
        head_dim=head_dim,
        scale=head_dim**-0.5,
        dropout=module.attn_drop.p,
        proj_dropout=module.proj_drop.p,
    )


def build_timm_swin_v2(module: Any, copied: Copy) -> WindowAttention:
    """The equal of timm.models.swin_transformer_v2.WindowAttention."""
    q, k, v = separate_with_biases(module, copied)
    return WindowAttention(
        q,
        k,
        v,
        copied(module.proj),
        position_bias=MlpBias(
            copied(module.cpb_mlp),
            copied(module.relative_coords_table),
            copied(module.relative_position_index.view(-1)),
            tokens=math.prod(module.window_size),
            gain=16,
            persistent=False,
        ),
        head_dim=module.proj.in_features // module.num_heads,
        scale=1.0,
        logit_scale=copied(module.logit_scale),
        dropout=module.attn_drop.p,
        proj_dropout=module.proj_drop.p,
    )


def unfit_map(module: Any) -> str | None:
    """Why an Attention2d or AttentionCl has no equal here."""
    kind = type(module.rel_pos).__name__
    if kind not in BIASES or type(module.rel_pos).__module__ != "timm.layers.pos_embed_rel":
        return f"its rel_pos is a {kind}; known are {', '.join(BIASES)}"
    if kind == "RelPosMlp" and module.rel_pos.prefix_tokens:
        return "its rel_pos leaves room for tokens outside the map"
    return None


def build_map(module: Any, copied: Copy) -> MapAttention:
    """The equal of timm.models.maxxvit.Attention2d or AttentionCl."""
    q, k, v = separate(module.qkv, module.dim_head if module.head_first else None)
    channels_last = isinstance(module.proj, nn.Linear)
    attention = WindowAttention(
        q,
        k,
        v,
        copied(module.proj) if channels_last else layer(module.proj.weight, copied(module.proj.bias)),
        position_bias=BIASES[type(module.rel_pos).__name__](module.rel_pos, copied),
        head_dim=module.dim_head,
        scale=module.scale,
        dropout=module.attn_drop.p,
        proj_dropout=module.proj_drop.p,
    )
    return MapAttention(attention, channels_last=channels_last)


def _table(rel_pos: Any, copied: Copy) -> TableBias:
    table, index = rel_pos.relative_position_bias_table, rel_pos.relative_position_index
    tokens = math.isqrt(index.numel())  # those outside the map included
    return TableBias(copied(table), copied(index), tokens=tokens, persistent=False)


def _table_by_head(rel_pos: Any, copied: Copy) -> TableBias:
    """TensorFlow's table is [heads, 2 h - 1, 2 w - 1], and counts from the query to the key: the other way round."""
    table = rel_pos.relative_position_bias_table
    turned = nn.Parameter(table.detach().flatten(1).t().clone(memory_format=torch.contiguous_format))
    turned.requires_grad_(table.requires_grad)
    h, w = rel_pos.window_size
    down, right = _steps(h, table), _steps(w, table)
    # [query row, query column, key row, key column]
    index = (down[:, None, :, None] + h - 1) * (2 * w - 1) + right[None, :, None, :] + w - 1
    return TableBias(turned, index.flatten(), tokens=h * w, persistent=False)


def _steps(size: int, like: Tensor) -> Tensor:
    """[query, key]: how far the key is beyond the query."""
    at = torch.arange(size, device=like.device)
    return at - at.unsqueeze(1)


def _mlp(rel_pos: Any, copied: Copy) -> MlpBias:
    return MlpBias(
        copied(rel_pos.mlp),
        copied(rel_pos.rel_coords_log),
        copied(rel_pos.relative_position_index),
        tokens=rel_pos.window_area,
        gain=rel_pos.bias_gain,
        persistent=False,
    )


BIASES = {"RelPosBias": _table, "RelPosBiasTf": _table_by_head, "RelPosMlp": _mlp}
