"""The Python API: what is no plan, no spec, no score, no image; and callers that have torch set to something of their own."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import vpdeploy
from vpdeploy.errors import BudgetError, ModelError, RunFolderError, SurgeryError, VpdeployError
from vpdeploy.surgery.plan import plan as plan_cuts
from vpdeploy.values import ChannelMask, PrunePlan

CLASSES = [str(number) for number in range(10)]
EXAMPLE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def plain() -> nn.Sequential:
    """Two convolutions and a classifier: groups "0" and "2"."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
        ).eval()  # fmt: skip


class Counting(nn.Module):
    """Its forward writes buffers, in eval mode too."""

    seen: Tensor
    mean: Tensor

    def __init__(self):
        super().__init__()
        self.body = plain()
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        self.mean.lerp_(x.mean(), 0.1)
        return self.body(x)


def buffers(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.named_buffers()}


# --- what a forward writes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_buffers_that_a_forward_writes_stay_as_they_were(dtype):
    model, example = Counting().eval().to(dtype), EXAMPLE.to(dtype)
    model(example)
    before = buffers(model)
    assert before["seen"] == 1 and before["mean"] != 0
    groups = vpdeploy.find_groups(model, example)
    result = vpdeploy.prune_once(model, example)
    scored = vpdeploy.gated(model, groups)
    small = vpdeploy.cut(model, scored.plan(), example)
    for network in (model, result.model, scored.network.backbone, small):
        now = buffers(network)
        assert now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)
        assert network is model or not {id(b) for b in network.buffers()} & {id(b) for b in model.buffers()}


def test_an_example_that_a_forward_writes_stays_as_it_was():
    class Shifts(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = plain()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x.clamp_(-1, 1))

    model, example = Shifts().eval(), EXAMPLE.clone()
    plan = vpdeploy.prune_once(model, example).plan
    vpdeploy.find_groups(model, example)
    vpdeploy.cut(model, plan, example)
    assert torch.equal(example, EXAMPLE)


# --- the caller's settings --------------------------------------------------------------------------------------------


@contextmanager
def default_of_float64():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "float64 as default": default_of_float64,
    "no_grad": torch.no_grad,
}


