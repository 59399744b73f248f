"""What a transformer computes in evaluation, in its cheapest form: what tokens amount to, and what is read of the last block."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vpdeploy.errors import ModelError
from vpdeploy.models.attention.memory import ConstantMemory, PromptTokens
from vpdeploy.models.tokens.blocks import Block, OpenBlock, blocks_of, stood_for, why_not_exchanged
from vpdeploy.models.tokens.cross import FoldedCross, fold_cross
from vpdeploy.models.tokens.feed import FeedMemory, widen
from vpdeploy.models.tokens.prompt import exchange, holders, new_projection, new_tokens, put_tokens, token_places
from vpdeploy.models.tokens.sequence import WithTokens
from vpdeploy.recipe.tables import TokensTable
from vpdeploy.values import ChannelGroup, Fold, Member

FOLDED = 1e-5  # relative, float32: the same sums in another order; a wrong fold is off by far more
LEADING = (1, 2)  # what a classifier may read: the class token; and another for distillation


def fold(network: nn.Module, *, canvas_size: int) -> tuple[Fold, ...]:
    """Change ``network``, which computes in evaluation what it did. Gives what was done, and what was not and why; nothing for a
    network without blocks that tokens can be put into.
    """
    return (*fold_tokens(network, canvas_size=canvas_size), *fold_readout(network, canvas_size=canvas_size))


@torch.no_grad()
def fold_tokens(network: nn.Module, *, canvas_size: int) -> tuple[Fold, ...]:
    """Change ``network``: keys and values of tokens become constants, what the stream looks at in an attention of its own its
    cheapest form, and units beside an MLP units of it. Tokens in the sequence stay.

    Raises: ModelError when it computes something else then.
    """
    with_tokens = list(holders(network))
    if not with_tokens:
        return ()
    images = _images(network.eval(), canvas_size)
    expected = network(images)
    found: Counter[tuple[bool, str]] = Counter()
    for block, part in with_tokens:
        if isinstance(part, PromptTokens) and part is block.cross_memory:
            block.module.cross = fold_cross(part.rows(), block.attention)
            linear = isinstance(block.module.cross, FoldedCross)
            found[True, "two linear layers" if linear else "constant keys and values"] += 1
        elif isinstance(part, PromptTokens):
            block.attention.memory = ConstantMemory(*part(block.attention))
            found[True, "constant keys and values"] += 1
        elif isinstance(part, FeedMemory):
            first, _, second = block.mlp_layers
            widen(first, second, part.tokens)
            exchange(network, block.name, stood_for(block.module))
            found[True, "hidden units of the MLP"] += 1
        else:
            found[False, "in the sequence: from the second block on each reads what the one before makes of them"] += 1
    difference = relative(network(images), expected)
    if not difference <= FOLDED:
        raise ModelError(
            f"prompt.tokens.kind: with its tokens folded, {type(network).__name__} gives logits that differ by {difference:.2g} "
            f"of the largest; expected at most {FOLDED:g}: another kind, or 'none'"
        )
    return tuple(
        Fold("tokens", done, f"{how}, in {count} block{'s' if count > 1 else ''}" if done else how)
        for (done, how), count in found.items()
    )


@torch.no_grad()
def fold_readout(network: nn.Module, *, canvas_size: int) -> tuple[Fold, ...]:
    """Change ``network``: its last block computes the tokens alone that the logits depend on, of keys and values of all.

    Whether a token is read is tried: not-a-number in its place reaches the logits if it is, but for comparisons; these see large
    numbers there.
    """
    block = next(reversed(list(blocks_of(network))), None)
    if block is None:
        return ()
    if "swin" in block.kind.library:
        return (_readout(False, "all of the last block are averaged"),)
    if reason := why_not_exchanged(network, block.module):
        return (_readout(False, f"{block.name} {reason}"),)
    images = _images(network.eval(), canvas_size)
    count, rows = _tokens_read(network, block, images)
    if rows is None:
        return (_readout(False, f"of the last block's {count}, others are read than the first {LEADING[-1]}"),)
    expected, before = network(images), block.module
    opened = before if isinstance(before, OpenBlock) else OpenBlock(before, block.kind)
    exchange(network, block.name, opened)
    attention: Any = block.attention
    opened.rows = attention.rows = rows
    try:
        difference = relative(network(images), expected)
    except Exception as e:  # somebody's forward: whatever it raises
        reason = (
            f"{type(network).__name__} does not run when the last block gives {rows} of {count}: {type(e).__name__}"
        )
    else:
        if difference <= FOLDED:
            return (_readout(True, f"the last block computes {rows} of {count}: no other is read"),)
        reason = f"with {rows} of the last block's {count} logits differ by {difference:.2g} of the largest"
    opened.rows = attention.rows = None
    exchange(network, block.name, before)
    return (_readout(False, reason),)


def as_shipped(network: nn.Module, *, canvas_size: int) -> nn.Module:
    """``network`` as a file computes it, with the same tensors: a copy whose last block computes what is read, or ``network``."""
    twin = copy.deepcopy(network)
    return twin if any(made.done for made in fold_readout(twin, canvas_size=canvas_size)) else network


def with_constants(groups: Sequence[ChannelGroup], network: nn.Module) -> list[ChannelGroup]:
    """``groups``, those of heads with what ``fold`` made of tokens in ``network`` among their members, so that it is cut with
    them. The units that it widened an MLP by belong to no group.
    """
    constants = dict(_constants(network))
    return [replace(group, members=(*group.members, *_members(group, constants))) for group in groups]


Axis = tuple[str, int, int]  # a tensor, one of its axes, and how many positions of it belong to a head


def _constants(network: nn.Module) -> Iterator[tuple[str, tuple[int, list[Axis]]]]:
    """The weight of the keys of each block's attention: the width of a head, and the axes of constants that heads have."""
    names = {id(module): name for name, module in network.named_modules()}
    for block in blocks_of(network):
        attention, beside = names[id(block.attention)], f"{block.name}.cross"
        axes: list[Axis] = []
        for holder, memory in ((attention, block.attention.memory), (beside, block.cross_memory)):
            if isinstance(memory, ConstantMemory):
                axes += [(f"{holder}.memory.{part}", 1, 1) for part in ("key", "value")]
        cross = getattr(block.module, "cross", None)
        if isinstance(cross, FoldedCross):
            parts = (("scores.weight", 0), ("scores.bias", 0), ("out.weight", 1))
            axes += [(f"{beside}.{part}", axis, cross.tokens) for part, axis in parts]
        yield f"{attention}.k.weight", (block.attention.head_dim, axes)


