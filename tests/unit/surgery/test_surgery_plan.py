"""The plan as a file, by hand; and what replaying it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from strategies import SIDE, Head, conv_norm, randomised
from torch import nn

from vpdeploy.errors import SurgeryError
from vpdeploy.run_folder import dump
from vpdeploy.surgery.cut import cut
from vpdeploy.surgery.groups import example_input, find_groups
from vpdeploy.surgery.plan import plan
from vpdeploy.values import ChannelMask, PrunePlan


def network() -> nn.Sequential:
    """0 conv, 1 norm, 2 relu, 3 conv, 4 head."""
    return randomised(nn.Sequential(*conv_norm(3, 4), nn.ReLU(), nn.Conv2d(4, 3, 1), Head(3)), seed=0).float()  # type: ignore[return-value]


def made(backbone: nn.Module, keep: dict[str, tuple[bool, ...]]) -> PrunePlan:
    groups = find_groups(backbone, example_input(SIDE)).prunable
    return plan(backbone, groups, ChannelMask(keep))


def test_a_plan_is_json_that_a_person_can_read():
    written = json.loads(dump(made(network(), {"0": (True, False, False, True)})))
    assert written == {
        "schema": 1,
        "fits": {
            "0.weight": [4, 3, 3, 3],
            "1.weight": [4],
            "1.bias": [4],
            "1.running_mean": [4],
            "1.running_var": [4],
            "1.num_batches_tracked": [],
            "3.weight": [3, 4, 1, 1],
            "3.bias": [3],
            "4.linear.weight": [5, 3],
            "4.linear.bias": [5],
        },
        "kept": {
            "0.weight": {"0": [0, 3]},
            "1.weight": {"0": [0, 3]},
            "1.bias": {"0": [0, 3]},
            "1.running_mean": {"0": [0, 3]},
            "1.running_var": {"0": [0, 3]},
            "3.weight": {"1": [0, 3]},
        },
        "attributes": {"0": {"out_channels": 2}, "1": {"num_features": 2}, "3": {"in_channels": 2}},
        "widths": {"0": [4, 2], "3": [3, 3]},
        "replacements": {},
    }


def test_cutting_is_indexing():
    source = network()
    small = cut(source, made(source, {"0": (True, False, False, True), "3": (False, True, True)}))
    state, cut_state = source.state_dict(), small.state_dict()
    assert torch.equal(cut_state["0.weight"], state["0.weight"][[0, 3]])
    assert torch.equal(cut_state["1.running_var"], state["1.running_var"][[0, 3]])
    assert torch.equal(cut_state["3.weight"], state["3.weight"][[1, 2]][:, [0, 3]])
    assert torch.equal(cut_state["3.bias"], state["3.bias"][[1, 2]])
    assert torch.equal(cut_state["4.linear.weight"], state["4.linear.weight"][:, [1, 2]])
    assert torch.equal(cut_state["4.linear.bias"], state["4.linear.bias"])
    assert repr(small[3]).startswith("Conv2d(2, 2, ")


def test_a_cut_network_keeps_kind_and_training_flags_of_its_tensors():
    source = network().double()
    source[0].weight.requires_grad_(False)
    small = cut(source, made(source, {"0": (True, False, False, True)}))
    assert {t.dtype for t in small.parameters()} == {torch.float64}
    assert [p.requires_grad for p in small.parameters()] == [p.requires_grad for p in source.parameters()]
    assert dict(small.named_buffers()).keys() == dict(source.named_buffers()).keys()
    assert all(p.is_leaf and p.is_contiguous() for p in small.parameters())


def test_a_plan_for_another_network_lists_what_differs():
    planned = made(network(), {"0": (True, False, False, True)})
    wider = nn.Sequential(*conv_norm(3, 4), nn.ReLU(), nn.Conv2d(4, 6, 1), Head(6))
    with pytest.raises(SurgeryError) as caught:
        cut(wider, planned)
    assert str(caught.value) == (
        "the plan does not fit network Sequential: 3.weight is (6, 4, 1, 1), planned for (3, 4, 1, 1); "
        "3.bias is (6,), planned for (3,); 4.linear.weight is (5, 6), planned for (5, 3); "
        "use the network that the plan was made from"
    )


def test_a_long_list_of_differences_is_cut_short_and_counted():
    planned = made(network(), {"0": (True, False, False, True)})
    with pytest.raises(
        SurgeryError, match=r"0\.weight is missing; 1\.weight is missing; .* and 7 more; use the network"
    ):
        cut(nn.Sequential(nn.Flatten(), nn.Identity(), nn.Linear(3 * SIDE**2, 5)), planned)


def test_a_cut_network_can_be_cut_again():
    source = network()
    small = cut(source, made(source, {"0": (True, False, True, True)}))
    smaller = cut(small, made(small, {"0": (False, True, True)}))
    at_once = cut(source, made(source, {"0": (False, False, True, True)}))
    assert all(torch.equal(a, b) for a, b in zip(smaller.parameters(), at_once.parameters(), strict=True))


def test_frozen_parameters_are_cut_as_well():
    source = network().requires_grad_(False)
    assert made(source, {"0": (True, False, False, True)}).widths["0"] == (4, 2)
