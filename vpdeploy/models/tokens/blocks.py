"""Where tokens can be put into a network: the blocks of a transformer, and what lies in them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vpdeploy.models.attention.known import count_holders, has_hooks
from vpdeploy.models.attention.multihead import MultiheadAttention
from vpdeploy.models.attention.tokens import TokenAttention
from vpdeploy.models.attention.window import ShiftedWindowAttention, WindowAttention

Attention = MultiheadAttention | TokenAttention | WindowAttention
Branch = Callable[[Any, Tensor], Tensor]  # a block, and what is on its way -> what is added to the stream


@dataclass(frozen=True)
class BlockKind:
    """A library's block, x + attention(norm(x)) and then x + mlp(norm2(x)): the names of these four in it, and of the MLP's two
    layers and of what lies between. ``attend``: its first branch, of x; ``after``: what its second does to what the MLP gives.
    None where it is not of that form.
    """

    library: str
    name: str
    norm: str
    attention: str
    mlp_norm: str
    mlp: str
    layers: tuple[str, str, str]
    attend: Branch | None
    after: Branch | None

    def is_of(self, module: nn.Module) -> bool:
        """Whether ``module`` is one, with the forward as it was written."""
        kind = getattr(sys.modules.get(self.library), self.name, None)
        return kind is not None and isinstance(module, kind) and type(module).forward is kind.forward


def _attend_torchvision(block: Any, x: Tensor) -> Tensor:
    y = block.ln_1(x)
    return block.dropout(block.self_attention(y, y, y, need_weights=False)[0])


KINDS = (
    BlockKind(
        "torchvision.models.vision_transformer",
        "EncoderBlock",
        *("ln_1", "self_attention", "ln_2", "mlp"),
        ("0", "1", "3"),
        _attend_torchvision,
        lambda block, out: out,
    ),
    BlockKind(
        "timm.models.vision_transformer",
        "Block",
        *("norm1", "attn", "norm2", "mlp"),
        ("fc1", "act", "fc2"),
        lambda block, x: block.drop_path1(block.ls1(block.attn(block.norm1(x)))),
        lambda block, out: block.drop_path2(block.ls2(out)),
    ),
    BlockKind(
        "torchvision.models.swin_transformer",
        "SwinTransformerBlock",
        *("norm1", "attn", "norm2", "mlp"),
        ("0", "1", "3"),
        lambda block, x: block.stochastic_depth(block.attn(block.norm1(x))),
        lambda block, out: block.stochastic_depth(out),
    ),
    BlockKind(
        "timm.models.swin_transformer",
        "SwinTransformerBlock",
        *("norm1", "attn", "norm2", "mlp"),
        ("fc1", "act", "fc2"),
        None,
        None,
    ),
)


@dataclass(frozen=True)
class Block:
    """One block of a network, by name. ``module`` is an ``OpenBlock`` where it computes more or less than its library has it."""

    name: str
    kind: BlockKind
    module: Any

    @property
    def norm(self) -> nn.Module:
        return self.module.get_submodule(self.kind.norm)

    @property
    def attention(self) -> Attention:
        return _plain(self.module.get_submodule(self.kind.attention))

    @property
    def mlp_layers(self) -> tuple[nn.Linear, nn.Module, nn.Linear]:
        first, between, second = (self.module.get_submodule(f"{self.kind.mlp}.{name}") for name in self.kind.layers)
        return first, between, second

    @property
    def cross_memory(self) -> nn.Module | None:
        """What the stream reads in an attention beside the block's."""
        return getattr(self._beside("cross"), "memory", None)

    @property
    def mlp_memory(self) -> nn.Module | None:
        """Units beside the MLP's."""
        return self._beside("memory")

    def _beside(self, name: str) -> nn.Module | None:
        return getattr(self.module, name) if isinstance(self.module, OpenBlock) else None

    @property
    def has_plain_mlp(self) -> bool:
        """Whether its MLP is two linear layers with an activation between, and nothing else."""
        mlp = self.module.get_submodule(self.kind.mlp)
        names = {name for name, child in mlp.named_children() if not isinstance(child, nn.Dropout | nn.Identity)}
        if names != set(self.kind.layers):
            return False
        first, _, second = self.mlp_layers
        linear = isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
        return linear and first.out_features == second.in_features

    @property
    def width(self) -> int:
        """Of a token."""
        k = self.attention.k
        assert isinstance(k, nn.Linear)
        return k.in_features


