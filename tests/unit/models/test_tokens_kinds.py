"""Every kind of token: what it computes, by hand; what it folds to; and that heads and units go as they would without."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import SIDE, VITS, WIDTH, images, randomised, replaced, swin, torchvision_vit

from vpdeploy.errors import ModelError
from vpdeploy.models.attention.memory import ConstantMemory
from vpdeploy.models.tokens.blocks import OpenBlock, blocks_of
from vpdeploy.models.tokens.cross import CrossAttention, FoldedCross
from vpdeploy.models.tokens.feed import widen
from vpdeploy.models.tokens.fold import check_tokens, fold, fold_tokens, with_constants
from vpdeploy.models.tokens.prompt import new_tokens, put_tokens, take_tokens, token_parameters
from vpdeploy.models.tokens.sequence import WithTokens
from vpdeploy.recipe.tables import TokensTable
from vpdeploy.surgery.cut import cut
from vpdeploy.surgery.exactness import probe
from vpdeploy.surgery.gates import Gated, mask_row
from vpdeploy.surgery.groups import example_input, find_groups
from vpdeploy.surgery.plan import plan
from vpdeploy.values import ChannelMask, Fold

SAME_FLOAT64 = 1e-9  # of outputs of order 1 to 10, the same sums in another order
MATTERS = 0.1  # by how much tokens move the outputs: else a fold that drops them would pass
KINDS = ("vpt-deep", "vpt-shallow", "cvpt", "ffn-memory")
POSITIONS = ("before-attention", "beside-attention", "after-attention", "before-mlp", "after-mlp")


def table(kind: str, *, count: int = 4, **values: Any) -> TokensTable:
    return TokensTable(kind=kind, count=count, **values)  # type: ignore[arg-type]


def prompted(network: nn.Module, asked: TokensTable, *, counts: tuple[int, ...] = ()) -> nn.Module:
    """With tokens so large that they matter. ``counts``: of each block, where they differ."""
    generator = torch.Generator().manual_seed(3)
    tokens = new_tokens(network, asked, generator=generator)
    made = {
        name: torch.randn(rows.shape, generator=generator, dtype=torch.float64)[: counts[i] if counts else None]
        for i, (name, rows) in enumerate(tokens.items())
    }
    put_tokens(network, made, asked)
    return network


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", VITS)
@torch.no_grad()
def test_folded_is_what_was_there(kind, name):
    plain = replaced(VITS[name]())
    network, x = prompted(copy.deepcopy(plain), table(kind)), images()
    expected = network(x)
    assert (expected - plain(x)).abs().max() > MATTERS
    fold_tokens(network, canvas_size=SIDE)
    torch.testing.assert_close(network(x), expected, rtol=SAME_FLOAT64, atol=SAME_FLOAT64)
    left = token_parameters(network)
    assert bool(left) == (kind == "vpt-shallow")


@pytest.mark.parametrize("kind", KINDS)
def test_names_stay_and_taking_out_gives_back_what_was(kind):
    network, x = replaced(torchvision_vit()), images()
    names, types = list(network.state_dict()), [type(module) for module in network.modules()]
    expected = network(x)
    prompted(network, table(kind))
    added = [name for name in network.state_dict() if name not in names]
    assert all(name.endswith("tokens") for name in added) and set(names) <= set(network.state_dict())
    assert [
        name for name, p in network.named_parameters() if any(p is own for own in token_parameters(network).values())
    ] == added
    for twin in (copy.deepcopy(network), network):
        take_tokens(twin)
        assert list(twin.state_dict()) == names and [type(module) for module in twin.modules()] == types
        assert torch.equal(twin(x), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_new_tokens_learn_and_only_they(kind):
    network = replaced(torchvision_vit()).requires_grad_(False)
    asked = table(kind)
    tokens = new_tokens(network, asked, generator=torch.Generator().manual_seed(0))
    before = network(images())
    put_tokens(network, {name: rows.double() for name, rows in tokens.items()}, asked)
    after = network(images())
    assert torch.equal(before, after) == (kind == "ffn-memory")  # whose values begin at 0
    after.square().sum().backward()
    found = token_parameters(network)
    assert len(found) == (1 if kind == "vpt-shallow" else 3)
    assert all(rows.grad is not None and bool(rows.grad.any()) for rows in found.values())
    assert all(p.grad is None for p in network.parameters() if all(p is not own for own in found.values()))


@torch.no_grad()
def test_in_the_sequence_they_go_through_every_block():
    """Behind the class token, as published; here they stand last."""
    plain = torchvision_vit()
    network = prompted(replaced(plain), table("vpt-shallow"))
    (tokens,) = token_parameters(network).values()
    vit: Any = plain
    x = vit._process_input(images())
    x = torch.cat([vit.class_token.expand(2, -1, -1), x], dim=1) + vit.encoder.pos_embedding
    x = torch.cat([x[:, :1], tokens.expand(2, -1, -1), x[:, 1:]], dim=1)
    for block in vit.encoder.layers:
        x = block(x)
    expected = vit.heads(vit.encoder.ln(x[:, 0]))
    torch.testing.assert_close(network(images()), expected, rtol=SAME_FLOAT64, atol=SAME_FLOAT64)


@torch.no_grad()
def test_what_comes_of_them_is_dropped():
    """Where a mean of all tokens is read, they are not among them."""
    blocks = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()).double()
    tokens, x = torch.randn(3, WIDTH, dtype=torch.float64), torch.randn(2, 7, WIDTH, dtype=torch.float64)
    assert torch.equal(WithTokens(blocks, tokens)(x), blocks(torch.cat([x, tokens.expand(2, -1, -1)], dim=1))[:, :7])


@pytest.mark.parametrize("position", POSITIONS)
@torch.no_grad()
def test_the_stream_looks_at_them_by_copies_of_the_blocks_projections(position):
    """By nn.MultiheadAttention itself: queries of the stream, keys and values of the tokens, no norm."""
    plain = torchvision_vit()
    network = prompted(replaced(plain), table("cvpt", position=position))
    vit: Any = plain
    x = vit._process_input(images())
    x = torch.cat([vit.class_token.expand(2, -1, -1), x], dim=1) + vit.encoder.pos_embedding
    for block, tokens in zip(vit.encoder.layers, token_parameters(network).values(), strict=True):
        rows = tokens.expand(2, -1, -1)

        def look(x: Tensor, block: Any = block, rows: Tensor = rows) -> Tensor:
            return block.self_attention(x, rows, rows, need_weights=False)[0]

        def attend(x: Tensor, block: Any = block) -> Tensor:
            y = block.ln_1(x)
            return block.self_attention(y, y, y, need_weights=False)[0]

        if position == "before-attention":
            x = x + look(x)
        x = x + attend(x) + (look(x) if position == "beside-attention" else 0)
        if position == "after-attention":
            x = x + look(x)
        y = block.ln_2(x) + (look(x) if position == "before-mlp" else 0)
        x = x + block.mlp(y)
        if position == "after-mlp":
            x = x + look(x)
    expected = vit.heads(vit.encoder.ln(x)[:, 0])
    torch.testing.assert_close(network(images()), expected, rtol=SAME_FLOAT64, atol=SAME_FLOAT64)


@torch.no_grad()
def test_memory_is_hidden_units_without_bias():
    plain = torchvision_vit()
    network = prompted(replaced(plain), table("ffn-memory"))
    vit: Any = plain
    x = vit._process_input(images())
    x = torch.cat([vit.class_token.expand(2, -1, -1), x], dim=1) + vit.encoder.pos_embedding
    for block, tokens in zip(vit.encoder.layers, token_parameters(network).values(), strict=True):
        y = block.ln_1(x)
        x = x + block.self_attention(y, y, y, need_weights=False)[0]
        y = block.ln_2(x)
        extra = sum(
            F.gelu(y @ key).unsqueeze(-1) * value
            for key, value in zip(tokens[:, :WIDTH], tokens[:, WIDTH:], strict=True)
        )
        x = x + block.mlp(y) + extra
    expected = vit.heads(vit.encoder.ln(x)[:, 0])
    torch.testing.assert_close(network(images()), expected, rtol=SAME_FLOAT64, atol=SAME_FLOAT64)


@pytest.mark.parametrize(
    ("name", "count", "kind"),
    [
        # 2 * 3 * N * 24 products for each token against 2 * 24 * 24 + 2 * N * 24: N below 12
        ("torchvision", 11, FoldedCross),
        ("torchvision", 12, CrossAttention),
        ("timm", 2, FoldedCross),
        ("timm, norms of q and k", 2, CrossAttention),  # a norm stands between projection and product
    ],
)
def test_the_cheapest_form_that_is_exact_is_taken(name, count, kind):
    network = prompted(replaced(VITS[name]()), table("cvpt", count=count))
    fold_tokens(network, canvas_size=SIDE)
    assert [type(block.module.cross) for block in blocks_of(network)] == [kind] * 3


@torch.no_grad()
def test_units_beside_the_mlp_become_units_of_it():
    network = prompted(replaced(torchvision_vit()), table("ffn-memory", count=6))
    fold_tokens(network, canvas_size=SIDE)
    assert not any(isinstance(module, OpenBlock) for module in network.modules())
    layers = [block.mlp_layers for block in blocks_of(network)]
    assert all((first.out_features, second.in_features) == (46, 46) for first, _, second in layers)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_heads_and_units_go_as_they_would_without_tokens(kind):
    """masked == removed with tokens of unlike counts in place: groups were found before any were put in."""
    network = replaced(torchvision_vit())
    groups = probe(network, find_groups(network, example_input(16)), example=example_input(16)).prunable
    assert len(groups) == 6  # the heads and the hidden units of each block; not the stream, whose norms span it
    drawn = np.random.default_rng(0)
    keep = {group.root: tuple(bool(k) for k in drawn.permutation(group.width) >= group.width // 3) for group in groups}
    assert any(not all(row) for row in keep.values())
    mask = ChannelMask(keep)
    smaller = cut(network, plan(network, groups, mask))
    counts = () if kind == "vpt-shallow" else (2, 0, 4)
    for one in (network, smaller):
        prompted(one, table(kind), counts=counts)
    masked = Gated(copy.deepcopy(network), groups)(images(), mask_row(groups, mask, dtype=torch.float64))
    torch.testing.assert_close(smaller(images()), masked, rtol=SAME_FLOAT64, atol=SAME_FLOAT64)
    assert (masked - network(images())).abs().max() > MATTERS
    fold_tokens(smaller, canvas_size=SIDE)
    torch.testing.assert_close(smaller(images()), masked, rtol=SAME_FLOAT64, atol=SAME_FLOAT64)


@pytest.mark.parametrize("kind", [*KINDS, "none"])
@pytest.mark.parametrize("name", VITS)
@torch.no_grad()
def test_the_last_block_computes_what_is_read_of_it(kind, name):
    network = replaced(VITS[name]())
    if kind != "none":
        prompted(network, table(kind, position="before-attention" if kind == "cvpt" else "after-attention"))
    expected, plain = network(images()), copy.deepcopy(network)
    given: dict[str, Tensor] = {}
    (*_, made) = fold(network, canvas_size=SIDE)
    block = list(blocks_of(network))[-1]
    block.module.register_forward_hook(lambda module, args, out: given.update(out=out))
    torch.testing.assert_close(network(images()), expected, rtol=SAME_FLOAT64, atol=SAME_FLOAT64)
    tokens = given["out"].shape[1]
    if "mean" in name and kind == "vpt-shallow":
        assert made == Fold("read-out", True, f"the last block computes {tokens} of {tokens + 4}: no other is read")
    elif "mean" in name:
        expected_reason = f"of the last block's {tokens}, others are read than the first 2"
        assert made == Fold("read-out", False, expected_reason) and tokens >= 16
    else:
        assert made.done and tokens == 1 and made.how.startswith("the last block computes 1 of ")
    # what it does not compute is dead work: it may be anything. And nothing else is
    last, ramp = list(blocks_of(plain))[-1].module, torch.linspace(0, 2, WIDTH, dtype=torch.float64)
    for computed, same in ((tokens if made.done else 2, made.done), (tokens - 1, False)):
        hook = last.register_forward_hook(
            lambda module, args, out, first=computed: torch.cat([out[:, :first], out[:, first:] * ramp], dim=1)
        )
        assert torch.equal(plain(images()), expected) == same
        hook.remove()


@pytest.mark.parametrize("position", POSITIONS)
@torch.no_grad()
def test_wherever_the_stream_looks_the_last_block_computes_what_is_read(position):
    network = prompted(replaced(torchvision_vit()), table("cvpt", position=position))
    expected = network(images())
    assert fold(network, canvas_size=SIDE)[-1].done
    torch.testing.assert_close(network(images()), expected, rtol=SAME_FLOAT64, atol=SAME_FLOAT64)


@torch.no_grad()
def test_a_token_for_distillation_is_read_too():
    timm = pytest.importorskip("timm")
    plain = timm.models.deit.VisionTransformerDistilled(
        img_size=SIDE, patch_size=4, depth=2, num_heads=3, embed_dim=WIDTH, num_classes=5
    )
    network = replaced(randomised(plain))
    expected = network(images())
    assert fold(network, canvas_size=SIDE) == (
        Fold("read-out", True, "the last block computes 2 of 18: no other is read"),
    )
    torch.testing.assert_close(network(images()), expected, rtol=SAME_FLOAT64, atol=SAME_FLOAT64)


@torch.no_grad()
def test_a_network_that_asks_for_all_tokens_gets_them():
    """It reads the first alone, and lays the others out in a picture all the same."""

    class Drawing(torchvision.models.VisionTransformer):
        def forward(self, x: Tensor) -> Tensor:
            n = len(x)
            x = torch.cat([self.class_token.expand(n, -1, -1), self._process_input(x)], dim=1)
            x = self.encoder(x)
            self.picture = x[:, 1:].unflatten(1, (4, 4))
            return self.heads(x[:, 0])

    torch.manual_seed(0)
    drawn = Drawing(
        image_size=SIDE, patch_size=4, num_layers=2, num_heads=3, hidden_dim=WIDTH, mlp_dim=40, num_classes=5
    )
    network = replaced(randomised(drawn))
    expected, types = network(images()), [type(module) for module in network.modules()]
    (made,) = fold(network, canvas_size=SIDE)
    assert made == Fold("read-out", False, "Drawing does not run when the last block gives 1 of 17: RuntimeError")
    assert torch.equal(network(images()), expected) and [type(module) for module in network.modules()] == types


class Comparing(torchvision.models.VisionTransformer):
    """Counts large numbers in tokens that it reads nothing else of: not-a-number is none."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.class_token.expand(len(x), -1, -1), self._process_input(x)], dim=1)
        x = self.encoder(x)
        return self.heads(x[:, 0] * (1 + (x[:, 1:] > 3).to(x).sum(dim=1)))


