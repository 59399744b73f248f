"""The equals of timm's attention among tokens: Attention, AttentionRope and EvaAttention."""

from __future__ import annotations

from typing import Any

from torch import nn

from vpdeploy.models.attention.layers import Copy, separate
from vpdeploy.models.attention.tokens import RotaryAttention, TokenAttention


def unfit_tokens(module: Any) -> str | None:
    """Why ``module``, one of the three, has no equal whose heads can be removed one by one."""
    if not isinstance(module._modules.get("norm"), nn.Identity | None):
        return "its norm spans all heads, so that removing one changes the others"
    if _separate(module) and module.k_proj.out_features != module.q_proj.out_features:
        return "several of its query heads share a key head"
    return unfit_key_bias(module)


def unfit_key_bias(module: Any) -> str | None:
    """Why the keys of ``module`` have a bias after all: timm keeps zeros in a buffer for it."""
    bias = module._buffers.get("k_bias")
    if bias is not None and not bias.is_meta and bias.any():
        return "its k_bias is not zero"
    return None


def build_tokens(module: Any, copied: Copy) -> TokenAttention:
    """The equal of timm.layers.attention.Attention."""
    return _tokens(module, copied, prefix=0, rotate_half=False)


def build_rotary(module: Any, copied: Copy) -> RotaryAttention:
    """The equal of timm.layers.attention.AttentionRope or timm.models.eva.EvaAttention."""
    half = vars(module).get("rotate_half", False)  # older releases know one layout only
    return RotaryAttention(_tokens(module, copied, prefix=module.num_prefix_tokens, rotate_half=half))


def separate_with_biases(module: Any, copied: Copy) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    """The layers of a packed ``module.qkv`` whose biases, where it has some, are parameters of ``module``; k has none."""
    q, k, v = separate(module.qkv)
    if module._parameters.get("q_bias") is not None:
        q.register_parameter("bias", copied(module.q_bias))
        v.register_parameter("bias", copied(module.v_bias))
    return q, k, v


def _separate(module: Any) -> bool:
    return module._modules.get("q_proj") is not None


def _tokens(module: Any, copied: Copy, *, prefix: int, rotate_half: bool) -> TokenAttention:
    if _separate(module):
        q, k, v = (copied(layer) for layer in (module.q_proj, module.k_proj, module.v_proj))
    else:
        q, k, v = separate_with_biases(module, copied)
    return TokenAttention(
        q,
        k,
        v,
        copied(module.proj),
        q_norm=copied(module.q_norm),
        k_norm=copied(module.k_norm),
        gate=copied(module._modules.get("gate")),  # older releases have none
        head_dim=module.head_dim,
        dropout=module.attn_drop.p,
        proj_dropout=module.proj_drop.p,
        prefix=prefix,
        rotate_half=rotate_half,
    )