def stand_for(new: nn.Module, old: nn.Module) -> None:
    """Give ``new`` the children of ``old`` under their names, so that no tensor's name changes, and ``old`` for ``stood_for``."""
    for name, child in old.named_children():
        new.add_module(name, child)
    vars(new)["_stands_for"] = (old,)  # in a tuple: it is no child, its children are those of ``new``
    new.train(old.training)


def stood_for(new: nn.Module) -> nn.Module:
    """The module in whose place ``new`` stands."""
    return vars(new)["_stands_for"][0]


class OpenBlock(nn.Module):
    """A block whose branches are called one by one, so that something can stand between; its children keep their names.

    ``cross``, (x, attention) -> [n, L, c], is added to the stream at ``position``; ``memory``, (y, what lies between the MLP's
    layers) -> [n, L, c], to what the MLP makes of y. ``rows``: how many of the first tokens are computed; None for all.
    """

    def __init__(
        self,
        block: nn.Module,
        kind: BlockKind,
        *,
        cross: nn.Module | None = None,
        position: str = "after-attention",
        memory: nn.Module | None = None,
    ):
        super().__init__()
        stand_for(self, block)
        self.kind = kind
        self.cross, self.position, self.memory = cross, position, memory
        self.rows: int | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x: [n, L, c] -> [n, L, c], or [n, rows, c]."""
        assert self.kind.attend is not None and self.kind.after is not None
        if self.position == "before-attention":
            x = x + self._crossed(x)
        attended = self.kind.attend(self, x)
        x = x if self.rows is None else x[:, : self.rows]
        x = x + attended + (self._crossed(x) if self.position == "beside-attention" else 0.0)
        if self.position == "after-attention":
            x = x + self._crossed(x)
        y = self.get_submodule(self.kind.mlp_norm)(x)
        if self.position == "before-mlp":
            y = y + self._crossed(x)
        out = self.get_submodule(self.kind.mlp)(y)
        if self.memory is not None:
            out = out + self.memory(y, Block("", self.kind, self).mlp_layers[1])
        x = x + self.kind.after(self, out)
        return x + self._crossed(x) if self.position == "after-mlp" else x

    def _crossed(self, x: Tensor) -> Tensor | float:
        return 0.0 if self.cross is None else self.cross(x, Block("", self.kind, self).attention)


def why_not_exchanged(network: nn.Module, place: nn.Module) -> str | None:
    """What something with the children of ``place``, put in its place in ``network``, would lose or change beside it; None when
    nothing.
    """
    if has_hooks(place):
        return "has hooks, which would not be called any more: remove them"
    holders = count_holders(network)
    if any(holders[id(part)] > 1 for part in place.modules() if next(part.parameters(), None) is not None):
        return "stands in several places of the network, in whole or in part"
    return None


def blocks_of(network: nn.Module) -> Iterator[Block]:
    """The blocks of ``network``, in the order of its modules, whose attention can read further keys and values: that which was
    replaced by an equal (``models.attention``) in blocks that are as their library wrote them.
    """
    for name, module in network.named_modules():
        if isinstance(module, OpenBlock):
            yield Block(name, module.kind, module)
            continue
        kind = next((kind for kind in KINDS if kind.is_of(module)), None)
        if kind is not None and isinstance(_plain(module.get_submodule(kind.attention)), Attention):
            yield Block(name, kind, module)


def _plain(attention: Any) -> Any:
    return attention.attention if isinstance(attention, ShiftedWindowAttention) else attention
