"""Where tokens can be put into a network: the blocks of a transformer, and what lies in them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from vpdeploy.models.attention.multihead import MultiheadAttention
from vpdeploy.models.attention.tokens import TokenAttention
from vpdeploy.models.attention.window import ShiftedWindowAttention, WindowAttention

Attention = MultiheadAttention | TokenAttention | WindowAttention


@dataclass(frozen=True)
class BlockKind:
    """A library's block, x + attention(norm(x)) and then x + mlp(norm2(x)): the names of these four in it."""

    library: str
    name: str
    norm: str
    attention: str
    mlp_norm: str
    mlp: str

    def is_of(self, module: nn.Module) -> bool:
        """Whether ``module`` is one, with the forward as it was written."""
        kind = getattr(sys.modules.get(self.library), self.name, None)
        return kind is not None and isinstance(module, kind) and type(module).forward is kind.forward


KINDS = (
    BlockKind("torchvision.models.vision_transformer", "EncoderBlock", "ln_1", "self_attention", "ln_2", "mlp"),
    BlockKind("timm.models.vision_transformer", "Block", "norm1", "attn", "norm2", "mlp"),
    BlockKind("torchvision.models.swin_transformer", "SwinTransformerBlock", "norm1", "attn", "norm2", "mlp"),
    BlockKind("timm.models.swin_transformer", "SwinTransformerBlock", "norm1", "attn", "norm2", "mlp"),
)


@dataclass(frozen=True)
class Block:
    """One block of a network, by name."""

    name: str
    kind: BlockKind
    module: nn.Module
    norm: nn.Module
    attention: Attention

    @property
    def width(self) -> int:
        """Of a token."""
        k = self.attention.k
        assert isinstance(k, nn.Linear)
        return k.in_features


def blocks_of(network: nn.Module) -> Iterator[Block]:
    """The blocks of ``network``, in the order of its modules, whose attention can read further keys and values: that which was
    replaced by an equal (``models.attention``) in blocks that are as their library wrote them.
    """
    for name, module in network.named_modules():
        kind = next((kind for kind in KINDS if kind.is_of(module)), None)
        if kind is None:
            continue
        attention = module.get_submodule(kind.attention)
        if isinstance(attention, ShiftedWindowAttention):
            attention = attention.attention
        if isinstance(attention, Attention):
            yield Block(name, kind, module, module.get_submodule(kind.norm), attention)
