"""The last layer: which it is, how many classes it has, and networks with another one in its place."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vpdeploy.errors import ModelError


def find_classifier(backbone: nn.Module, name: str | None) -> str:
    """The qualified name of the classifier: ``name``, or the last nn.Linear or 1x1 nn.Conv2d in module order.

    Raises: ModelError when ``name`` is no such layer, or there is none at all.
    """
    candidates = [path for path, module in backbone.named_modules() if path and _is_candidate(module)]
    if not candidates:
        raise ModelError(
            f"{type(backbone).__name__}: got no nn.Linear and no 1x1 nn.Conv2d; expected one as the classifier: "
            "end the network in one of them"
        )
    if name is None:
        return candidates[-1]
    if name in candidates:
        return name
    module = dict(backbone.named_modules()).get(name)
    what = "no such module" if module is None else f"a {type(module).__name__}"
    shown = ", ".join(repr(path) for path in candidates[:-11:-1])
    more = f" and {len(candidates) - 10} more" if len(candidates) > 10 else ""
    raise ModelError(
        f"model.classifier: got {name!r}, {what}; expected the name of an nn.Linear or a 1x1 nn.Conv2d; "
        f"candidates, the last first: {shown}{more}"
    )


def class_count(backbone: nn.Module, classifier: str) -> int:
    """How many classes the layer named ``classifier`` tells apart."""
    return _layer(backbone, classifier).weight.shape[0]


def replace_classifier(backbone: nn.Module, classifier: str, classes: int, *, generator: torch.Generator) -> nn.Module:
    """A copy of ``backbone`` with a fresh classifier of ``classes`` rows, drawn from ``generator`` (on the CPU).

    The new layer has a bias where the old one had, and its dtype and device.
    """
    old = _layer(backbone, classifier)
    fan_in = old.weight[0].numel()
    weight = torch.empty(classes, *old.weight.shape[1:])
    # What nn.Linear and nn.Conv2d do by default, from our own generator.
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
    bound = 1 / math.sqrt(fan_in)
    bias = torch.empty(classes).uniform_(-bound, bound, generator=generator) if old.bias is not None else None
    return _exchange(backbone, classifier, weight=weight, bias=bias)


def take_rows(backbone: nn.Module, classifier: str, rows: Sequence[int]) -> nn.Module:
    """A copy of ``backbone`` whose output i is the old output ``rows[i]``: how a label map is baked."""
    old = _layer(backbone, classifier)
    assert rows and all(0 <= row < old.weight.shape[0] for row in rows), f"rows {rows} of {old.weight.shape[0]}"
    chosen = torch.tensor(rows, device=old.weight.device)
    bias = old.bias.detach()[chosen] if old.bias is not None else None
    return _exchange(backbone, classifier, weight=old.weight.detach()[chosen], bias=bias)


def _is_candidate(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear)


def _layer(backbone: nn.Module, classifier: str) -> nn.Linear | nn.Conv2d:
    layer = backbone.get_submodule(classifier)
    assert isinstance(layer, (nn.Linear, nn.Conv2d)), f"{classifier} is a {type(layer).__name__}"
    return layer


def _exchange(backbone: nn.Module, classifier: str, *, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A copy of ``backbone`` whose classifier holds these tensors, in the old layer's dtype, device and mode."""
    new = copy.deepcopy(backbone)
    layer = _layer(new, classifier)
    kept = layer.weight
    layer.weight = nn.Parameter(weight.to(kept), requires_grad=kept.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(kept), requires_grad=kept.requires_grad)
    if isinstance(layer, nn.Conv2d):
        layer.out_channels = len(weight)
    else:
        layer.out_features = len(weight)
    return new
