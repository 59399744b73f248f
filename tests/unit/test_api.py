"""The Python API: what each function gives, that a given model stays as it is, and what is refused, saying why."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
import torch
from integration.command_line import fresh
from tolerances import NAMED_RATIO, SAME_IN_FLOAT64
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import VisionTransformer

import vpdeploy
from vpdeploy.deploy.session import read_metadata
from vpdeploy.errors import BudgetError, ModelError, ParityError, RunFolderError, SurgeryError
from vpdeploy.run_folder import load
from vpdeploy.surgery.limit import LimitError
from vpdeploy.values import Certificate

CLASSES = list("abcde")


class Small(nn.Module):
    """Two convolutions with norms and a linear layer: groups "a" and "b" for any size of image."""

    def __init__(self, channels: int = 3, *, second: bool = False):
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.b, self.norm_b = nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32)
        self.head, self.second = nn.Linear(32, len(CLASSES)), second

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm_a(self.a(x)))
        x = F.relu(self.norm_b(self.b(x)))
        return self.head(x.mean((2, 3)) if not self.second else x.amax((2, 3)))


class Attending(nn.Module):
    """A patch embedding, attention of 8 heads and an MLP, both after a LayerNorm, and a head."""

    def __init__(self):
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 32, 4, stride=4), nn.Linear(32, len(CLASSES))
        self.attention = nn.MultiheadAttention(32, 8, batch_first=True)
        self.norm, self.mlp = nn.LayerNorm(32), nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)  # [n, c, h, w] -> [n, h * w, c]
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head((x + self.mlp(self.norm(x))).mean(1))


def made(make: Callable[[], nn.Module], *, seed: int = 0) -> nn.Module:
    """The network with statistics and shifts that are not those of a fresh norm."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = make()
        for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.data = torch.rand_like(tensor) + (0.5 if name.endswith(("var", "weight")) else -0.5)
    return network.eval()


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


EXAMPLE = images(2, 3, 16, 16)


def bits(network: nn.Module) -> dict[str, object]:
    """All that could change of a model that is given: every value, type, layout, flag, mode and hook."""
    found: dict[str, object] = {}
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        raw = tensor.detach().contiguous().view(torch.uint8 if tensor.ndim else tensor.dtype)
        found[name] = (
            id(tensor), tensor.dtype, tensor.device, tensor.requires_grad, tensor.grad is None, tensor.stride(),
            raw.numpy().tobytes(),
        )  # fmt: skip
    for name, module in network.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._state_dict_hooks)
        numbers = {key: value for key, value in vars(module).items() if isinstance(value, int | tuple)}
        found[f"module {name}"] = (id(module), type(module), numbers, [len(each) for each in hooks])
    return found


def likeness(network: nn.Module) -> dict[str, object]:
    """What a smaller network has in common with the one it came from, by name."""
    found: dict[str, object] = {name: module.training for name, module in network.named_modules()}
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        layout = None
        if tensor.ndim == 4 and tensor[0, 0].numel() > 1:
            layout = tensor.is_contiguous(), tensor.is_contiguous(memory_format=torch.channels_last)
        found[f"tensor {name}"] = (tensor.dtype, tensor.device, tensor.requires_grad, layout)
    return found


