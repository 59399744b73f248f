"""Laws 2 and 4: a stored plan gives the same bits, the empty plan changes nothing, and what went in is never changed."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import FAMILIES, image, masks, networks, probed, randomised
from torch import nn

from vpdeploy.deploy.bake import bake
from vpdeploy.errors import SurgeryError
from vpdeploy.run_folder import dump, load, read_found, write_found
from vpdeploy.surgery.certificate import masked_vs_pruned
from vpdeploy.surgery.cut import cut, put_back
from vpdeploy.surgery.exactness import probe
from vpdeploy.surgery.groups import example_input, find_groups
from vpdeploy.surgery.plan import plan
from vpdeploy.surgery.plan_check import check_plan
from vpdeploy.training.fit import fit
from vpdeploy.training.methods.registry import search
from vpdeploy.training.methods.task import with_tensors
from vpdeploy.training.tune import tune
from vpdeploy.values import ChannelMask, Dense, Found, PrunePlan, Tuned


def planned(data: st.DataObject, family: str) -> tuple[nn.Module, PrunePlan]:
    network = data.draw(networks(family)).float()
    groups = probed(network).prunable
    return network, plan(network, groups, data.draw(masks(groups)))


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=4)
@given(data=st.data())
def test_replaying_a_stored_plan_gives_the_same_bits(family, data):
    network, made = planned(data, family)
    replayed = load(PrunePlan, dump(made), where="plan.json")
    assert replayed == made
    check_plan(network, replayed)
    first, again = cut(network, made), cut(copy.deepcopy(network), replayed)
    assert tiny.snapshot(first) == tiny.snapshot(again)
    x = image(0, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(first(x), again(x))


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=4)
@given(data=st.data())
def test_what_is_put_back_is_what_was_cut_and_the_rest_stays(family, data):
    network, made = planned(data, family)
    smaller, whole = cut(network, made), copy.deepcopy(network)
    with torch.no_grad():
        for tensor in smaller.state_dict().values():
            tensor.fill_(7)
    put_back(whole, smaller, made)
    assert tiny.snapshot(cut(whole, made)) == tiny.snapshot(smaller)
    after, before = whole.state_dict(), network.state_dict()
    for name, tensor in after.items():
        assert (tensor == 7).sum() == smaller.state_dict()[name].numel()
        assert torch.equal(tensor[tensor != 7], before[name][tensor != 7])


def test_replay_on_the_source_and_what_was_found_gives_the_same_bits(tmp_path):
    source = tiny.network()
    moved = copy.deepcopy(source)
    moved.norm1.running_mean += 0.25  # what a search leaves behind
    statistics = {name: tensor.clone() for name, tensor in moved.named_buffers()}
    write_found(tmp_path / "found.safetensors", Found({"conv1": torch.rand(8)}, {}, statistics))
    found = read_found(tmp_path / "found.safetensors")
    groups = tiny.groups_of(source).prunable
    mask = ChannelMask({group.root: tuple(i % 3 > 0 for i in range(group.width)) for group in groups})
    made = plan(moved, groups, mask)
    replayed = cut(with_tensors(Dense(source), found), load(PrunePlan, dump(made), where="plan.json"))
    assert tiny.snapshot(replayed) == tiny.snapshot(cut(moved, made))


def test_a_plan_for_another_network_is_refused_with_what_differs():
    small, large = (
        randomised(FAMILIES["residual"](widths, nn.ReLU), seed=0) for widths in ((4, 5, 6, 7), (4, 5, 6, 8))
    )
    groups = probed(small).prunable
    mask = ChannelMask({groups[0].root: (True, False, True, False)})
    made = plan(small, groups, mask)
    with pytest.raises(SurgeryError) as caught:
        cut(large, made)
    message = str(caught.value)
    assert message.startswith("the plan does not fit network Residual: ")
    assert "b1.0.weight is (8, 6, 3, 3), planned for (7, 6, 3, 3)" in message
    assert "use the network that the plan was made from" in message
    with pytest.raises(SurgeryError, match="stem.0.weight is missing.* and [0-9]+ more; use"):
        cut(tiny.network(), made)
    extended = copy.deepcopy(small)
    extended.register_parameter("extra", nn.Parameter(torch.zeros(1)))
    with pytest.raises(SurgeryError, match="extra is not in the plan"):
        cut(extended, made)


def test_emptying_a_group_is_refused():
    network = randomised(FAMILIES["residual"]((4, 5, 6, 7), nn.ReLU), seed=0)
    groups = probed(network).prunable
    with pytest.raises(
        SurgeryError, match="stem.0.weight: all 4 positions of axis 0 would go; keep at least one channel"
    ):
        plan(network, groups, ChannelMask({groups[0].root: (False,) * 4}))


def test_parts_of_a_convolutions_groups_are_no_plan():
    network = nn.Sequential(nn.Conv2d(8, 8, 1, groups=2), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
    fits = {name: tuple(t.shape) for name, t in [*network.named_parameters(), *network.named_buffers()]}
    tensors = ("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var")

    def made(indices: tuple[int, ...], *, groups: dict[str, int], norm: tuple[int, ...] | None = None) -> PrunePlan:
        kept = {name: {0: indices} for name in tensors} | {"2.weight": {1: indices}}
        kept["1.bias"] = {0: norm or indices}
        left = len(indices)
        attributes = {"0": groups, "1": {"num_features": left}, "2": {"in_channels": left}}
        return PrunePlan(fits, kept, attributes, {"0": (8, left)})

    check_plan(network, made((0, 1, 4, 5), groups={"out_channels": 4}))  # the same of each
    check_plan(network, made((4, 5, 6, 7), groups={"out_channels": 4, "in_channels": 4, "groups": 1}))  # one as a whole
    with pytest.raises(
        SurgeryError, match="kept: 0.weight, axis 0: expected whole groups of its 2, or the same of each"
    ):
        check_plan(network, made((0, 1, 2, 5), groups={"out_channels": 4}))
    with pytest.raises(SurgeryError, match=r"kept: 1\.\w+ is not cut like 1\.\w+ of the same layer"):
        check_plan(network, made((0, 1, 4, 5), groups={"out_channels": 4}, norm=(0, 1, 4, 6)))


# --- the empty plan -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_empty_plan_is_the_identity(family):
    network = randomised(FAMILIES[family]((4, 5, 6, 7), nn.SiLU), seed=6).float()
    groups = probed(network).prunable
    whole = ChannelMask({group.root: (True,) * group.width for group in groups})
    for mask in (whole, ChannelMask({})):
        made = plan(network, groups, mask)
        assert made.kept == {} and made.attributes == {}
        same = cut(network, made)
        assert same is not network and tiny.snapshot(same) == tiny.snapshot(network)
        x = image(0, dtype=torch.float32)
        with torch.no_grad():
            assert torch.equal(same(x), network(x))


# --- what went in ---------------------------------------------------------------------------------------------------


def odd_state(network: nn.Module) -> nn.Module:
    """Half frozen, partly in training mode, with a hook of the user's own: everything that could get lost."""
    network.conv1.weight.requires_grad_(False)
    network.norm2.train()
    network.linear.register_forward_hook(lambda module, args, output: output)
    return network


