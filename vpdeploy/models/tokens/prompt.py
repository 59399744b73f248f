"""Learned tokens in a transformer: put in, and taken out.

Tokens are one tensor for each block that has some, by its name: [N, c]; those of "ffn-memory" [N, 2 c].
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from vpdeploy.errors import ModelError
from vpdeploy.models.attention.memory import Projection, PromptTokens
from vpdeploy.models.tokens.blocks import Block, OpenBlock, blocks_of, stood_for
from vpdeploy.models.tokens.cross import CrossAttention
from vpdeploy.models.tokens.feed import FeedMemory
from vpdeploy.models.tokens.sequence import InSequence, WithTokens
from vpdeploy.recipe.tables import TokensTable

PREFIX = "tokens."  # in the state of a prompt, before a block's name


def split_prompt(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A prompt's state: that of its pixels, and name of a block -> its tokens."""
    tokens = {name.removeprefix(PREFIX): rows for name, rows in state.items() if name.startswith(PREFIX)}
    return {name: tensor for name, tensor in state.items() if not name.startswith(PREFIX)}, tokens


def token_blocks(network: nn.Module, kind: str) -> dict[str, Block]:
    """The blocks that tokens of ``kind`` are put before, by name. Raises: ModelError when there is none."""
    blocks = list(blocks_of(network))
    if kind in ("cvpt", "ffn-memory"):
        blocks = [block for block in blocks if block.kind.attend is not None]
    if kind == "ffn-memory":
        blocks = [block for block in blocks if block.has_plain_mlp]
    if kind == "cvpt":
        blocks = [block for block in blocks if "swin" not in block.kind.library]
    if kind == "vpt-shallow":
        blocks = blocks[:1] if _sequence(network) is not None else []
    if not blocks:
        raise ModelError(
            f"prompt.tokens.kind: got {kind!r} for {type(network).__name__}, which has no block for it; expected "
            + WHERE[kind]
            + ", whose attention can be replaced (`vpdeploy inspect` says where not, and why)"
        )
    return {block.name: block for block in blocks}


def token_places(network: nn.Module, kind: str) -> dict[str, nn.Module]:
    """What tokens of ``kind`` are put into, or in place of, by name. Raises: ModelError when there is nothing."""
    blocks = token_blocks(network, kind)
    if kind != "vpt-shallow":
        return {name: block.attention if kind == "vpt-deep" else block.module for name, block in blocks.items()}
    name = _sequence(network)
    assert name is not None
    return {name: network.get_submodule(name)}


WHERE = {
    "vpt-deep": "a vision transformer or a Swin of torchvision or timm",
    "vpt-shallow": "a vision transformer of torchvision or timm",
    "cvpt": "a vision transformer of torchvision or timm",
    "ffn-memory": "a vision transformer of torchvision or timm, or torchvision's Swin",
}


def new_tokens(network: nn.Module, table: TokensTable, *, generator: torch.Generator) -> dict[str, Tensor]:
    """``table.count`` tokens for each block, as their authors' code draws them: name of the block -> [N, c], or [N, w] with
    ``table.width``.

    VPT: even over (-v, v) with v = sqrt(6 / (3 p^2 + c)), p the side of a patch (16 where it cannot be told). CVPT: with
    v = sqrt(6 / ((N + blocks) c)). Memory: keys from N(0, 0.02), values 0, so that the first step sees the network as it is.
    """
    blocks, count = token_blocks(network, table.kind), table.count
    if table.width is not None and any(block.width != next(iter(blocks.values())).width for block in blocks.values()):
        raise ModelError(
            f"prompt.tokens.width: got {table.width} for {type(network).__name__}, whose blocks differ in width; leave it out"
        )
    patch = next((module.kernel_size[0] for module in network.modules() if isinstance(module, nn.Conv2d)), 16)

    def drawn(width: int) -> Tensor:
        if table.kind == "ffn-memory":
            keys = 0.02 * torch.randn(count, width, generator=generator)
            return torch.cat([keys, torch.zeros(count, width)], dim=1)
        area = (count + len(blocks)) * width if table.kind == "cvpt" else 3 * patch**2 + width
        return math.sqrt(6 / area) * (2 * torch.rand(count, width, generator=generator) - 1)

    return {name: drawn(table.width or block.width) for name, block in blocks.items()}


def new_projection(network: nn.Module, table: TokensTable, *, generator: torch.Generator) -> Projection | None:
    """What brings tokens of ``table.width`` to the width of a block, as VPT's code draws it: weights from N(0, 2 / c)."""
    if table.width is None:
        return None
    width = next(iter(token_blocks(network, table.kind).values())).width
    weight = torch.randn(width, table.width, generator=generator) * math.sqrt(2 / width)
    return nn.Parameter(weight), nn.Parameter(torch.zeros(width))