def _members(group: ChannelGroup, constants: Mapping[str, tuple[int, list[Axis]]]) -> Iterator[Member]:
    for member in group.members:
        if member.axis == 0 and member.tensor in constants:
            width, axes = constants[member.tensor]
            channels = member.channels[::width]  # of each head
            for tensor, axis, each in axes:
                of_all = tuple(channel for channel in channels for _ in range(each))
                yield Member(tensor, axis, "both", tuple(range(len(of_all))), of_all)


def _readout(done: bool, how: str) -> Fold:
    return Fold("read-out", done, how)


def _tokens_read(network: nn.Module, block: Block, images: Tensor) -> tuple[int, int | None]:
    """How many tokens ``block`` gives, and how many of the first of them the logits depend on: one, two, or all but those that
    were put behind the image's; None for others.
    """
    shapes: list[torch.Size] = []
    hook = block.module.register_forward_hook(lambda module, args, out: shapes.append(out.shape))
    expected = network(images)
    hook.remove()
    count = shapes[0][1]
    large = 1e3 * torch.randn(shapes[0], generator=torch.Generator().manual_seed(0)).to(images)
    behind = sum(len(part.tokens) for _, part in holders(network) if isinstance(part, WithTokens))
    for rows in (*LEADING, *([count - behind] if behind else [])):
        spoilt = (
            torch.equal(_spoilt(network, block, images, rows=rows, by=by), expected)
            for by in (torch.full_like(large, torch.nan), large)
        )
        if all(spoilt):
            return count, rows
    return count, None


def _spoilt(network: nn.Module, block: Block, images: Tensor, *, rows: int, by: Tensor) -> Tensor:
    """The logits with ``by``, [n, L, c], in place of all but the first ``rows`` tokens that ``block`` gives."""
    hook = block.module.register_forward_hook(lambda module, args, out: torch.cat([out[:, :rows], by[:, rows:]], dim=1))
    try:
        return network(images)
    finally:
        hook.remove()


def _images(network: nn.Module, canvas_size: int) -> Tensor:
    """Four to try ``network`` with, two of them as pixels are and two as they are after normalisation."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 3, canvas_size, canvas_size)
    images = torch.cat([torch.rand(shape, generator=generator), torch.randn(shape, generator=generator)])
    return images.to(next(network.parameters()))


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


@torch.no_grad()
def check_tokens(network: nn.Module, table: TokensTable, *, canvas_size: int) -> None:
    """Raises: ModelError when ``network`` has no block for tokens of the kind, is changed by their place alone, does not run with
    them, or not as before when they are folded. It is not changed.
    """
    for name, place in token_places(network, table.kind).items():
        if reason := why_not_exchanged(network, place):
            raise ModelError(
                f"prompt.tokens.kind: got {table.kind!r} for {type(network).__name__}, whose {name} {reason}; "
                "expected blocks as their library made them, or 'none'"
            )
    twin = copy.deepcopy(network).eval()
    drawn = torch.Generator().manual_seed(0)
    tokens, projection = new_tokens(twin, table, generator=drawn), new_projection(twin, table, generator=drawn)
    # Some begin as nothing, of which every fold is right.
    tokens = {name: rows + 0.1 * torch.randn(rows.shape, generator=drawn) for name, rows in tokens.items()}
    put_tokens(twin, tokens, table, projection=projection)
    try:
        fold_tokens(twin, canvas_size=canvas_size)
    except ModelError:
        raise
    except Exception as e:  # somebody's forward: whatever it raises
        raise ModelError(
            f"prompt.tokens.kind: {type(network).__name__} does not run with tokens of kind {table.kind!r}: {type(e).__name__}: "
            f"{e}; expected another kind, or 'none'"
        ) from e