def test_surgery_leaves_the_network_as_it_was():
    network = odd_state(tiny.network())
    before = tiny.snapshot(network)
    example = example_input(tiny.CANVAS)
    found = find_groups(network, example)
    assert tiny.snapshot(network) == before
    groups = probe(network, found, example=example_input(tiny.CANVAS)).prunable
    assert tiny.snapshot(network) == before
    mask = ChannelMask({group.root: tuple(i % 2 == 0 for i in range(group.width)) for group in groups})
    made = plan(network, groups, mask)
    assert tiny.snapshot(network) == before
    pruned = cut(network, made)
    assert tiny.snapshot(network) == before
    masked_vs_pruned(network, pruned, groups, mask, canvas=example)
    assert tiny.snapshot(network) == before
    with torch.no_grad():
        for tensor in [*pruned.parameters(), *pruned.buffers()]:
            tensor.zero_()
    assert tiny.snapshot(network) == before  # no memory is shared, not even of what was kept whole


def test_training_and_baking_leave_the_network_as_it_was(tmp_path):
    recipe, data, network = tiny.recipe(), tiny.data(), odd_state(tiny.network())
    task, before = tiny.task(network, recipe), tiny.snapshot(network)
    fit(
        network, data, recipe=recipe, classifier="linear", compute=tiny.COMPUTE, journal=tiny.journal(tmp_path, "fit"),
        display=tiny.QUIET,
    )  # fmt: skip
    assert tiny.snapshot(network) == before
    found = search(
        task, data, recipe=recipe, compute=tiny.COMPUTE, journal=tiny.journal(tmp_path, "search"), display=tiny.QUIET
    )
    assert tiny.snapshot(network) == before
    with_tensors(task.dense, found)
    assert tiny.snapshot(network) == before
    prompt = {name: tensor.clone() for name, tensor in found.prompt.items()}
    tuned = tune(
        network, data, prompt=prompt, dense=Dense(network), classifier="linear", mask={}, label_map=None,
        recipe=recipe, compute=tiny.COMPUTE,
        journal=tiny.journal(tmp_path, "tune"), display=tiny.QUIET,
    )  # fmt: skip
    assert tiny.snapshot(network) == before
    assert all(torch.equal(prompt[name], found.prompt[name]) for name in prompt)
    assert tuned.backbone is not network
    bake(Tuned(network, tuned.prompt, (2, 0, 1)), recipe=recipe, classifier="linear", form="uint8")
    assert tiny.snapshot(network) == before
