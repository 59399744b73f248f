"""Law 1 whatever a forward does besides, and networks that are left, and come back, as they came."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from hard_networks import Case, Piece, check, check_law, conv, described, groups_of, network_of, piece, random_mask
from strategies import SIDE, Head, conv_norm, image, randomised
from tiny import snapshot
from torch import Tensor, nn
from torch.nn import functional as F

from vpdeploy.errors import ModelError, SurgeryError
from vpdeploy.models.build import build, check_forward
from vpdeploy.models.plain import plain
from vpdeploy.recipe.tables import ModelTable
from vpdeploy.surgery.cut import cut
from vpdeploy.surgery.groups import example_input, find_groups
from vpdeploy.surgery.plan import plan

ALL = "stem.0 8, piece.a 8, last.0 6"
BOTH = "stem.0 8, last.0 6"
LAST = "last.0 6"
A = {"a": conv(8, 8)}
IMAGE = example_input(SIDE)


class Clamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clamp(-1, 1)


class Mirror(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.flip(1)


def without_gradient(piece: Piece, x: Tensor) -> Tensor:
    with torch.no_grad():
        gate = torch.sigmoid(piece.a(x))
    return x * gate


def by_sign(piece: Piece, x: Tensor) -> Tensor:
    return piece.a(x) if x.mean() > -1e9 else x


FORWARDS = {
    "a layer whose output is not used": piece(lambda m, x: (m.a(x), x)[1], BOTH, a=conv(8, 9)),
    "a layer that is not called": piece(lambda m, x: x, BOTH, a=conv(8, 9)),
    "a parameter that is not used": piece(lambda m, x: x, BOTH, w=lambda: nn.Parameter(torch.ones(8))),
    "constants of each channel": piece(
        lambda m, x: x * m.c.view(1, -1, 1, 1) + m.d, BOTH, c=lambda: torch.ones(8), d=lambda: torch.ones(1, 8, 1, 1)
    ),
    "in place": piece(lambda m, x: m.a(x).relu_().add_(1).mul_(x), BOTH, **A),
    "no_grad": piece(without_gradient, BOTH, **A),
    "detach": piece(lambda m, x: m.a(x.detach()), ALL, **A),
    "an autograd function": piece(lambda m, x: Clamp.apply(m.a(x)), ALL, **A),
    "an autograd function that mirrors": piece(
        lambda m, x: Mirror.apply(m.a(x)), BOTH, refused={"piece.a": "^flip in piece moves its channels by number"}, **A
    ),
    "dropout": piece(
        lambda m, x: F.dropout(m.d(m.a(x)), 0.5, m.training), ALL, d=lambda: nn.Dropout2d(0.5), **A
    ),
    "a branch by the width": piece(
        lambda m, x: m.a(x) if x.shape[1] == 8 else x, "piece.a 8, last.0 6",
        refused={"stem.0": r"^removing its channels fails in last\.0: "}, **A,
    ),
    # Every layer is seen, and no other image would bring in another.
    "a branch by a value": piece(
        by_sign, "piece.a 8, last.0 6", refused={"stem.0": "^mean in piece takes one number over its channels"}, **A
    ),
    "where": piece(lambda m, x: torch.where(x > 0, x, m.a(x)), BOTH, **A),
    "resized": piece(lambda m, x: F.interpolate(m.a(x), scale_factor=2, mode="bilinear"), ALL, **A),
    "used three times": piece(lambda m, x: x + m.a(x) * F.silu(m.a(x)), BOTH, **A),
}  # fmt: skip


@pytest.mark.parametrize("name", FORWARDS)
def test_whatever_a_forward_does_besides(name):
    check(FORWARDS[name])


def test_a_network_that_is_random_in_eval_mode_is_refused_for_that():
    network = network_of(piece(lambda m, x: F.dropout(m.a(x), 0.5, True), "", **A))
    groups = groups_of(network)
    assert not groups.prunable
    reasons = {g.root: g.reason for g in groups.groups}
    assert all("two forwards of the network on the same input differ by" in reasons[r] for r in ("stem.0", "last.0"))


class Auxiliary(nn.Module):
    """A second classifier whose logits are added ``when``: in training, or for a dark image."""

    def __init__(self, when: str):
        super().__init__()
        self.stem, self.last, self.head, self.when = conv_norm(3, 8), conv_norm(8, 6), Head(6), when
        self.aux = nn.Sequential(*conv_norm(8, 7), nn.SiLU(), Head(7))

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.stem(x))
        logits = self.head(F.silu(self.last(x)))
        second = self.training if self.when == "training" else bool(x[:, :, 0, 0].sum() < -1e9)
        return logits + 0.3 * self.aux(x) if second else logits


def test_an_auxiliary_classifier_of_training_loses_what_it_reads_too():
    network = randomised(Auxiliary("training"), seed=0)
    before = snapshot(network)
    groups = groups_of(network)
    assert described(groups.prunable) == "stem.0 8, last.0 6"
    assert "aux.0.weight" in {member.tensor for member in groups.prunable[0].members}
    assert next(g.reason for g in groups.groups if g.root == "aux.0").startswith("not probed: masking it alone")
    check_law(network, groups.prunable)
    small = cut(network, plan(network, groups.prunable, random_mask(groups.prunable, seed=0))).train()
    logits = small(image(0))
    assert logits.shape == (3, 5) and not torch.equal(logits, small.eval()(image(0)))
    assert snapshot(network) == before  # the training forward that showed it wrote no statistics


def test_layers_that_only_some_images_reach_are_refused():
    with pytest.raises(SurgeryError) as caught:
        find_groups(Auxiliary("dark"), IMAGE)
    assert str(caught.value).startswith(
        "network Auxiliary: its forward reads a value that depends on the image, and aux.0.weight and 4 more took no part"
    )
    assert "expected a forward that takes the same layers for all images" in str(caught.value)


@pytest.mark.parametrize(("name", "side"), [("googlenet", 64), ("inception_v3", 299)])
def test_published_auxiliary_classifiers_are_dropped_unless_asked_for_and_then_refused_for_their_logits(name, side):
    table = {"name": f"torchvision:{name}", "head": "keep"}
    built = build(ModelTable(**table), classes=5, seed=0, with_weights=False, source_classes=5).backbone
    assert not [path for path, _ in built.named_modules() if path.lower().startswith("aux")]
    with_them = build(
        ModelTable(**table, args={"aux_logits": True}), classes=5, seed=0, with_weights=False, source_classes=5
    ).backbone
    with pytest.raises(ModelError, match="in training mode"):
        check_forward(with_them, canvas_size=side, classes=5)


def test_published_auxiliary_classifiers_run_in_training_after_a_cut():
    table = ModelTable(name="torchvision:googlenet", head="keep", args={"aux_logits": True})
    network = build(table, classes=5, seed=0, with_weights=False, source_classes=5).backbone
    groups = find_groups(network, example_input(64)).prunable
    read = {member.tensor for group in groups for member in group.members if member.side == "in"}
    assert {"aux1.conv.conv.weight", "aux2.conv.conv.weight"} <= read
    pruned = cut(network, plan(network, groups, random_mask(groups, seed=0))).train()
    logits, *second = pruned(image(0, n=2, side=64, dtype=torch.float32))
    assert logits.shape == (2, 5) and [tuple(y.shape) for y in second] == [(2, 5), (2, 5)]


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return x * scale


class Answers(nn.Module):
    """``answer`` of the logits."""

    def __init__(self, answer):
        super().__init__()
        self.net, self.answer = nn.Sequential(*conv_norm(3, 4), Head(4)), answer

    def forward(self, x: Tensor):
        return self.answer(self.net(x))


REFUSED = {
    "two inputs": (TwoInputs(), "takes x, scale; expected one input, a batch of images"),
    "a dictionary": (Answers(lambda y: {"logits": y}), "dict"),
    "the logits twice": (Answers(lambda y: (y, y)), "tuple"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_inputs_and_outputs_are_refused_saying_what_is_expected(name):
    network, message = REFUSED[name]
    with pytest.raises(ModelError, match=message) as caught:
        check_forward(network, canvas_size=SIDE, classes=5)
    assert "expected" in str(caught.value)


def small_network() -> nn.Module:
    return nn.Sequential(*conv_norm(3, 8), nn.SiLU(), *conv_norm(8, 6), nn.SiLU(), Head(6))


def frozen() -> nn.Module:
    return small_network().requires_grad_(False)


def partly_frozen() -> nn.Module:
    network = small_network()
    network[0].requires_grad_(False)
    network[1].eval()
    return network


KEPT = {
    "training": lambda: small_network().train(),
    "eval": lambda: small_network().eval(),
    "frozen": frozen,
    "partly frozen": partly_frozen,
    "float64": lambda: small_network().double(),
    "bfloat16": lambda: small_network().bfloat16(),
    "channels last": lambda: small_network().to(memory_format=torch.channels_last),
}


def state(network: nn.Module) -> dict[str, object]:
    """All but sizes and values: modes, types, layouts and who is trained."""
    found: dict[str, object] = {name: module.training for name, module in network.named_modules()}
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        last = tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
        layout = (tensor.is_contiguous(), last) if tensor.ndim == 4 and tensor[0, 0].numel() > 1 else None
        found[f"tensor {name}"] = (tensor.dtype, tensor.requires_grad, layout)
    return found


@pytest.mark.parametrize("name", KEPT)
def test_a_network_is_left_as_it_came_and_the_cut_one_is_like_it(name):
    network = KEPT[name]()
    before, values = state(network), {k: v.clone() for k, v in network.state_dict().items()}
    groups = groups_of(network)
    assert described(groups.prunable) == "0 8, 3 6"
    pruned = cut(network, plan(network, groups.prunable, random_mask(groups.prunable, seed=1)))
    assert state(network) == before == state(pruned)
    assert all(torch.equal(network.state_dict()[key], value) for key, value in values.items())
    assert pruned[0].out_channels < 8 and pruned[0].weight.shape[0] == pruned[0].out_channels
    x = image(0, dtype=network[0].weight.dtype)
    assert pruned(x).shape == (3, 5) and pruned(x).dtype == x.dtype


@pytest.mark.filterwarnings("ignore:`torch.jit")  # torch 2.11's compiler warns of torch at its import
def test_a_compiled_network_is_pruned_as_the_one_inside():
    network = randomised(small_network(), seed=0)
    inside = plain(torch.compile(network))
    assert inside is network and described(groups_of(inside).prunable) == "0 8, 3 6"


def test_a_parallel_network_is_pruned_as_the_one_inside():
    network = randomised(small_network(), seed=0)
    inside = plain(nn.DataParallel(network))
    assert inside is network and described(groups_of(inside).prunable) == "0 8, 3 6"


def test_a_scripted_network_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and met
        scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(256, 5)))
    with pytest.raises(ModelError, match="got a TorchScript module; expected the nn.Module before scripting"):
        plain(scripted)


@pytest.mark.parametrize("case", [FORWARDS["detach"], FORWARDS["where"]])
def test_the_same_groups_in_the_same_order_each_time(case: Case):
    network = network_of(case)
    first = groups_of(network)
    torch.manual_seed(12345)
    assert groups_of(copy.deepcopy(network)) == first
