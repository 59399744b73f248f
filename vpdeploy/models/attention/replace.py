"""Networks whose attention is replaced by an equal one, of which whole heads can be removed."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vpdeploy.errors import ModelError
from vpdeploy.models.attention.around import operations
from vpdeploy.models.attention.known import Known, count_holders, find_known, why_not
from vpdeploy.models.attention.multihead import MultiheadAttention

PREFIX = "heads:"
NOTICED = "code around it looks at its type or its attributes, and would do something else with an equal in its place"

Chosen = Mapping[str, tuple[nn.Module, Known]]


@dataclass(frozen=True)
class Replaced:
    """A network with equal attention. ``replaced``: module name -> what it was; ``left``: module name -> why it is as it was."""

    network: nn.Module
    replaced: dict[str, str]
    left: dict[str, str]


def replace_attention(network: nn.Module, example: Tensor, *, share: bool = False) -> Replaced:
    """A network equal to ``network`` with all attention replaced that can be. example: [n, c, h, w], which it takes.

    With ``share`` the tensors outside attention are those of ``network``, not copies: a large one is not in memory twice.
    ``network`` is not changed; where nothing is replaced, it is itself what is returned. Names stay; dtype, device, mode,
    memory format and requires_grad too. What is held in several places is replaced once, under its first name.

    Code around attention may look at its type or its attributes. So what the network does outside attention is compared,
    before and after (``around.operations``), and what makes a difference is left as it was.
    """
    found = list(_attentions(network))
    left = {name: f"{known.path}: {reason}" for name, _, known, reason in found if reason is not None}
    chosen = {name: (module, known) for name, module, known, reason in found if reason is None}
    if chosen:
        dense = operations(network, chosen, example)
        for name in _noticed(network, chosen, example, dense):
            left[name] = f"{chosen.pop(name)[1].path}: {NOTICED}"
    replaced = {name: PREFIX + known.path for name, (_, known) in chosen.items()}
    return Replaced(_exchange(network, chosen, share=share), replaced, left)


def _noticed(network: nn.Module, chosen: Chosen, example: Tensor, dense: list[str] | None) -> list[str]:
    """Which of ``chosen`` the network would notice if they were replaced: those that it does alone, or else all of them.

    ``dense``: what the network does as it is; None where it fails, and whoever runs it next says how.
    """

    def same(some: Chosen) -> bool:
        return operations(_exchange(network, some, share=True), chosen, example) == dense

    if dense is None or same(chosen):
        return []
    noticed = [name for name, attention in chosen.items() if not same({name: attention})]
    rest = {name: attention for name, attention in chosen.items() if name not in noticed}
    return noticed if rest and same(rest) else list(chosen)


def apply_replacements(network: nn.Module, names: Mapping[str, str]) -> nn.Module:
    """A network equal to ``network`` with exactly these modules replaced, as ``replace_attention`` told them.

    Raises: ModelError when one is not there, is of another kind or cannot be replaced.
    """
    found = {name: (module, known, reason) for name, module, known, reason in _attentions(network)}
    for name, wanted in names.items():
        if name not in found:
            raise ModelError(f"{name or 'the network'}: expected attention to replace by {wanted!r}; there is none")
        _, known, reason = found[name]
        if wanted != PREFIX + known.path:
            raise ModelError(f"{name or 'the network'}: got {known.path}; expected what {wanted!r} replaces")
        if reason is not None:
            raise ModelError(f"{name or 'the network'}: cannot be replaced by {wanted!r}: {reason}")
    return _exchange(network, {name: found[name][:2] for name in names})


def _attentions(network: nn.Module) -> Iterator[tuple[str, nn.Module, Known, str | None]]:
    """Name, module, kind and what keeps it from being replaced, of each attention module."""
    holders = count_holders(network)
    for name, module in network.named_modules():
        known = find_known(module)
        if known is not None:
            yield name, module, known, why_not(module, known, holders)


def _exchange(network: nn.Module, chosen: Chosen, *, share: bool = False) -> nn.Module:
    """A copy of ``network`` with the equals of the chosen modules in their places."""
    if not chosen:
        return network
    # deepcopy takes what its memo holds for the copy. So no replaced module is ever copied, and whatever the network
    # holds in several places, module or parameter, is one in the copy too.
    memo: dict[int, Any] = {}
    if share:
        memo = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    for module, known in chosen.values():
        new = known.build(module, lambda part: copy.deepcopy(part, memo))
        copies = {id(copied) for copied in memo.values()}
        for part in new.modules():
            if id(part) not in copies:
                part.training = module.training
        memo[id(module)] = new
    new = copy.deepcopy(network, memo)
    for module in new.modules():
        if isinstance(module, nn.TransformerEncoder):
            _keep_dense(module)
    return new


def _keep_dense(encoder: nn.TransformerEncoder) -> None:
    # It would pack padded sequences into nested tensors, for a kernel that wants nn.MultiheadAttention. Outputs at
    # padded positions are then those of training mode, no longer zeros.
    if any(isinstance(module, MultiheadAttention) for layer in encoder.layers for module in layer.children()):
        encoder.use_nested_tensor = False
