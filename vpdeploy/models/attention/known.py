"""The attention modules that have an equal with separate heads, and what keeps one of them from being replaced."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from vpdeploy.models.attention.layers import Copy
from vpdeploy.models.attention.multihead import build_multihead, unfit_multihead
from vpdeploy.models.attention.timm_tokens import build_rotary, build_tokens, unfit_key_bias, unfit_tokens
from vpdeploy.models.attention.timm_windows import build_map, build_timm_swin, build_timm_swin_v2, unfit_map
from vpdeploy.models.attention.torchvision_windows import build_maxvit, build_swin, build_swin_v2

PLAIN = (nn.Linear, nn.Conv2d, NonDynamicallyQuantizableLinear)


def always_fit(module: Any) -> str | None:
    return None


@dataclass(frozen=True)
class Known:
    """One class of attention. ``split`` names the packed projections that are taken apart, ``layers`` the linear layers,
    ``methods`` what its forward calls on itself: with all of them as they were written, ``build`` gives its equal, unless
    ``unfit`` gives a reason.
    """

    library: str
    name: str
    split: tuple[str, ...]
    layers: tuple[str, ...]
    build: Callable[[Any, Copy], nn.Module]
    unfit: Callable[[Any], str | None] = always_fit
    methods: tuple[str, ...] = ("forward",)

    @property
    def path(self) -> str:
        return f"{self.library}.{self.name}"

    @property
    def type(self) -> type[nn.Module] | None:
        """The class, or None while its library is not imported: then no network holds one."""
        module = sys.modules.get(self.library)
        return None if module is None else getattr(module, self.name, None)


# A subclass stands before its base.
KNOWN = (
    Known(
        "torch.nn",
        "MultiheadAttention",
        ("in_proj_weight", "in_proj_bias"),
        ("out_proj",),
        build_multihead,
        unfit_multihead,
        ("forward", "merge_masks"),
    ),
    Known(
        "torchvision.models.swin_transformer",
        "ShiftedWindowAttentionV2",
        ("qkv",),
        ("qkv", "proj"),
        build_swin_v2,
        methods=("forward", "get_relative_position_bias"),
    ),
    Known(
        "torchvision.models.swin_transformer",
        "ShiftedWindowAttention",
        ("qkv",),
        ("qkv", "proj"),
        build_swin,
        methods=("forward", "get_relative_position_bias"),
    ),
    Known(
        "torchvision.models.maxvit",
        "RelativePositionalMultiHeadAttention",
        ("to_qkv",),
        ("to_qkv", "merge"),
        build_maxvit,
        methods=("forward", "get_relative_positional_bias"),
    ),
    Known("timm.layers.attention", "Attention", ("qkv",), ("qkv", "proj"), build_tokens, unfit_tokens),
    Known(
        "timm.layers.attention",
        "AttentionRope",
        ("qkv",),
        ("qkv", "q_proj", "k_proj", "v_proj", "proj"),
        build_rotary,
        unfit_tokens,
    ),
    Known(
        "timm.models.eva",
        "EvaAttention",
        ("qkv",),
        ("qkv", "q_proj", "k_proj", "v_proj", "proj"),
        build_rotary,
        unfit_tokens,
    ),
    Known(
        "timm.models.swin_transformer",
        "WindowAttention",
        ("qkv",),
        ("qkv", "proj"),
        build_timm_swin,
        methods=("forward", "_get_rel_pos_bias"),
    ),
    Known(
        "timm.models.swin_transformer_v2",
        "WindowAttention",
        ("qkv",),
        ("qkv", "proj"),
        build_timm_swin_v2,
        unfit_key_bias,
    ),
    Known("timm.models.maxxvit", "AttentionCl", ("qkv", "rel_pos"), ("qkv", "proj"), build_map, unfit_map),
    Known("timm.models.maxxvit", "Attention2d", ("qkv", "rel_pos", "proj"), ("qkv", "proj"), build_map, unfit_map),
)


def find_known(module: nn.Module) -> Known | None:
    """What kind of attention ``module`` is, or derives from."""
    return next((known for known in KNOWN if known.type is not None and isinstance(module, known.type)), None)


def count_holders(network: nn.Module) -> Counter[int]:
    """In how many places each module and each parameter of ``network`` is held, by id."""
    holders: Counter[int] = Counter()
    for module in network.modules():
        holders.update(id(child) for child in module._modules.values() if child is not None)
        holders.update(id(parameter) for parameter in module._parameters.values() if parameter is not None)
    return holders


def why_not(module: nn.Module, known: Known, holders: Counter[int]) -> str | None:
    """What keeps ``module``, of kind ``known``, from being replaced; None when it can be."""
    kind = type(module).__name__
    for method in known.methods:
        if getattr(type(module), method) is not getattr(known.type, method) or method in vars(module):
            return f"{kind} has a {method}() of its own, not that of {known.path}"
    for name, part in module.named_modules():
        where = f"its {name}" if name else "it"
        if parametrize.is_parametrized(part):
            return f"{where} has a computed weight: fold it in by torch.nn.utils.parametrize.remove_parametrizations()"
        if has_hooks(part):
            return f"{where} has hooks (weight_norm, spectral_norm and torch.nn.utils.prune leave some): remove them"
    for name in known.layers:
        part = getattr(module, name)
        if part is not None and type(part) not in PLAIN:
            return f"its {name} is a {type(part).__name__}, not a plain linear layer"
    for name in known.split:
        part = getattr(module, name)
        held = [part, *part.parameters()] if isinstance(part, nn.Module) else [part]
        if any(holders[id(item)] > 1 for item in held if item is not None):
            return f"its {name} is used elsewhere in the network too"
    return known.unfit(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether something is called with each forward or backward of ``module``, beside its own."""
    return any(
        (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
    )