def same_bits(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- the door ---------------------------------------------------------------------------------------------------------


def test_importing_vpdeploy_imports_no_torch():
    done = fresh(code="import sys, vpdeploy; print(sorted({'torch', 'numpy', 'onnx'} & set(sys.modules)))")
    assert (done.status, done.out.strip()) == (0, "[]"), done.err


def test_every_name_resolves_and_others_do_not():
    assert len(set(vpdeploy.__all__)) == len(vpdeploy.__all__) >= 12
    for name in vpdeploy.__all__:
        assert getattr(vpdeploy, name).__doc__, name
    with pytest.raises(AttributeError, match="'vpdeploy' has no attribute 'prune'"):
        _ = vpdeploy.prune


# --- what is given stays, and what comes back is like it -----------------------------------------------------------------


def partly_frozen() -> nn.Module:
    network = made(Small)
    network.a.requires_grad_(False)
    network.train()
    network.norm_a.eval()
    return network


AS_THEY_COME = {
    "eval": lambda: made(Small),
    "training": lambda: made(Small).train(),
    "partly frozen": partly_frozen,
    "frozen": lambda: made(Small).requires_grad_(False),
    "bfloat16": lambda: made(Small).bfloat16(),
    "float16": lambda: made(Small).half(),
    "float64": lambda: made(Small).double(),
    "channels last": lambda: made(Small).to(memory_format=torch.channels_last),
    "attention, bfloat16, training": lambda: made(Attending).bfloat16().train(),
}


@pytest.mark.parametrize("name", AS_THEY_COME)
def test_a_model_stays_as_it_came_and_the_smaller_one_is_like_it(name):
    model = AS_THEY_COME[name]()
    before = bits(model)
    groups = vpdeploy.find_groups(model, EXAMPLE)
    result = vpdeploy.prune_once(model, EXAMPLE, macs_ratio=0.6)
    scored = vpdeploy.gated(model, groups, budget=0.6)
    rebuilt = vpdeploy.cut(model, result.plan, EXAMPLE)
    assert bits(model) == before
    small = likeness(result.model)
    if not result.plan.replacements:
        assert small == likeness(model)
    (dtype,) = {p.dtype for p in result.model.parameters()}
    assert dtype == next(model.parameters()).dtype and result.model.training == model.training
    assert likeness(rebuilt) == small and same_bits(rebuilt, result.model)
    kept = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    for network in (result.model, rebuilt, scored):
        assert not kept & {id(tensor) for tensor in [*network.parameters(), *network.buffers()]}
    assert result.certificate.masked_vs_pruned <= SAME_IN_FLOAT64
    x = EXAMPLE.to(dtype)
    assert result.model(x).shape == scored(x).shape == (2, len(CLASSES)) and result.model(x).dtype == dtype


def test_hooks_of_the_model_stay_its_own():
    model, seen = made(Small), []
    model.a.register_forward_hook(lambda *_: seen.append(1))
    before = bits(model)
    vpdeploy.prune_once(model, EXAMPLE)
    assert bits(model) == before
    seen.clear()
    model(EXAMPLE)
    assert seen == [1]


@pytest.mark.parametrize("shape", [(2, 1, 16, 16), (1, 4, 12, 12), (2, 3, 12, 20), (1, 3, 33, 9)], ids=str)
def test_any_shape_of_image(shape):
    model, x = made(lambda: Small(shape[1])), images(*shape)
    groups = vpdeploy.find_groups(model, x)
    assert [(g.root, g.status) for g in groups.groups] == [("a", "exact"), ("b", "exact"), ("head", "excluded")]
    assert groups.shape == shape[1:]
    result = vpdeploy.prune_once(model, x)
    assert result.certificate.reached <= 0.5 and result.certificate.images == shape[0]
    assert result.certificate.masked_vs_pruned <= SAME_IN_FLOAT64
    assert vpdeploy.cut(model, result.plan, x)(x).shape == (shape[0], len(CLASSES))
    assert vpdeploy.gated(model, groups)(x).shape == (shape[0], len(CLASSES))


def test_macs_are_those_of_the_shape_given():
    """On paper: a 3x3 convolution to 16 channels at h w, one from 16 to 32 at a quarter of that, the head once."""
    model, x = made(Small), images(1, 3, 12, 20)
    kept = vpdeploy.prune_once(model, x, macs_ratio=0.5).plan.widths

    def macs(a: int, b: int) -> int:
        return 9 * 3 * a * 240 + 9 * a * b * 60 + b * len(CLASSES)

    reached = macs(kept["a"][1], kept["b"][1]) / macs(16, 32)
    assert vpdeploy.prune_once(model, x).certificate.reached == pytest.approx(reached, rel=1e-12) and reached <= 0.5


# --- prune_once ----------------------------------------------------------------------------------------------------------


def test_the_ratio_is_reached_and_the_certificate_says_so():
    model = made(Small)
    result = vpdeploy.prune_once(model, EXAMPLE, macs_ratio=0.4)
    proved = result.certificate
    assert (proved.budget, proved.requested) == ("macs_ratio", 0.4) and 0.3 < proved.reached <= 0.4
    assert proved.mask_effect > 1e-3 and proved.but_for_norms is None
    assert max(proved.masked_vs_pruned, proved.masked_vs_pruned_random) <= SAME_IN_FLOAT64
    assert {g.root: (g.width, g.kept) for g in proved.groups if g.status == "exact"} == result.plan.widths
    assert (result.model.a.out_channels, result.model.b.out_channels) == tuple(
        k for _, k in result.plan.widths.values()
    )
    assert {g.root: g.reason for g in proved.groups if g.status == "excluded"} == {
        "head": "its channels are the network's outputs"
    }


def test_the_same_call_gives_the_same_plan():
    for scores in ("magnitude", "random"):
        plans = [vpdeploy.prune_once(made(Small), EXAMPLE, scores=scores, seed=3).plan for _ in range(2)]
        assert plans[0] == plans[1]
    others = [vpdeploy.prune_once(made(Small), EXAMPLE, scores="random", seed=seed).plan for seed in (3, 4)]
    assert others[0] != others[1]


def test_given_scores_decide_what_stays():
    model = made(Small)
    rising = {"a": torch.arange(16), "b": -torch.arange(32.0, dtype=torch.float64)}
    plan = vpdeploy.prune_once(model, EXAMPLE, scores=rising, macs_ratio=0.2).plan
    a, b = plan.widths["a"][1], plan.widths["b"][1]
    assert plan.kept["a.weight"][0] == tuple(range(16 - a, 16)) and plan.kept["b.weight"][0] == tuple(range(b))
    assert plan.kept["head.weight"][1] == tuple(range(b))
    arrays = {root: given.numpy() for root, given in rising.items()}
    assert vpdeploy.prune_once(model, EXAMPLE, scores=arrays, macs_ratio=0.2).plan == plan


def test_all_that_is_wrong_with_scores_is_told_at_once():
    wrong = {"b": torch.ones(31), "c": torch.ones(4), "head": torch.ones(5)}
    with pytest.raises(SurgeryError) as caught:
        vpdeploy.prune_once(made(Small), EXAMPLE, scores=wrong)
    assert str(caught.value) == (
        "scores: a is missing; b is [31], expected [32]; c is no group that can be pruned; head is no group that can be "
        "pruned; expected one finite score for each channel of each prunable group: find_groups(model, example).prunable "
        "has their roots and widths"
    )
    for bad in (float("nan"), float("inf")):
        with pytest.raises(SurgeryError, match="scores: a is not finite; expected one finite score"):
            vpdeploy.prune_once(made(Small), EXAMPLE, scores={"a": torch.full((16,), bad), "b": torch.ones(32)})
    with pytest.raises(SurgeryError, match="scores: got 'taylor'; expected 'magnitude', 'random' or a mapping"):
        vpdeploy.prune_once(made(Small), EXAMPLE, scores="taylor")  # type: ignore[arg-type]
    many = {f"x{i}": torch.ones(1) for i in range(9)} | {"a": torch.ones(16), "b": torch.ones(32)}
    with pytest.raises(SurgeryError, match="x4 is no group that can be pruned and 4 more; expected"):
        vpdeploy.prune_once(made(Small), EXAMPLE, scores=many)


def test_an_unreachable_ratio_names_the_best():
    with pytest.raises(BudgetError, match=r"macs_ratio: got 0.01; the best reachable is 0\.\d+ ") as caught:
        vpdeploy.prune_once(made(Small), EXAMPLE, macs_ratio=0.01)
    best = float(str(caught.value).split("the best reachable is ")[1].split()[0])
    assert vpdeploy.prune_once(made(Small), EXAMPLE, macs_ratio=best).certificate.reached > best - NAMED_RATIO


def test_round_to_and_max_removal_are_kept():
    plan = vpdeploy.prune_once(made(Small), EXAMPLE, macs_ratio=0.6, round_to=4, max_removal=0.5).plan
    assert all(kept % 4 == 0 and kept >= width / 2 for width, kept in plan.widths.values())
    with pytest.raises(BudgetError, match="max_removal = 0.1"):
        vpdeploy.prune_once(made(Small), EXAMPLE, macs_ratio=0.5, max_removal=0.1)


def test_all_that_is_wrong_with_a_budget_is_told_at_once():
    with pytest.raises(BudgetError) as caught:
        vpdeploy.Budget(1.5, kind="macs", round_to=0, max_removal=1)
    assert str(caught.value) == (
        "budget: ratio: got 1.5; expected what may remain, above 0 and at most 1; kind: got 'macs'; expected one of "
        "channel_ratio, macs_ratio, params_ratio; round_to: got 0; expected a whole number from 1; max_removal: got 1; "
        "expected a share between 0 and 1"
    )
    for ratio in (0, -1, float("nan")):
        with pytest.raises(BudgetError, match="ratio: got"):
            vpdeploy.prune_once(made(Small), EXAMPLE, macs_ratio=ratio)


def test_nothing_to_prune_says_why():
    linear = nn.Sequential(nn.Flatten(), nn.Linear(768, 5))
    with pytest.raises(
        BudgetError, match="nothing can be removed from Sequential: 1: its channels are the network's outputs"
    ):
        vpdeploy.prune_once(linear, EXAMPLE)
    with pytest.raises(BudgetError, match="nothing can be removed from Sequential"):
        vpdeploy.gated(linear, vpdeploy.find_groups(linear, EXAMPLE))
    with pytest.raises(ModelError, match="model: Sequential has no parameters; expected a network with weights"):
        vpdeploy.prune_once(nn.Sequential(nn.Flatten()), EXAMPLE)


NO_IMAGES = {
    "a list": ([1, 2], "got a list"),
    "one image": (torch.rand(3, 16, 16), r"got \[3, 16, 16\] of float32"),
    "none": (torch.rand(0, 3, 16, 16), r"got \[0, 3, 16, 16\] of float32"),
    "bytes": (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), r"got \[1, 3, 16, 16\] of uint8"),
    "nan": (torch.full((1, 3, 16, 16), float("nan")), "got values that are not finite"),
}


