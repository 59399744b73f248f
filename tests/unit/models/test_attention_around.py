"""Code around attention that looks at it: such attention stays as it was, and the network computes what it computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from vpdeploy.models.attention.replace import NOTICED, Replaced, replace_attention
from vpdeploy.surgery.exactness import probe
from vpdeploy.surgery.groups import find_groups

SAME_FLOAT64 = 1e-9
MULTIHEAD = "heads:torch.nn.MultiheadAttention"
Call = Callable[[nn.Module, Tensor], Tensor]


class Network(nn.Module):
    """Two attention modules: ``odd`` is called as ``call`` has it, ``good`` plainly. x: [n, 3, 8, 8]."""

    def __init__(self, call: Call):
        super().__init__()
        self.call = call
        self.patches = nn.Conv2d(3, 16, 2, stride=2)
        self.odd = nn.MultiheadAttention(16, 4, batch_first=True)
        self.good = nn.MultiheadAttention(16, 4, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.call(self.odd, x)
        return self.head((x + self.good(x, x, x, need_weights=False)[0]).mean(1))


def plainly(mha: nn.Module, x: Tensor) -> Tensor:
    return mha(x, x, x, need_weights=False)[0]


def by_type(mha: nn.Module, x: Tensor) -> Tensor:
    return plainly(mha, x) if isinstance(mha, nn.MultiheadAttention) else x


def by_number_of_heads(mha: nn.Module, x: Tensor) -> Tensor:
    return plainly(mha, x) / getattr(mha, "num_heads", 1)


def by_its_weight(mha: nn.Module, x: Tensor) -> Tensor:
    return plainly(mha, x) * mha.in_proj_weight.abs().mean()  # pyright: ignore


def by_its_forward(mha: nn.Module, x: Tensor) -> Tensor:
    return mha.forward(x, x, x)[0]


def by_its_arguments(mha: nn.Module, x: Tensor) -> Tensor:
    mask = torch.full((x.shape[1], x.shape[1]), -torch.inf, dtype=x.dtype).triu(1)
    return mha(x, x, x, attn_mask=mask if isinstance(mha, nn.MultiheadAttention) else None)[0]


def network(call: Call, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return Network(call).eval().double()


def image() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def same_logits(old: nn.Module, found: Replaced) -> None:
    x = image()
    with torch.no_grad():
        expected, logits = old(x), found.network(x)
    assert expected.std() > 1e-2 and (logits - expected).abs().max() <= SAME_FLOAT64 * expected.abs().max()


@pytest.mark.parametrize("call", [by_type, by_number_of_heads, by_its_weight, by_its_forward, by_its_arguments])
def test_attention_that_is_looked_at_is_left_and_the_other_is_replaced(call: Call):
    old = network(call)
    found = replace_attention(old, image())
    assert found.replaced == {"good": MULTIHEAD}
    assert found.left == {"odd": f"torch.nn.MultiheadAttention: {NOTICED}"}
    assert type(found.network.odd) is nn.MultiheadAttention
    same_logits(old, found)


def test_attention_that_is_only_called_is_replaced():
    old = network(plainly)
    found = replace_attention(old, image())
    assert set(found.replaced) == {"odd", "good"} and not found.left
    same_logits(old, found)


@pytest.mark.parametrize(("call", "left"), [(plainly, set()), (by_number_of_heads, {"odd"})])
def test_where_meta_tensors_fail_real_numbers_compare(call: Call, left: set[str]):
    def with_a_choice(mha: nn.Module, x: Tensor) -> Tensor:
        return call(mha, x) if x.abs().max().item() > 0 else x

    with pytest.raises(RuntimeError, match="meta"):
        network(with_a_choice).to("meta")(image().to("meta"))
    old = network(with_a_choice)
    found = replace_attention(old, image())
    assert set(found.left) == left and set(found.replaced) == {"odd", "good"} - left
    same_logits(old, found)


# --- weights of attention that nobody uses ------------------------------------------------------------------------------


def unused_weights(mha: nn.Module, x: Tensor) -> Tensor:
    y, _ = mha(x, x, x)
    return y


def used_weights(mha: nn.Module, x: Tensor) -> Tensor:
    y, weights = mha(x, x, x)  # the mean over heads
    return y + weights @ x


class Answers(Network):
    """Gives its mean weights as logits."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        y, weights = self.odd(x, x, x)
        return torch.cat([self.head(y.mean(1)), weights.mean(1)], 1)


def heads(net: nn.Module, name: str = "odd") -> str:
    """What may be done with the heads of the replaced attention ``name``."""
    found = replace_attention(net.float(), image().float())
    assert name in found.replaced
    x = image().float()
    groups = probe(found.network, find_groups(found.network, x), example=x)
    return next(group.status for group in groups.groups if group.root == f"{name}.q")


def test_heads_whose_mean_weights_nobody_uses_are_exact():
    assert heads(network(unused_weights)) == "exact"


def test_heads_whose_mean_weights_count_are_not():
    assert heads(network(used_weights)) == "excluded"
    assert heads(Answers(plainly).eval()) == "excluded"
