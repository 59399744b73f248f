"""The last layer: found, replaced, and reduced to rows."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

from vpdeploy.errors import ModelError
from vpdeploy.models.classifier import class_count, find_classifier, replace_classifier, take_rows


def linear_net(*, bias: bool = True) -> nn.Module:
    parts = [
        ("body", nn.Conv2d(3, 6, 1)),
        ("pool", nn.AdaptiveAvgPool2d(1)),
        ("flat", nn.Flatten()),
        ("fc", nn.Linear(6, 5, bias=bias)),
    ]
    return nn.Sequential(OrderedDict(parts))


def conv_net() -> nn.Module:
    last = nn.Conv2d(6, 5, 1)
    parts = [
        ("body", nn.Conv2d(3, 6, 3)),
        ("head", last),
        ("wide", nn.Conv2d(5, 5, 3)),
        ("each", nn.Conv2d(5, 5, 1, groups=5)),
    ]
    return nn.Sequential(OrderedDict(parts))


def test_classifier_is_the_last_linear_layer_or_pointwise_convolution():
    assert find_classifier(linear_net(), None) == "fc"
    assert find_classifier(conv_net(), None) == "head"
    assert find_classifier(linear_net(), "body") == "body"
    assert class_count(linear_net(), "fc") == 5 and class_count(conv_net(), "head") == 5


@pytest.mark.parametrize(("name", "what"), [("fcc", "no such module"), ("body", "a Conv2d"), ("each", "a Conv2d")])
def test_wrong_name_lists_candidates(name, what):
    with pytest.raises(ModelError) as e:
        find_classifier(conv_net(), name)
    assert str(e.value) == (
        f"model.classifier: got {name!r}, {what}; expected the name of an nn.Linear or a 1x1 nn.Conv2d; "
        "candidates, the last first: 'head'"
    )


def test_many_candidates_are_cut_short():
    with pytest.raises(ModelError, match=r"last first: '12', '11'.*'3' and 3 more$"):
        find_classifier(nn.Sequential(*(nn.Linear(2, 2) for _ in range(13))), "x")


def test_no_candidate():
    with pytest.raises(
        ModelError, match=r"Sequential: got no nn\.Linear and no 1x1 nn\.Conv2d; expected one as the classifier"
    ):
        find_classifier(nn.Sequential(nn.Conv2d(3, 3, 3)), None)


@pytest.mark.parametrize("bias", [True, False])
def test_rows_are_the_old_logits_in_the_new_order(bias):
    net = linear_net(bias=bias).double()
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    before = copy.deepcopy(net.state_dict())
    new = take_rows(net, "fc", (4, 0, 2))
    assert torch.allclose(new(x), net(x)[:, [4, 0, 2]], rtol=0, atol=1e-13)  # sums of six in another order
    assert class_count(new, "fc") == 3 and new.get_submodule("fc").out_features == 3
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_rows_of_a_convolution():
    net = conv_net().double()
    new = take_rows(net, "head", [3, 1])
    x = torch.randn(1, 6, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # Two rows may be summed in another order than all: 6 products in float64.
    assert torch.allclose(new.get_submodule("head")(x), net.get_submodule("head")(x)[:, [3, 1]], rtol=0, atol=1e-12)
    assert new.get_submodule("head").out_channels == 2


@pytest.mark.parametrize(("net", "name"), [(linear_net(), "fc"), (linear_net(bias=False), "fc"), (conv_net(), "head")])
def test_replacement_keeps_kind_bias_and_dtype_and_leaves_the_old_alone(net, name):
    net = net.double()
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    new = replace_classifier(net, name, 9, generator=torch.Generator().manual_seed(1))
    again = replace_classifier(net, name, 9, generator=torch.Generator().manual_seed(1))
    other = replace_classifier(net, name, 9, generator=torch.Generator().manual_seed(2))
    layer, old = new.get_submodule(name), net.get_submodule(name)
    weight, twin, unlike = (n.get_parameter(f"{name}.weight") for n in (new, again, other))
    assert type(layer) is type(old) and dict(layer.named_parameters()).keys() == dict(old.named_parameters()).keys()
    assert weight.dtype == torch.float64 and weight.shape == (9, *net.get_parameter(f"{name}.weight").shape[1:])
    assert weight.requires_grad and weight.is_leaf
    assert weight.abs().max() <= 1 / 6**0.5 and weight.std() > 0.1  # uniform in 1 / sqrt(fan in)
    assert torch.equal(weight, twin) and not torch.equal(weight, unlike)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[key]) for key, t in net.state_dict().items())
    assert all(torch.equal(t, before[key]) for key, t in new.state_dict().items() if not key.startswith(name))