def everything(path: Path, model: nn.Module, *, setting: Callable[[], AbstractContextManager[Any]]) -> dict[str, Any]:
    """What every function gives when it is called under ``setting``."""
    with setting():
        groups = vpdeploy.find_groups(model, EXAMPLE)
        result = vpdeploy.prune_once(model, EXAMPLE)
        scored = vpdeploy.gated(model, groups)
        small = vpdeploy.cut(model, result.plan, EXAMPLE)
        spec = vpdeploy.ExportSpec(CLASSES, 32, form="float", certificate=result.certificate)
        parity = vpdeploy.export_onnx(small, spec, path)
        state = torch.get_default_dtype(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        found = {"plan": result.plan, "certificate": result.certificate, "parity": parity, "scored": scored.plan()}
    assert not any(tensor.is_inference() for tensor in (*small.parameters(), *result.model.parameters()))
    assert all(p.dtype == torch.float32 for p in (*small.parameters(), *result.model.parameters(), scored.scores))
    return {"groups": groups, "state": state, **found}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_the_caller_set_changes_nothing_and_is_put_back(name, tmp_path):
    expected = everything(tmp_path / "a.onnx", plain(), setting=nullcontext)
    with SETTINGS[name]():
        state = torch.get_default_dtype(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
    got = everything(tmp_path / "b.onnx", plain(), setting=SETTINGS[name])
    assert got.pop("state") == state and expected.pop("state") == (torch.float32, False, False)
    assert got == expected
    with SETTINGS[name]():
        with pytest.raises(ModelError):
            vpdeploy.find_groups(plain(), torch.zeros(3))
        assert state == (torch.get_default_dtype(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"))


def test_a_model_made_in_inference_mode_can_be_cut_and_tuned():
    with torch.inference_mode():
        model, example = plain(), EXAMPLE.clone()
    result = vpdeploy.prune_once(model, example)
    assert result.plan == vpdeploy.prune_once(plain(), EXAMPLE).plan
    for small in (result.model, vpdeploy.cut(model, result.plan, example)):
        small(EXAMPLE).sum().backward()
        assert all(p.grad is not None for p in small.parameters())


# --- scores that are learned ------------------------------------------------------------------------------------------


def test_scores_that_a_loss_of_nan_has_spoiled_are_refused():
    model = plain()
    scored = vpdeploy.gated(model, vpdeploy.find_groups(model, EXAMPLE))
    optimizer = torch.optim.SGD([scored.scores], lr=0.1)
    (scored(EXAMPLE).sum() * float("nan")).backward()
    optimizer.step()
    assert not bool(scored.scores.isfinite().any())
    message = (
        r"scores: 0 is not finite; 2 is not finite; expected one finite score for each channel: look at the losses for NaN, "
        "and learn the scores anew with a lower learning rate"
    )
    for call in (scored.selection, scored.plan, lambda: scored(EXAMPLE)):
        with pytest.raises(SurgeryError, match=message):
            call()
    with torch.no_grad():
        assert torch.equal(scored(EXAMPLE, open=True), model(EXAMPLE))  # no score is asked
        scored.scores.copy_(torch.arange(64.0))
        scored.scores[40] = float("inf")
    with pytest.raises(SurgeryError, match="scores: 2 is not finite; expected"):
        scored.selection()


# --- plans --------------------------------------------------------------------------------------------------------------


def plan_file(path: Path) -> dict[str, Any]:
    vpdeploy.save_plan(vpdeploy.prune_once(plain(), EXAMPLE).plan, path)
    return json.loads(path.read_text())


def put(*keys: str, to: Any) -> Callable[[dict[str, Any]], None]:
    """A change of a plan's JSON: what stands under ``keys`` becomes ``to``, or ``to`` of what it was."""

    def change(plan: dict[str, Any]) -> None:
        *way, last = keys
        for key in way:
            plan = plan.setdefault(key, {})
        plan[last] = to(plan.get(last)) if callable(to) else to

    return change


FORGED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "reversed": (put("kept", "0.weight", "0", to=lambda k: k[::-1]), "0.weight, axis 0: expected indices that strictly ascend"),
    "twice the same": (put("kept", "0.weight", "0", to=lambda k: [k[0], *k]), "0.weight, axis 0: expected indices that strictly"),
    "none": (put("kept", "0.weight", "0", to=[]), "0.weight, axis 0: keeps nothing; expected at least one index"),
    "beyond": (put("kept", "0.weight", "0", to=lambda k: [*k, 32]), r"got indices from \d+ to 32; expected 0 to 31"),
    "below": (put("kept", "0.weight", "0", to=lambda k: [-1, *k]), r"got indices from -1 to \d+; expected 0 to 31"),
    "axis -1": (put("kept", "0.weight", "-1", to=[0, 1]), "0.weight, axis -1: expected one of its 4 axes, counted from 0"),
    "axis 7": (put("kept", "0.weight", "7", to=[0]), "0.weight, axis 7: expected one of its 4 axes, counted from 0"),
    "tensor": (put("kept", "9.weight", "0", to=[0]), "kept: 9.weight is no tensor of the network"),
    "module": (put("attributes", "9", "stride", to=2), "attributes: 9 is no module of the network"),
    "stride": (put("attributes", "0", "stride", to=[2, 2]), r"attributes: 0: got .*'stride': \(2, 2\).*; expected {"),
    "padding": (put("attributes", "2", "padding", to=[0, 0]), "attributes: 2: got .*'padding'"),
    "a ReLU's": (put("attributes", "1", "inplace", to=1), "attributes: 1: got {'inplace': 1}; expected {}, which follows from"),
    "class": (put("attributes", "0", "__class__", to=1), "attributes: 0: got .*'__class__': 1"),
    "weight": (put("attributes", "6", "weight", to=1), "attributes: 6: got .*'weight': 1"),
    "out_channels": (put("attributes", "0", "out_channels", to=31), "attributes: 0: got {'out_channels': 31}; expected {'out_ch"),
    "attributes left out": (put("attributes", to={}), "attributes: 0: got {}; expected {'out_channels'"),
    "bias": (put("kept", "0.bias", "0", to=lambda k: k[1:]), r"kept: 0.bias: got \d+ indices; expected \d+"),
    "widths": (put("widths", "0", to=[32, 31]), "widths: 0: got 31 of 32; expected what is kept of"),
    "dense width": (put("widths", "0", to=[64, 48]), "widths: 0: got 48 of 64; expected what is kept of 0.weight"),
    "no width": (put("widths", "0", to=[0, 0]), "widths: 0: got 0 of 0"),
    "a width of nothing": (put("widths", "9", to=[8, 4]), "widths: 9 names no layer of the network"),
    "no widths": (put("widths", to={}), "widths: no group loses channels; expected those that the indices remove"),
    "replacement": (put("replacements", "0", to="heads:torch.nn.MultiheadAttention"), "0: expected attention to replace by"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_a_plan_that_says_what_no_plan_does_is_refused(name, tmp_path):
    path = tmp_path / "plan.json"
    forge, message = FORGED[name]
    content = plan_file(path)
    vpdeploy.cut(plain(), vpdeploy.load_plan(path), EXAMPLE)
    forge(content)
    path.write_text(json.dumps(content))
    with pytest.raises((SurgeryError, ModelError), match=message) as caught:
        vpdeploy.cut(plain(), vpdeploy.load_plan(path), EXAMPLE)
    if isinstance(caught.value, SurgeryError):
        assert str(caught.value).startswith("the plan says what no plan for Sequential does: ")
        assert str(caught.value).endswith("make it again, and keep it by save_plan(plan, path)")


def test_all_that_is_wrong_with_a_plan_is_told_at_once(tmp_path):
    content = plan_file(tmp_path / "plan.json")
    for name in ("reversed", "axis 7", "tensor"):
        FORGED[name][0](content)
    (tmp_path / "plan.json").write_text(json.dumps(content))
    with pytest.raises(SurgeryError, match="strictly ascend; .*axis 7.*; kept: 9.weight is no tensor"):
        vpdeploy.cut(plain(), vpdeploy.load_plan(tmp_path / "plan.json"), EXAMPLE)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 32, 8, stride=8), nn.Linear(32, 10)
        self.attention = nn.MultiheadAttention(32, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))


def test_replacements_are_made_once_and_unknown_ones_refused():
    from vpdeploy.api import prepare

    model = Attending().eval()
    plan = vpdeploy.gated(
        model, vpdeploy.find_groups(model, EXAMPLE), "random", vpdeploy.Budget(0.9, round_to=1)
    ).plan()
    ready, replaced = prepare(model, EXAMPLE)
    assert replaced == plan.replacements and list(replaced) == ["attention"]
    both = [vpdeploy.cut(network, plan, EXAMPLE).state_dict() for network in (model, ready)]
    assert all(torch.equal(both[0][name], both[1][name]) for name in both[0] | both[1])
    wrong = PrunePlan(plan.fits, plan.kept, plan.attributes, plan.widths, {"attention": "heads:os.system"})
    with pytest.raises(
        ModelError, match=r"attention: got torch.nn.MultiheadAttention; expected what 'heads:os.system'"
    ):
        vpdeploy.cut(model, wrong, EXAMPLE)
    with pytest.raises(SurgeryError, match=r"replacements: attention: 'heads:os.system' is none that vpdeploy knows"):
        vpdeploy.cut(ready, wrong, EXAMPLE)


def test_files_that_are_no_plans_are_told_in_the_words_of_this_api(tmp_path):
    again = re.escape("; write it again by save_plan(plan, path)") + "$"
    path = tmp_path / "plan.json"
    with pytest.raises(RunFolderError, match=r"plan.json: cannot be read: No such file or directory" + again):
        vpdeploy.load_plan(path)
    for damaged in ('{"schema": 1}', "[]", "not JSON", '{"schema": 1, "fits": ' + "[" * 100_000):
        path.write_text(damaged)
        with pytest.raises(RunFolderError, match="plan.json: damaged: .*" + again):
            vpdeploy.load_plan(path)


# --- arguments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [True, "0.5", None, 1j, [0.5]], ids=repr)
def test_ratios_that_are_no_numbers_are_refused(ratio):
    with pytest.raises(BudgetError, match="ratio: got .*; expected what may remain, above 0 and at most 1"):
        vpdeploy.prune_once(plain(), EXAMPLE, macs_ratio=ratio)
    with pytest.raises(BudgetError, match="max_removal: got .*; expected a share between 0 and 1"):
        vpdeploy.prune_once(plain(), EXAMPLE, max_removal=ratio)
    with pytest.raises(BudgetError, match="round_to: got .*; expected a whole number from 1"):
        vpdeploy.Budget(round_to=ratio)
    with pytest.raises(BudgetError, match="ratio: got"):
        vpdeploy.gated(plain(), vpdeploy.find_groups(plain(), EXAMPLE), budget=ratio)


@pytest.mark.parametrize("whole", [1, 1.0])
def test_a_ratio_of_which_nothing_is_removed_is_refused(whole):
    with pytest.raises(BudgetError, match="macs_ratio: got 1; expected below 1, as nothing would be removed"):
        vpdeploy.prune_once(plain(), EXAMPLE, macs_ratio=whole)


@pytest.mark.parametrize("seed", [1.5, 2**70, -1, "1", None, True], ids=repr)
def test_seeds_that_torch_does_not_take_are_refused(seed):
    groups = vpdeploy.find_groups(plain(), EXAMPLE)
    message = re.escape(f"seed: got {seed!r}; expected a whole number from 0, below 2**63")
    for scores in ("magnitude", "random"):
        with pytest.raises(SurgeryError, match=message):
            vpdeploy.prune_once(plain(), EXAMPLE, scores=scores, seed=seed)
        with pytest.raises(SurgeryError, match=message):
            vpdeploy.gated(plain(), groups, scores, seed=seed)


NO_SCORES = {
    "None": (None, "got None; expected 'magnitude', 'random' or a mapping"),
    "a list": ([1.0], "got a list; expected 'magnitude', 'random' or a mapping"),
    "text": ({"0": "abc", "2": torch.ones(32)}, "scores: 0 holds no numbers; expected one finite score"),
    "another's": ({"0.weight": "abc"}, "0 is missing; 2 is missing; 0.weight is no group that can be pruned"),
    "ragged": ({"0": [[1], [2, 3]], "2": torch.ones(32)}, "scores: 0 holds no numbers"),
    "nothing": ({"0": None, "2": torch.ones(32)}, "scores: 0 holds no numbers"),
    "meta": ({"0": torch.ones(32, device="meta"), "2": torch.ones(32)}, "scores: 0 holds no numbers"),
    "complex": ({"0": torch.ones(32) * 1j, "2": torch.ones(32)}, "scores: 0 holds no numbers"),
    "a number as name": ({0: torch.ones(32), "0": torch.ones(32), "2": torch.ones(32)}, "0 is no group that can be"),
}


@pytest.mark.parametrize("name", NO_SCORES)
def test_scores_that_are_none_are_refused(name):
    scores, message = NO_SCORES[name]
    groups = vpdeploy.find_groups(plain(), EXAMPLE)
    for call in (
        lambda: vpdeploy.prune_once(plain(), EXAMPLE, scores=scores),
        lambda: vpdeploy.gated(plain(), groups, scores),
    ):
        with pytest.raises(SurgeryError, match=message):
            call()


def test_sparse_scores_are_scores():
    scores = {"0": torch.arange(32.0), "2": torch.arange(32.0)}
    expected = vpdeploy.prune_once(plain(), EXAMPLE, scores=scores).plan
    assert vpdeploy.prune_once(plain(), EXAMPLE, scores={r: s.to_sparse() for r, s in scores.items()}).plan == expected


@pytest.mark.parametrize(
    "example, got",
    [
        (torch.zeros(1, 3, 32, 32, device="meta"), r"a tensor without values \(on the meta device\)"),
        (torch.ones(1, 3, 32, 32).to_sparse(), "a sparse_coo tensor"),
    ],
    ids=["meta", "sparse"],
)
def test_an_example_without_values_is_refused(example, got):
    plan = vpdeploy.prune_once(plain(), EXAMPLE).plan
    for call in (vpdeploy.find_groups, vpdeploy.prune_once, lambda model, x: vpdeploy.cut(model, plan, x)):
        with pytest.raises(ModelError, match=f"example: got {got}; expected images as the model takes them"):
            call(plain(), example)


def test_arguments_of_another_kind_are_refused(tmp_path):
    model: Any = plain()
    plan, no_plan = (
        vpdeploy.prune_once(model, EXAMPLE).plan,
        r"plan: got a str; expected a PrunePlan: .*load_plan\(path\)",
    )
    calls: list[tuple[Callable[[], Any], type[VpdeployError], str]] = [
        (lambda: vpdeploy.gated(model, None), SurgeryError, "groups: got None; expected what find_groups"),  # type: ignore[arg-type]
        (lambda: vpdeploy.gated(model, "conv"), SurgeryError, "groups: got a str; expected what find_groups"),  # type: ignore[arg-type]
        (lambda: vpdeploy.cut(model, "plan.json", EXAMPLE), SurgeryError, no_plan),  # type: ignore[arg-type]
        (lambda: vpdeploy.save_plan("plan", tmp_path / "plan.json"), SurgeryError, no_plan),  # type: ignore[arg-type]
        (lambda: vpdeploy.cut(None, plan, EXAMPLE), ModelError, "model: got a NoneType; expected a torch.nn.Module"),  # type: ignore[arg-type]
        (
            lambda: vpdeploy.find_groups(model, EXAMPLE, limit=5),
            SurgeryError,
            r"limit: got 5; expected vpdeploy.Limit\(",
        ),  # type: ignore[arg-type]
        (
            lambda: vpdeploy.prune_once(model, EXAMPLE, limit=5),
            SurgeryError,
            r"limit: got 5; expected vpdeploy.Limit\(",
        ),  # type: ignore[arg-type]
    ]
    for call, kind, message in calls:
        with pytest.raises(kind, match=message):
            call()


# --- export -------------------------------------------------------------------------------------------------------------


WRONG_SPECS: dict[str, tuple[dict[str, Any], str]] = {
    "an old opset": ({"opset": 17}, "opset: got 17; expected 18 or a later one"),
    "an opset of text": ({"opset": "18"}, "opset: got '18'"),
    "a negative size": ({"image_size": -3}, "image_size: got -3; expected a whole number from 1"),
    "a broken size": ({"image_size": 32.5}, "image_size: got 32.5"),
    "no canvas": ({"canvas_size": 0}, "canvas_size: got 0; expected a whole number from 1"),
    "two means": ({"mean": (0.5, 0.5)}, r"mean: got \(0.5, 0.5\); expected 3 numbers, one for each colour"),
    "a mean for all": ({"mean": 0.5}, "mean: got 0.5; expected 3 numbers"),
    "a mean of nan": ({"mean": (0.5, 0.5, float("nan"))}, "mean: got .*; expected 3 numbers"),
    "no deviation": ({"std": (1, 0, 1)}, r"std: got \(1, 0, 1\); expected numbers above 0"),
    "metadata of numbers": (
        {"metadata": {"epochs": 3}},
        "metadata: got {'epochs': 3}; expected a mapping of text to text",
    ),
    "metadata of a list": ({"metadata": ["a"]}, "metadata: got .*; expected a mapping of text to text"),
    "a forged certificate": ({"metadata": {"certificate": "forged"}}, "metadata: got certificate; expected names that"),
    "what predict reads": ({"metadata": {"max_pixels": "all"}}, "metadata: got max_pixels; expected names that"),
    "one name": ({"classes": "abc"}, "classes: got 'abc'; expected a list of names, one for each logit"),
    "a count": ({"classes": 10}, "classes: got 10; expected a list of names"),
    "numbers": ({"classes": [1, 2]}, r"classes: got \[1, 2\]; expected a list of names"),
    "no classes": ({"classes": []}, r"classes: got \[\]; expected a list of names"),
    "a prompt of numbers": ({"prompt": [1]}, r"prompt: got a list; expected a tensor \[3, 32, 32\]"),
    "a prompt of nan": ({"prompt": torch.full((3, 32, 32), float("nan"))}, "prompt: got values that are not finite"),
    "a mapping": ({"certificate": {"a": 1}}, r"certificate: got a dict; expected that of prune_once\(...\)"),
}


@pytest.mark.parametrize("name", WRONG_SPECS)
def test_specs_that_cannot_be_exported_are_refused(name):
    wrong, message = WRONG_SPECS[name]
    with pytest.raises(ModelError, match=f"^spec: {message}"):
        vpdeploy.ExportSpec(**{"classes": CLASSES, "image_size": 32, **wrong})


def test_all_that_is_wrong_with_a_spec_is_told_at_once():
    with pytest.raises(ModelError, match="image_size: got 0; .*mean: got 1; .*classes: got 3; .*opset: got 1; "):
        vpdeploy.ExportSpec(3, 0, mean=1, opset=1)  # type: ignore[arg-type]


PICTURE = np.random.default_rng(0).integers(0, 255, (20, 24, 3), dtype=np.uint8)
NO_PICTURES: dict[str, tuple[Any, str]] = {
    "float": ([PICTURE, PICTURE / 255.0], r"images: number 1 is \[20, 24, 3\] of float64"),
    "CHW": ([PICTURE.transpose(2, 0, 1)], r"images: number 0 is \[3, 20, 24\] of uint8"),
    "gray": ([PICTURE[..., 0]], r"images: number 0 is \[20, 24\] of uint8"),
    "a tensor": ([torch.zeros(20, 24, 3, dtype=torch.uint8)], "images: number 0 is a Tensor"),
    "a number": (5, "images: got a int"),
}


@pytest.mark.parametrize("name", NO_PICTURES)
def test_images_that_are_no_pictures_are_refused(name, tmp_path):
    images, message = NO_PICTURES[name]
    with pytest.raises(ModelError, match=rf"{message}; expected a list of uint8 arrays \[h, w, 3\], RGB"):
        vpdeploy.export_onnx(plain(), vpdeploy.ExportSpec(CLASSES, 32), tmp_path / "a.onnx", images=images)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_model_or_no_spec_is_refused(tmp_path):
    spec: Any = vpdeploy.ExportSpec(CLASSES, 32)
    no_model: Any = lambda x: x  # noqa: E731
    with pytest.raises(ModelError, match="model: got a function; expected a torch.nn.Module"):
        vpdeploy.export_onnx(no_model, spec, tmp_path / "a.onnx")
    with pytest.raises(ModelError, match="spec: got a dict; expected a vpdeploy.ExportSpec"):
        vpdeploy.export_onnx(plain(), {"classes": CLASSES}, tmp_path / "a.onnx")  # type: ignore[arg-type]


def test_a_certificate_goes_with_its_own_network_alone(tmp_path):
    result, path = vpdeploy.prune_once(plain(), EXAMPLE), tmp_path / "a.onnx"
    spec = vpdeploy.ExportSpec(CLASSES, 32, form="float", certificate=result.certificate)
    with torch.no_grad():
        for parameter in result.model.parameters():
            parameter.mul_(1.5)  # tuned
    vpdeploy.export_onnx(result.model, spec, path)
    path.unlink()
    half = replace(
        result.certificate, groups=tuple(replace(g, kept=g.width // 2) for g in result.certificate.groups[:2])
    )
    others = [
        (spec, plain(), r"0 has 32 outputs, and keeps \d+ channels there.*; none of its layers is cut"),
        (
            spec,
            vpdeploy.prune_once(plain(), EXAMPLE, macs_ratio=0.2).model,
            r"0 has \d+ outputs, and keeps \d+ channels",
        ),
        (spec, nn.Sequential(nn.Identity(), plain()).eval(), "it has no 0; it has no 2; it has no 6"),
        (replace(spec, certificate=half), plain(), "none of its layers is cut"),
    ]
    for given, network, message in others:
        with pytest.raises(
            ModelError, match=f"spec.certificate: not of this Sequential: {message}.*; expected that of the"
        ):
            vpdeploy.export_onnx(network, given, path)
    assert list(tmp_path.iterdir()) == []


class ByShape(nn.Module):
    """Its second sum stands only where two widths agree."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 48, 3, padding=1)
        self.c, self.head = nn.Conv2d(48, 64, 3, padding=1), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu()).relu()
        y = self.c(x).relu()
        return self.head((x + y if x.shape == y.shape else y).mean((2, 3)))


def test_cut_refuses_a_plan_at_whose_widths_the_forward_does_something_else():
    network = ByShape().eval()
    groups = vpdeploy.find_groups(network, EXAMPLE)
    widths = {"c": 48}  # as many as b has
    mask = ChannelMask({g.root: tuple(c < widths.get(g.root, g.width) for c in range(g.width)) for g in groups.groups})
    equal = plan_cuts(network, groups.groups, mask)
    with pytest.raises(SurgeryError) as caught:
        vpdeploy.cut(network, equal, EXAMPLE)
    assert "the dense network does mean in its own forward where the pruned one does add in its own forward" in str(
        caught.value
    )


@pytest.mark.skipif(not hasattr(__import__("signal"), "setitimer"), reason="no such timer here")
def test_a_forward_without_end_is_stopped():
    class Endless(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            while True:
                pass

    with pytest.raises(vpdeploy.errors.VpdeployError, match="the analysis was stopped after"):
        vpdeploy.find_groups(nn.Sequential(nn.Flatten(), Endless(3072, 10)), EXAMPLE, limit=vpdeploy.Limit(seconds=0.5))
