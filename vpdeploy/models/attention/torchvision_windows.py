"""The equals of torchvision's window attentions."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from vpdeploy.models.attention.layers import Copy, separate
from vpdeploy.models.attention.position_bias import MlpBias, TableBias
from vpdeploy.models.attention.window import ShiftedWindowAttention, WindowAttention


def build_swin(module: Any, copied: Copy) -> ShiftedWindowAttention:
    """The equal of torchvision.models.swin_transformer.ShiftedWindowAttention."""
    position_bias = TableBias(
        copied(module.relative_position_bias_table),
        copied(module.relative_position_index),
        tokens=math.prod(module.window_size),
        persistent=True,
    )
    return _shifted(module, copied, position_bias, scale=_head_dim(module) ** -0.5)


def build_swin_v2(module: Any, copied: Copy) -> ShiftedWindowAttention:
    """The equal of torchvision.models.swin_transformer.ShiftedWindowAttentionV2."""
    position_bias = MlpBias(
        copied(module.cpb_mlp),
        copied(module.relative_coords_table),
        copied(module.relative_position_index),
        tokens=math.prod(module.window_size),
        gain=16,
        persistent=True,
    )
    swin = _shifted(module, copied, position_bias, scale=1.0, logit_scale=copied(module.logit_scale))
    swin.attention.k.register_parameter("bias", None)  # its forward counts the bias of k as 0, whatever it is
    return swin


def build_maxvit(module: Any, copied: Copy) -> WindowAttention:
    """The equal of torchvision.models.maxvit.RelativePositionalMultiHeadAttention."""
    position_bias = TableBias(
        copied(module.relative_position_bias_table),
        copied(module.relative_position_index.view(-1)),
        tokens=module.max_seq_len,
        persistent=True,
    )
    q, k, v = separate(module.to_qkv)
    return WindowAttention(
        q,
        k,
        v,
        copied(module.merge),
        position_bias=position_bias,
        head_dim=module.head_dim,
        scale=module.scale_factor,  # of the whole width, not of a head's
        dropout=0.0,
        proj_dropout=0.0,
    )


def _shifted(
    module: Any, copied: Copy, position_bias: nn.Module, *, scale: float, logit_scale: nn.Parameter | None = None
) -> ShiftedWindowAttention:
    attention = WindowAttention(
        *separate(module.qkv),
        copied(module.proj),
        position_bias=position_bias,
        head_dim=_head_dim(module),
        scale=scale,
        logit_scale=logit_scale,
        dropout=module.attention_dropout,
        proj_dropout=module.dropout,
    )
    window, shift = tuple(module.window_size), tuple(module.shift_size)
    return ShiftedWindowAttention(attention, window=window, shift=shift)


def _head_dim(module: Any) -> int:
    return module.proj.in_features // module.num_heads