def put_tokens(
    network: nn.Module, tokens: Mapping[str, Tensor], table: TokensTable, *, projection: Projection | None = None
) -> None:
    """Change ``network``: ``tokens`` of the kind that ``table`` names become parameters of it; where there are none, it has none.
    With ``projection`` they are as wide as it reads.

    Raises: ModelError for a block that is not there, or of another width.
    """
    take_tokens(network)
    if not any(len(rows) for rows in tokens.values()):
        return
    if table.kind == "none":
        raise ModelError("prompt.tokens.kind: got tokens for 'none'; expected the kind that they are of")
    blocks = token_blocks(network, table.kind)
    for name, rows in tokens.items():
        if name not in blocks:
            raise ModelError(f"prompt.tokens: got tokens for {name!r}; expected one of {', '.join(blocks)}")
        width = blocks[name].width * (1 + (table.kind == "ffn-memory"))
        width = width if projection is None else projection[0].shape[1]
        if rows.ndim != 2 or rows.shape[1] != width:
            raise ModelError(f"prompt.tokens: got {list(rows.shape)} for {name!r}; expected [count, {width}]")
        if len(rows):
            _put(network, blocks[name], rows.detach().clone(), table, projection)


def _put(network: nn.Module, block: Block, rows: Tensor, table: TokensTable, projection: Projection | None) -> None:
    dropout = table.dropout
    if table.kind == "vpt-deep":
        block.attention.memory = PromptTokens(rows, block.norm, dropout=dropout, projection=projection)
    elif table.kind == "vpt-shallow":
        name = _sequence(network)
        assert name is not None
        blocks = network.get_submodule(name)
        assert isinstance(blocks, nn.Sequential)
        exchange(network, name, WithTokens(blocks, rows, dropout=dropout, projection=projection))
    elif table.kind == "cvpt":
        cross = CrossAttention(PromptTokens(rows, nn.Identity(), dropout=dropout))
        exchange(network, block.name, OpenBlock(block.module, block.kind, cross=cross, position=table.position))
    else:
        assert table.kind == "ffn-memory", f"no tokens of kind {table.kind!r}"
        memory = FeedMemory(rows, dropout=dropout)
        exchange(network, block.name, OpenBlock(block.module, block.kind, memory=memory))


def take_tokens(network: nn.Module) -> None:
    """Change ``network``: as it was before ``put_tokens``."""
    for name, module in list(network.named_modules()):
        if isinstance(module, WithTokens):
            exchange(network, name, stood_for(module))
    for block in list(blocks_of(network)):
        block.attention.memory = None
        if isinstance(block.module, OpenBlock):
            exchange(network, block.name, stood_for(block.module))


def token_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Name of a block -> its tokens, as they stand in ``network``; blocks without any are absent."""
    return {block.name: module.tokens for block, module in holders(network)}


def token_rows(network: nn.Module) -> dict[str, Tensor]:
    """Name of a block -> what its tokens are to it, [N, c]: what ``put_tokens`` takes without a projection."""
    return {
        block.name: module.tokens if isinstance(module, FeedMemory) else module.rows()
        for block, module in holders(network)
    }


def token_projection(network: nn.Module) -> list[nn.Parameter]:
    """Weight and bias of the projection; empty without one."""
    names = ("projection_weight", "projection_bias")
    found = [getattr(module, name, None) for _, module in holders(network) for name in names]
    return list({id(parameter): parameter for parameter in found if parameter is not None}.values())


def holders(network: nn.Module) -> Iterator[tuple[Block, PromptTokens | WithTokens | FeedMemory]]:
    """Each block that has tokens, and the module that holds them."""
    sequences = [module for module in network.modules() if isinstance(module, WithTokens)]
    for number, block in enumerate(blocks_of(network)):
        if number == 0 and sequences:
            yield block, sequences[0]
        for part in (block.attention.memory, block.cross_memory, block.mlp_memory):
            if isinstance(part, PromptTokens | FeedMemory):
                yield block, part


def as_published(network: nn.Module) -> None:
    """Change ``network``: deep tokens stand in the sequence. In windows they stay what they were, keys and values that are
    computed from them at each call.
    """
    for block, part in list(holders(network)):
        if isinstance(part, PromptTokens) and part is block.attention.memory and "swin" not in block.kind.library:
            block.attention.memory = None
            exchange(network, block.name, InSequence(block.module, part.rows().detach()))


def _sequence(network: nn.Module) -> str | None:
    """The one chain that all blocks stand in, by name; None where they do not, or something else stands between them."""
    names = [block.name for block in blocks_of(network) if "swin" not in block.kind.library]
    holders = {name.rpartition(".")[0] for name in names}
    if len(holders) != 1:
        return None
    (holder,) = holders
    chain = network.get_submodule(holder)
    whole = isinstance(chain, nn.Sequential | WithTokens) and len(list(chain.children())) == len(names)
    return holder if whole else None


def exchange(network: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` in the place that is called ``name``."""
    holder, _, last = name.rpartition(".")
    network.get_submodule(holder).add_module(last, new)