class Weighing(torchvision.models.VisionTransformer):
    """Reads the first token, and how many there are."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.class_token.expand(len(x), -1, -1), self._process_input(x)], dim=1)
        x = self.encoder(x)
        return self.heads(x[:, 0] * (1 + 1e-3 * x.shape[1]))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Comparing, "of the last block's 17, others are read than the first 2"),
        (Weighing, r"with 1 of the last block's 17 logits differ by 0\.\d+ of the largest"),
    ],
)
@torch.no_grad()
def test_what_reads_others_in_other_ways_is_left_as_it_was(kind, reason):
    torch.manual_seed(0)
    made = kind(image_size=SIDE, patch_size=4, num_layers=2, num_heads=3, hidden_dim=WIDTH, mlp_dim=40, num_classes=5)
    network = replaced(randomised(made))
    expected = network(images())
    (found,) = fold(network, canvas_size=SIDE)
    assert not found.done and re.fullmatch(reason, found.how)
    assert torch.equal(network(images()), expected)


@pytest.mark.parametrize("kind", ["cvpt", "ffn-memory"])
def test_a_block_whose_hooks_would_be_lost_gets_no_tokens(kind):
    network = replaced(torchvision_vit()).float()
    name = list(blocks_of(network))[1].name
    network.get_submodule(name).register_forward_hook(lambda module, args, out: out.tanh())
    with pytest.raises(ModelError, match=f"got '{kind}' for .*, whose {name} has hooks"):
        check_tokens(network, table(kind), canvas_size=SIDE)
    check_tokens(network, table("vpt-deep"), canvas_size=SIDE)  # they are put into attention: no block is exchanged


def test_of_a_block_with_hooks_all_is_computed():
    network = replaced(torchvision_vit())
    last = list(blocks_of(network))[-1]
    last.module.register_forward_hook(lambda module, args, out: out.tanh())
    expected = network(images())
    reason = f"{last.name} has hooks, which would not be called any more: remove them"
    assert fold(network, canvas_size=SIDE) == (Fold("read-out", False, reason),)
    assert torch.equal(network(images()), expected)


@pytest.mark.parametrize("kind", ["cvpt", "ffn-memory"])
def test_blocks_that_share_weights_get_no_tokens(kind):
    network: Any = replaced(torchvision_vit()).float()
    network.encoder.layers[2] = network.encoder.layers[0]
    with pytest.raises(ModelError, match="stands in several places of the network, in whole or in part"):
        check_tokens(network, table(kind), canvas_size=SIDE)
    check_tokens(network, table("vpt-deep"), canvas_size=SIDE)  # both read the same


def test_a_fold_that_is_wrong_is_told(monkeypatch):
    """With tokens that begin as nothing too: they are tried with others."""
    network = replaced(torchvision_vit()).float()

    def wrong(first: nn.Linear, second: nn.Linear, tokens: Tensor) -> None:
        widen(first, second, 1.01 * tokens)

    monkeypatch.setattr("vpdeploy.models.tokens.fold.widen", wrong)
    with pytest.raises(ModelError, match="with its tokens folded, VisionTransformer gives logits that differ by"):
        check_tokens(network, table("ffn-memory"), canvas_size=SIDE)
    prompted(network.double(), table("ffn-memory"))
    with pytest.raises(ModelError, match="with its tokens folded"):
        fold(network, canvas_size=SIDE)


@torch.no_grad()
def test_windows_are_averaged():
    network = replaced(swin())
    assert fold(network, canvas_size=SIDE) == (Fold("read-out", False, "all of the last block are averaged"),)


@pytest.mark.parametrize(
    ("kind", "folds"),
    [
        ("vpt-deep", [(True, "constant keys and values, in 3 blocks")]),
        (
            "vpt-shallow",
            [(False, "in the sequence: from the second block on each reads what the one before makes of them")],
        ),
        ("cvpt", [(True, "two linear layers, in 2 blocks"), (True, "constant keys and values, in 1 block")]),
        ("ffn-memory", [(True, "hidden units of the MLP, in 3 blocks")]),
    ],
)
def test_what_was_folded_is_told(kind, folds):
    counts = (4, 5, 20) if kind == "cvpt" else ()
    network = prompted(replaced(torchvision_vit()), table(kind, count=max(counts, default=4)), counts=counts)
    assert [(made.done, made.how) for made in fold_tokens(network, canvas_size=SIDE)] == folds


@pytest.mark.parametrize(("kind", "count"), [*((kind, 4) for kind in KINDS), ("cvpt", 20)])
@torch.no_grad()
def test_what_was_folded_is_cut_as_what_was_cut_is_folded(kind, count):
    """As candidates are made: one network, folded once, and cut to any widths."""
    network, example = replaced(torchvision_vit()), example_input(SIDE)
    groups = probe(network, find_groups(network, example), example=example).prunable
    mask = ChannelMask({group.root: tuple(i % 3 > 0 for i in range(group.width)) for group in groups})
    smaller = cut(network, plan(network, groups, mask))
    for one in (network, smaller):
        fold(prompted(one, table(kind, count=count)), canvas_size=SIDE)
    found = cut(network, plan(network, with_constants(groups, network), mask))
    torch.testing.assert_close(found(images()), smaller(images()), rtol=SAME_FLOAT64, atol=SAME_FLOAT64)
    assert {name: p.shape for name, p in found.named_parameters()} == {
        name: p.shape for name, p in smaller.named_parameters()
    }


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "vpt-shallow",
            "got 'vpt-shallow' for SwinTransformer, which has no block for it; expected a vision transformer of tor",
        ),
        (
            "cvpt",
            "got 'cvpt' for SwinTransformer, which has no block for it; expected a vision transformer of torchvision or ",
        ),
    ],
)
def test_what_a_swin_has_no_place_for_is_refused_by_name(kind, message):
    with pytest.raises(ModelError, match=message):
        new_tokens(replaced(swin()), table(kind), generator=torch.Generator())


@torch.no_grad()
def test_a_swin_takes_units_beside_its_mlp():
    plain = replaced(swin())
    network, x = prompted(copy.deepcopy(plain), table("ffn-memory")), images()
    expected = network(x)
    assert (expected - plain(x)).abs().max() > MATTERS
    fold_tokens(network, canvas_size=SIDE)
    torch.testing.assert_close(network(x), expected, rtol=SAME_FLOAT64, atol=SAME_FLOAT64)


def test_deep_tokens_fold_to_keys_and_values():
    network = prompted(replaced(swin()), table("vpt-deep"), counts=(1, 2, 3, 4))
    fold_tokens(network, canvas_size=SIDE)
    assert [block.attention.memory.key.shape[1:] for block in blocks_of(network)] == [
        (3, 1, 8),
        (3, 2, 8),
        (6, 3, 8),
        (6, 4, 8),
    ]  # type: ignore[union-attr]
    assert all(isinstance(block.attention.memory, ConstantMemory) for block in blocks_of(network))
