"""Learned tokens in a transformer: put in, taken out, and folded to what they amount to.

Tokens are one tensor for each block that has some, by its name: [N, c]; those of "ffn-memory" [N, 2 c].
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from vpdeploy.errors import ModelError
from vpdeploy.models.attention.memory import ConstantMemory, PromptTokens
from vpdeploy.models.tokens.blocks import Block, PromptedBlock, blocks_of, stood_for
from vpdeploy.models.tokens.cross import CrossAttention, fold_cross
from vpdeploy.models.tokens.feed import FeedMemory, widen
from vpdeploy.models.tokens.sequence import WithTokens
from vpdeploy.recipe.tables import TokensTable

FOLDED = 1e-3  # relative, float32: the same sums in another order, through all blocks; a wrong fold is off by far more
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


WHERE = {
    "vpt-deep": "a vision transformer or a Swin of torchvision or timm",
    "vpt-shallow": "a vision transformer of torchvision or timm",
    "cvpt": "a vision transformer of torchvision or timm",
    "ffn-memory": "a vision transformer of torchvision or timm, or torchvision's Swin",
}


def new_tokens(network: nn.Module, table: TokensTable, *, generator: torch.Generator) -> dict[str, Tensor]:
    """``table.count`` tokens for each block, as their authors' code draws them: name of the block -> [N, c].

    VPT: even over (-v, v) with v = sqrt(6 / (3 p^2 + c)), p the side of a patch (16 where it cannot be told). CVPT: with
    v = sqrt(6 / ((N + blocks) c)). Memory: keys from N(0, 0.02), values 0, so that the first step sees the network as it is.
    """
    blocks, count = token_blocks(network, table.kind), table.count
    patch = next((module.kernel_size[0] for module in network.modules() if isinstance(module, nn.Conv2d)), 16)

    def drawn(width: int) -> Tensor:
        if table.kind == "ffn-memory":
            keys = 0.02 * torch.randn(count, width, generator=generator)
            return torch.cat([keys, torch.zeros(count, width)], dim=1)
        area = (count + len(blocks)) * width if table.kind == "cvpt" else 3 * patch**2 + width
        return math.sqrt(6 / area) * (2 * torch.rand(count, width, generator=generator) - 1)

    return {name: drawn(block.width) for name, block in blocks.items()}


def put_tokens(network: nn.Module, tokens: Mapping[str, Tensor], table: TokensTable) -> None:
    """Change ``network``: ``tokens`` of the kind that ``table`` names become parameters of it; where there are none, it has none.

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
        if rows.ndim != 2 or rows.shape[1] != width:
            raise ModelError(f"prompt.tokens: got {list(rows.shape)} for {name!r}; expected [count, {width}]")
        if len(rows):
            _put(network, blocks[name], rows.detach().clone(), table)


def _put(network: nn.Module, block: Block, rows: Tensor, table: TokensTable) -> None:
    dropout = table.dropout
    if table.kind == "vpt-deep":
        block.attention.memory = PromptTokens(rows, block.norm, dropout=dropout)
    elif table.kind == "vpt-shallow":
        name = _sequence(network)
        assert name is not None
        blocks = network.get_submodule(name)
        assert isinstance(blocks, nn.Sequential)
        _exchange(network, name, WithTokens(blocks, rows, dropout=dropout))
    elif table.kind == "cvpt":
        cross = CrossAttention(PromptTokens(rows, nn.Identity(), dropout=dropout))
        _exchange(network, block.name, PromptedBlock(block.module, block.kind, cross=cross, position=table.position))
    else:
        assert table.kind == "ffn-memory", f"no tokens of kind {table.kind!r}"
        memory = FeedMemory(rows, dropout=dropout)
        _exchange(network, block.name, PromptedBlock(block.module, block.kind, memory=memory))


def take_tokens(network: nn.Module) -> None:
    """Change ``network``: as it was before ``put_tokens``."""
    for name, module in list(network.named_modules()):
        if isinstance(module, WithTokens):
            _exchange(network, name, stood_for(module))
    for block in list(blocks_of(network)):
        block.attention.memory = None
        if isinstance(block.module, PromptedBlock):
            _exchange(network, block.name, stood_for(block.module))


def token_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Name of a block -> its tokens, as they stand in ``network``; blocks without any are absent."""
    return {block.name: module.tokens for block, module in _holders(network)}


def _holders(network: nn.Module) -> Iterator[tuple[Block, PromptTokens | WithTokens | FeedMemory]]:
    sequences = [module for module in network.modules() if isinstance(module, WithTokens)]
    for number, block in enumerate(blocks_of(network)):
        if number == 0 and sequences:
            yield block, sequences[0]
        for part in (block.attention.memory, block.cross_memory, block.mlp_memory):
            if isinstance(part, PromptTokens | FeedMemory):
                yield block, part


@torch.no_grad()
def fold_tokens(network: nn.Module) -> None:
    """Change ``network``, which computes in evaluation what it did: keys and values of tokens become constants, what the stream
    looks at in an attention of its own its cheapest form, and units beside an MLP units of it. Tokens in the sequence stay.
    """
    for block, part in list(_holders(network)):
        part.eval()
        if isinstance(part, PromptTokens) and part is block.cross_memory:
            block.module.cross = fold_cross(part.tokens, block.attention)
        elif isinstance(part, PromptTokens):
            block.attention.memory = ConstantMemory(*part(block.attention))
        elif isinstance(part, FeedMemory):
            first, _, second = block.mlp_layers
            widen(first, second, part.tokens)
            _exchange(network, block.name, stood_for(block.module))


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


def _exchange(network: nn.Module, name: str, new: nn.Module) -> None:
    holder, _, last = name.rpartition(".")
    network.get_submodule(holder).add_module(last, new)


@torch.no_grad()
def check_tokens(network: nn.Module, table: TokensTable, *, canvas_size: int) -> None:
    """Raises: ModelError when ``network`` has no block for tokens of the kind, does not run with them, or not as before when they
    are folded. It is not changed.
    """
    twin = copy.deepcopy(network).eval()
    put_tokens(twin, new_tokens(twin, table, generator=torch.Generator().manual_seed(0)), table)
    image = torch.rand(1, 3, canvas_size, canvas_size, generator=torch.Generator().manual_seed(1))
    try:
        expected = twin(image)
        fold_tokens(twin)
        folded = twin(image)
    except Exception as e:  # somebody's forward: whatever it raises
        raise ModelError(
            f"prompt.tokens.kind: {type(network).__name__} does not run with tokens of kind {table.kind!r}: {type(e).__name__}: "
            f"{e}; expected another kind, or 'none'"
        ) from e
    difference = float((folded - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    if not difference <= FOLDED:
        raise ModelError(
            f"prompt.tokens.kind: with tokens of kind {table.kind!r} folded, {type(network).__name__} gives logits that differ "
            f"by {difference:.2g} of the largest; expected at most {FOLDED:g}: another kind, or 'none'"
        )