@pytest.mark.parametrize("name", NO_IMAGES)
def test_an_example_that_is_no_batch_of_images_is_refused(name):
    example, message = NO_IMAGES[name]
    plan = vpdeploy.prune_once(made(Small), EXAMPLE).plan
    for call in (vpdeploy.find_groups, vpdeploy.prune_once, lambda model, x: vpdeploy.cut(model, plan, x)):
        with pytest.raises(ModelError, match=f"example: {message}.*expected images as the model takes them"):
            call(made(Small), example)


class TwoInputs(Small):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x + y)


class Dictionary(Small):
    def forward(self, x: Tensor):  # type: ignore[override]
        return {"logits": super().forward(x)}


class Pair(Small):
    def forward(self, x: Tensor):  # type: ignore[override]
        return super().forward(x), x


FORWARDS = {
    "two inputs": (
        TwoInputs,
        r"missing 1 required .* 'y'; expected one that takes images \[1, 3, 16, 16\] and nothing else",
    ),
    "a dictionary": (Dictionary, "gives a dict with the keys 'logits'; expected one tensor, the logits: wrap it"),
    "a pair": (Pair, "gives a tuple; expected one tensor, the logits: wrap it"),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_other_forwards_are_refused_saying_what_is_expected(name):
    make, message = FORWARDS[name]
    with pytest.raises(SurgeryError, match=message):
        vpdeploy.prune_once(made(make), EXAMPLE)


def test_wrapped_models_are_taken_out_and_scripted_ones_refused():
    model = made(Small)
    expected = vpdeploy.prune_once(model, EXAMPLE)
    compiled = torch.compile(made(Small), backend="eager")
    for wrapped in (nn.DataParallel(made(Small)), compiled):
        result = vpdeploy.prune_once(wrapped, EXAMPLE)
        assert result.plan == expected.plan and same_bits(result.model, expected.model)
        assert same_bits(vpdeploy.cut(wrapped, result.plan, EXAMPLE), expected.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and met
        scripted = torch.jit.trace(model, EXAMPLE)
    for call in (vpdeploy.find_groups, vpdeploy.prune_once):
        with pytest.raises(ModelError, match="model: got a TorchScript module; expected the nn.Module before"):
            call(scripted, EXAMPLE)
    with pytest.raises(ModelError, match=r"model: got a function; expected a torch\.nn\.Module"):
        vpdeploy.prune_once(lambda x: x, EXAMPLE)  # type: ignore[arg-type]


# --- groups: limits, approximate ones ---------------------------------------------------------------------------------------


def test_an_analysis_past_its_limit_tells_what_was_reached():
    for call in (vpdeploy.find_groups, vpdeploy.prune_once):
        with pytest.raises(
            LimitError, match=r"stopped after \d+ s \(the limit is 0 s\), when .* was called; analyse at"
        ):
            call(made(Small), EXAMPLE, limit=vpdeploy.Limit(seconds=0))


def test_an_analysis_past_its_memory_tells_what_was_reached():
    wide = nn.Sequential(
        nn.Conv2d(3, 128, 1), nn.ReLU(), nn.Conv2d(128, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )
    limit = vpdeploy.Limit(gib=0.05)  # one map of the first layer takes 0.125 GiB
    with pytest.raises(LimitError, match=r"stopped after 0\.\d GiB \(the limit is 0\.05 GiB\), when \d was called"):
        vpdeploy.find_groups(wide, images(1, 3, 512, 512), limit=limit)


def test_approximate_groups_come_only_when_asked_for():
    model = made(Attending)
    found = {group.root: group for group in vpdeploy.find_groups(model, EXAMPLE).groups}
    assert (
        found["patches"].status == "excluded" and "norm takes statistics over its channels" in found["patches"].reason
    )
    assert {root for root, group in found.items() if group.status == "exact"} == {"attention.q", "mlp.0"}
    with pytest.raises(BudgetError, match="the best reachable is"):
        vpdeploy.prune_once(model, EXAMPLE, macs_ratio=0.2, round_to=1)

    approximate = vpdeploy.find_groups(model, EXAMPLE, allow_approximate=True)
    (group,) = [g for g in approximate.groups if g.status == "approximate"]
    assert group.root == "patches" and group.difference is not None and group.difference > 1e-3
    result = vpdeploy.prune_once(model, EXAMPLE, macs_ratio=0.2, round_to=1, allow_approximate=True)
    proved = result.certificate
    assert proved.reached <= 0.2 and proved.masked_vs_pruned > 1e-3
    assert proved.but_for_norms is not None and proved.but_for_norms <= 1e-6
    (record,) = [g for g in proved.groups if g.root == "patches"]
    assert record.status == "approximate" and record.kept < record.width == 32
    scored = vpdeploy.gated(model, approximate, budget=vpdeploy.Budget(0.2, round_to=1))
    assert vpdeploy.cut(model, scored.plan(), EXAMPLE)(EXAMPLE).shape == (2, len(CLASSES))


# --- plans ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Small, Attending])
def test_a_plan_from_json_gives_the_same_bits_on_the_original_model(make, tmp_path):
    model = made(make)
    result = vpdeploy.prune_once(model, EXAMPLE, macs_ratio=0.6)
    vpdeploy.save_plan(result.plan, tmp_path / "plan.json")
    plan = vpdeploy.load_plan(str(tmp_path / "plan.json"))
    assert plan == result.plan
    assert dict(plan.replacements) == dict(result.certificate.replacements)
    assert bool(plan.replacements) == (make is Attending)
    rebuilt = vpdeploy.cut(model, plan, EXAMPLE)
    assert same_bits(rebuilt, result.model) and torch.equal(rebuilt(EXAMPLE), result.model(EXAMPLE))
    other = vpdeploy.cut(made(make, seed=9), plan, EXAMPLE)  # other weights, of the same architecture
    assert not same_bits(other, result.model)
    other.load_state_dict(result.model.state_dict())
    assert torch.equal(other(EXAMPLE), result.model(EXAMPLE))


def test_attention_is_replaced_by_an_equal_one():
    model = made(Attending)
    plan = vpdeploy.gated(model, vpdeploy.find_groups(model, EXAMPLE), budget=1.0).plan()
    assert plan.replacements and all(width == kept for width, kept in plan.widths.values())
    with torch.no_grad():
        assert torch.allclose(vpdeploy.cut(model, plan, EXAMPLE)(EXAMPLE), model(EXAMPLE), rtol=1e-5, atol=1e-6)


def test_a_plan_of_another_network_is_told():
    plan = vpdeploy.prune_once(made(Small), EXAMPLE).plan
    with pytest.raises(SurgeryError, match=r"does not fit network Small: a.weight is \(16, 1, 3, 3\), planned for"):
        vpdeploy.cut(made(lambda: Small(1)), plan, EXAMPLE)
    with pytest.raises(SurgeryError, match="does not fit network Attending: a.weight is missing"):
        vpdeploy.cut(made(Attending), plan, EXAMPLE)
    with pytest.raises(SurgeryError, match=r"the plan leaves does not run on \[1, 1, 16, 16\]: RuntimeError"):
        vpdeploy.cut(made(Small), plan, images(1, 1, 16, 16))


def test_a_file_that_is_no_plan_is_told(tmp_path):
    with pytest.raises(RunFolderError, match="plan.json: cannot be read"):
        vpdeploy.load_plan(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_text('{"schema": 1}')
    with pytest.raises(RunFolderError, match="plan.json"):
        vpdeploy.load_plan(tmp_path / "plan.json")


# --- learned scores ----------------------------------------------------------------------------------------------------------


def toy() -> tuple[Tensor, Tensor]:
    """Images whose colour is their class."""
    labels = torch.arange(12) % 3
    x = images(12, 3, 16, 16) * 0.3
    x[torch.arange(12), labels] += 1.5
    return x, labels


def test_a_few_steps_change_the_scores_and_nothing_else():
    model = made(Small)
    scored = vpdeploy.gated(model, vpdeploy.find_groups(model, EXAMPLE)).train()
    assert [name for name, p in scored.named_parameters() if p.requires_grad] == ["scores"]
    x, labels = toy()
    before, start = bits(scored.network), scored.scores.detach().clone()
    optimizer = torch.optim.SGD([p for p in scored.parameters() if p.requires_grad], lr=2.0, momentum=0.9)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(scored(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert bits(scored.network) == before
    assert not torch.equal(scored.scores, start) and min(losses) < losses[0]
    mask = scored.selection().mask
    assert mask != vpdeploy.gated(model, vpdeploy.find_groups(model, EXAMPLE)).selection().mask
    assert same_bits(model, made(Small))


def test_the_scored_network_is_what_the_plan_leaves():
    model = made(Small)
    scored = vpdeploy.gated(
        model, vpdeploy.find_groups(model, EXAMPLE), "random", vpdeploy.Budget(0.4, round_to=4), seed=5
    )
    selection = scored.selection()
    assert (selection.budget, selection.requested) == ("macs_ratio", 0.4) and selection.reached <= 0.4
    small = vpdeploy.cut(model, scored.plan(), EXAMPLE).double()
    assert {root: kept for root, (_, kept) in scored.plan().widths.items()} == selection.mask.widths()
    scored.network.double()
    with torch.no_grad():
        masked, removed = scored(EXAMPLE.double()), small(EXAMPLE.double())
        assert float((masked - removed).abs().max()) <= SAME_IN_FLOAT64 * float(masked.abs().max())
        assert torch.equal(scored(EXAMPLE.double(), open=True), made(Small).double()(EXAMPLE.double()))


def test_the_gradient_is_that_of_the_gates_for_removed_channels_too():
    """Straight through: dL/d(score) = dL/d(gate) at the mask, and a gate's is the sum of gradient times input."""
    model = made(Small).double()
    groups = vpdeploy.find_groups(model, EXAMPLE)
    scored = vpdeploy.gated(model, groups)
    x, labels = EXAMPLE.double(), torch.tensor([0, 3])
    (got,) = torch.autograd.grad(F.cross_entropy(scored(x), labels), scored.scores)
    keep = torch.tensor([k for g in groups.prunable for k in scored.selection().mask.keep[g.root]])
    assert 0 < int(keep.sum()) < len(keep) == 48

    # By hand for "b", whose one reader is the head: logits = W (gate * pooled) + bias.
    first = F.relu(model.norm_a(model.a(x))) * keep[:16, None, None]
    pooled = F.relu(model.norm_b(model.b(first))).mean((2, 3)).detach()  # [n, 32]
    logits = (pooled * keep[16:]) @ model.head.weight.T + model.head.bias
    slope = (torch.softmax(logits, 1) - F.one_hot(labels, len(CLASSES))) / len(x)  # [n, k]
    by_hand = ((slope @ model.head.weight) * pooled).sum(0).detach()
    assert torch.allclose(got[16:].double(), by_hand, rtol=1e-5, atol=1e-8)  # scores and their gradient are float32
    assert bool((got[~keep] != 0).any())  # or no removed channel could come back


def test_the_mask_follows_the_scores_and_stays_under_the_budget():
    model = made(Small)
    scored = vpdeploy.gated(model, vpdeploy.find_groups(model, EXAMPLE), budget=vpdeploy.Budget(0.5, "params_ratio"))
    for seed in range(3):
        scored.scores.data = images(48, seed=seed)
        selection = scored.selection()
        small = vpdeploy.cut(model, scored.plan(), EXAMPLE)
        count = sum(p.numel() for p in small.parameters()) / sum(p.numel() for p in model.parameters())
        assert count == pytest.approx(selection.reached, rel=1e-9) and selection.reached <= 0.5
        kept = torch.tensor(selection.mask.keep["a"])
        assert float(scored.scores[:16][kept].detach().min()) >= float(scored.scores[:16][~kept].detach().max())


def test_groups_of_another_network_are_told():
    groups = vpdeploy.find_groups(made(Small), EXAMPLE)
    for other in (
        Attending,
        lambda: Small(second=True),
        tiny.network,
        lambda: vpdeploy.prune_once(Small(), EXAMPLE).model,
    ):
        with pytest.raises(SurgeryError, match="groups: not those of this .*; expected what find_groups"):
            vpdeploy.gated(made(other), groups)


# --- export -------------------------------------------------------------------------------------------------------------------


def test_a_pruned_model_is_exported_with_its_prompt_and_proof(tmp_path):
    result = vpdeploy.prune_once(made(Small), EXAMPLE)
    prompt = torch.rand(3, 20, 20, generator=torch.Generator().manual_seed(0)) * 0.2
    before = bits(result.model.train())
    spec = vpdeploy.ExportSpec(
        CLASSES, 16, canvas_size=20, prompt=prompt, certificate=result.certificate, metadata={"author": "me"}
    )
    for form in ("float", "uint8"):
        path = tmp_path / f"{form}.onnx"
        parity = vpdeploy.export_onnx(result.model, replace(spec, form=form), path)
        assert (parity.form, parity.batches) == (form, (1, 3, 8)) and parity.images >= 32
        assert parity.relative_error <= 1e-4 and parity.top1_agreement == 1 and parity.logit_spread > 1e-2
        about = read_metadata(path)
        assert about["form"] == form and about["author"] == "me" and about["image_size"] == "16"
        assert about["canvas_size"] == "20" and about["classes"] == '["a", "b", "c", "d", "e"]'
        assert load(Certificate, about["certificate"].encode(), where="") == result.certificate
    assert bits(result.model) == before
    import onnxruntime

    session = onnxruntime.InferenceSession(tmp_path / "float.onnx", providers=["CPUExecutionProvider"])
    image = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    (logits,) = session.run(["logits"], {"image": image.numpy()})
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    canvas = (F.pad(image, (2, 2, 2, 2)) + prompt).clamp(0, 1)
    with torch.no_grad():
        expected = result.model.eval()((canvas - mean) / std).numpy()
    assert float(np.abs(logits - expected).max()) <= 1e-4 * float(np.abs(expected).max())


def test_of_a_transformers_last_block_the_file_computes_what_is_read(tmp_path):
    torch.manual_seed(0)
    network = VisionTransformer(16, 8, 2, 2, hidden_dim=8, mlp_dim=24, num_classes=len(CLASSES))
    nn.init.normal_(network.heads.get_submodule("head").get_parameter("weight"))
    before = bits(network)
    parity = vpdeploy.export_onnx(network, vpdeploy.ExportSpec(CLASSES, 16, form="float"), tmp_path / "a.onnx")
    assert parity.relative_error <= 1e-4 and bits(network) == before
    inferred = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "a.onnx"))
    shapes = {value.name: value.type.tensor_type.shape.dim for value in inferred.graph.value_info}
    hidden = [shapes[node.output[0]][1].dim_value for node in inferred.graph.node if node.op_type == "Erf"]
    assert hidden == [5, 1]  # tokens at the MLP of each block: four patches and the class; the class


def test_few_images_of_ones_own_will_do(tmp_path):
    own = [np.random.default_rng(0).integers(0, 255, (20, 24, 3), dtype=np.uint8)]
    spec = vpdeploy.ExportSpec(CLASSES, 16, form="float")
    parity = vpdeploy.export_onnx(made(Small), spec, tmp_path / "a.onnx", images=own)
    assert parity.images == 8 + 3 + 8  # one at a time, mirrored and shifted, then batches of 3 and 8
    with pytest.raises(ParityError, match="no images to compare"):
        vpdeploy.export_onnx(made(Small), spec, tmp_path / "b.onnx", images=[])
    assert [file.name for file in tmp_path.iterdir()] == ["a.onnx"]


def test_a_proof_that_would_prove_nothing_leaves_no_file(tmp_path):
    model = made(Small)
    nn.init.zeros_(model.head.weight)
    with pytest.raises(ParityError, match="the check is vacuous"):
        vpdeploy.export_onnx(model, vpdeploy.ExportSpec(CLASSES, 16, form="float"), tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_the_file_is_told(tmp_path):
    with pytest.raises(ModelError) as caught:
        vpdeploy.ExportSpec(
            CLASSES,
            16,
            canvas_size=8,
            form="flaot",
            resize="crop",
            prompt=torch.rand(3),
            metadata={"form": "1"},  # type: ignore[arg-type]
        )
    assert str(caught.value) == (
        "spec: canvas_size: got 8; expected image_size (16) or more; form: got 'flaot'; expected one of uint8, float; "
        "resize: got 'crop'; expected one of stretch, shorter-side-crop; prompt: got [3]; expected [3, 8, 8]; metadata: got "
        "form; expected names that vpdeploy does not write itself"
    )
    path, spec = Path(tmp_path / "a.onnx"), vpdeploy.ExportSpec(CLASSES, 16)
    with pytest.raises(
        ModelError, match=r"gives \[2, 5\] for 2 images; expected logits \[2, 2\], one for each of spec.classes"
    ):
        vpdeploy.export_onnx(made(Small), replace(spec, classes=["a", "b"]), path)
    with pytest.raises(ModelError, match="does not take 3x16x16 input"):
        vpdeploy.export_onnx(made(lambda: Small(1)), spec, path)
    with pytest.raises(ModelError, match="Dictionary gives a dict for 2 images"):
        vpdeploy.export_onnx(made(Dictionary), spec, path)
    assert list(tmp_path.iterdir()) == []
