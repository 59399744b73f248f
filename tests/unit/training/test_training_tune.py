"""Stage 2: weights and prompt learn together, from where they are told to start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from vpdeploy.recipe.tables import Recipe
from vpdeploy.surgery.cut import cut
from vpdeploy.surgery.plan import plan
from vpdeploy.training import tune as module
from vpdeploy.training.network import Compute, Prompted, build_canvas, prompt_state
from vpdeploy.training.teacher import Teacher, asked_every_step, asked_once
from vpdeploy.training.tune import tune
from vpdeploy.values import ChannelMask, Dense, Tuned


def recipe(**values: Any) -> Recipe:
    """Keys with their dots written as two underscores."""
    return tiny.recipe({key.replace("__", "."): value for key, value in values.items()})


def tuned(
    backbone: nn.Module,
    folder: Path,
    *,
    prompt: dict[str, Tensor] | None = None,
    settled: Recipe | None = None,
    label_map: tuple[int, ...] | None = None,
    compute: Compute = tiny.COMPUTE,
    dense: nn.Module | None = None,
) -> Tuned:
    return tune(
        backbone, tiny.data(), prompt=prompt, dense=Dense(dense or backbone, label_map), classifier="linear",
        mask={}, label_map=label_map, recipe=settled or recipe(), compute=compute,
        journal=tiny.journal(folder), display=tiny.QUIET,
    )  # fmt: skip


def learned(kind: str = "pad", value: float = 0.3) -> dict[str, Tensor]:
    """A prompt's state as a search may leave it."""
    canvas = build_canvas(recipe(prompt__pixels__kind=kind), prompted=True)
    assert canvas.prompt is not None
    with torch.no_grad():
        for parameter in canvas.prompt.parameters():
            parameter.fill_(value)
    return prompt_state(Prompted(canvas, nn.Identity(), tiny.COMPUTE))


def equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return set(first) == set(second) and all(torch.equal(first[name], second[name]) for name in first)


def test_weights_and_prompt_learn_and_what_came_stays(tmp_path: Path) -> None:
    backbone, prompt = tiny.network(), learned()
    before = tiny.snapshot(backbone)
    result = tuned(backbone, tmp_path, prompt=prompt)
    assert tiny.snapshot(backbone) == before
    assert equal(prompt, learned())
    for name, value in result.backbone.state_dict().items():
        assert not torch.equal(value, backbone.state_dict()[name]), name
    assert set(result.prompt) == set(prompt)
    for name, value in result.prompt.items():
        assert not torch.equal(value, prompt[name]), name


@pytest.mark.parametrize("kind", ["pad", "fix", "random"])
def test_the_prompt_starts_where_the_search_left_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """None: no prompt; empty: from zero; a state: from there."""
    starts: list[dict[str, Tensor]] = []
    monkeypatch.setattr(module, "train_weights", lambda network, *_, **__: starts.append(prompt_state(network)))
    settled = recipe(prompt__pixels__kind=kind)
    for prompt in (None, {}, learned(kind)):
        result = tuned(tiny.network(), tmp_path, prompt=prompt, settled=settled)
        assert equal(dict(result.prompt), starts[-1])
    assert starts[0] == {}
    assert equal(starts[1], learned(kind, value=0.0))
    assert equal(starts[2], learned(kind))


def test_without_a_kind_there_is_no_prompt(tmp_path: Path) -> None:
    assert tuned(tiny.network(), tmp_path, prompt={}, settled=recipe(prompt__pixels__kind="none")).prompt == {}


def test_arms_see_the_same_images_in_the_same_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With and without prompt, dense or cut: the pixels before the canvas are the same."""
    seen: list[list[Tensor]] = []
    place = module.add_prompt

    def recording(*args: Any, **values: Any) -> Any:
        canvas, mine = place(*args, **values), []
        canvas.register_forward_pre_hook(lambda _, args: mine.append(args[0]))
        original = canvas.place
        monkeypatch.setattr(canvas, "place", lambda image, *, prompted: (mine.append(image), original(image))[1])
        seen.append(mine)
        return canvas

    monkeypatch.setattr(module, "add_prompt", recording)
    tuned(tiny.network(), tmp_path / "dense")
    tuned(tiny.network(), tmp_path / "dense+prompt", prompt={})
    tuned(pruned(tiny.network()), tmp_path / "pruned", prompt=learned())
    first = seen[0]
    assert len(first) == 2 * (4 + 1)  # of each epoch: the steps, and the validation
    for other in seen[1:]:
        assert len(other) == len(first) and all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[0], first[5])  # another epoch, another order


def pruned(backbone: nn.Module) -> nn.Module:
    groups = tiny.groups_of(backbone).prunable
    mask = ChannelMask({group.root: tuple(i % 2 == 0 for i in range(group.width)) for group in groups})
    return cut(backbone, plan(backbone, groups, mask))


def test_the_smaller_network_trains(tmp_path: Path) -> None:
    small = pruned(tiny.network())
    result = tuned(small, tmp_path, prompt={})
    assert result.backbone.get_submodule("conv1").weight.shape == (4, 3, 3, 3)
    assert {k: v.shape for k, v in result.backbone.state_dict().items()} == {
        k: v.shape for k, v in small.state_dict().items()
    }


def test_the_label_map_stays_and_the_loss_is_taken_behind_it(tmp_path: Path) -> None:
    backbone = tiny.network(classes=6)
    settled = recipe(tune__weight_decay=0.0)
    result = tuned(backbone, tmp_path, label_map=(4, 0, 2), settled=settled)
    assert result.label_map == (4, 0, 2)
    old, new = (network.get_parameter("linear.weight") for network in (backbone, result.backbone))
    moved = [not torch.equal(a, b) for a, b in zip(old, new, strict=True)]
    assert moved == [True, False, True, False, True, False]  # a row that stands for no class gets no gradient


def test_what_is_handed_on_is_at_rest(tmp_path: Path) -> None:
    result = tuned(
        tiny.network(), tmp_path, prompt={}, compute=Compute(torch.device("cpu"), bf16=True, channels_last=True)
    )
    assert not any(module.training for module in result.backbone.modules())
    for name, tensor in [*result.backbone.named_parameters(), *result.prompt.items()]:
        assert tensor.dtype == torch.float32 and tensor.is_contiguous(), name
    assert not any(value.requires_grad for value in result.prompt.values())


def test_the_prompt_helps_where_the_frame_is_all_that_is_read(tmp_path: Path) -> None:
    """The prompt alone learns: every class but one is told by the frame's brightness, which the images cannot change."""
    settled = recipe(tune__epochs=4, tune__prompt_lr=0.5)
    network = Prompted(build_canvas(settled, prompted=True), FrameReader(), tiny.COMPUTE)
    before = float(network.canvas.place(torch.zeros(1, 3, tiny.SIZE, tiny.SIZE))[0, :, 0].detach().mean())
    result = tuned(FrameReader(), tmp_path, prompt={}, settled=settled)
    assert before == 0
    assert float(result.prompt["top"].mean()) > 0.05


class FrameReader(nn.Module):
    """Says class 0 the less, the brighter the frame: two of three images are of another class."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, tiny.CLASSES, bias=False)
        with torch.no_grad():
            self.linear.weight.copy_(torch.tensor([[-1.0], [1.0], [1.0]]))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x[:, :, 0].mean((1, 2))[:, None])


# --- distillation -----------------------------------------------------------------------------------------------------


def prompted(network: nn.Module) -> Prompted:
    return Prompted(build_canvas(recipe(), prompted=False), network, tiny.COMPUTE).eval()


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_the_divergence_is_that_of_softened_outputs(temperature: float) -> None:
    images = torch.rand(4, 3, tiny.SIZE, tiny.SIZE, generator=torch.Generator().manual_seed(0))
    network = prompted(tiny.network())
    of = Teacher(asked_every_step(network), share=0.5, temperature=temperature)
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    found = of.divergence(logits, images, torch.arange(4))
    p = (network(images).detach() / temperature).softmax(dim=1).double()
    q = (logits.detach() / temperature).softmax(dim=1).double()
    assert float(found.detach()) == pytest.approx(float((p * (p / q).log()).sum() / 4) * temperature**2, rel=1e-4)
    (gradient,) = torch.autograd.grad(found, logits)
    assert torch.allclose(gradient, (temperature * (q - p) / 4).float(), rtol=1e-4, atol=1e-7)


def test_a_network_does_not_differ_from_itself() -> None:
    network, images = prompted(tiny.network()), torch.rand(4, 3, tiny.SIZE, tiny.SIZE)
    of = Teacher(asked_every_step(network), share=0.5, temperature=2.0)
    assert abs(float(of.divergence(network(images).detach(), images, torch.arange(4)))) < 1e-6


@pytest.mark.parametrize("mirrored", [False, True])
def test_what_is_remembered_is_of_the_image_and_its_mirror_image(mirrored: bool) -> None:
    network, images = prompted(tiny.network()), tiny.data().train
    assert images.pixels is not None
    outputs, x = asked_once(network, images, mirrored=mirrored), images.pixels / 255
    with torch.no_grad():
        expected = (network(x) + network(x.flip(3))) / 2 if mirrored else network(x)
    places = torch.tensor([5, 0, 5, 11])
    elsewhere = torch.rand(4, 3, tiny.SIZE, tiny.SIZE)  # what the batch looks like does not matter
    torch.testing.assert_close(outputs(elsewhere, places), expected[places])


@pytest.mark.parametrize(
    "when, augment, forwards", [("every-step", "flip", 2 * 4), ("once", "flip", 2), ("once", "crop", 1)]
)
def test_how_often_the_dense_network_is_asked(tmp_path: Path, when: str, augment: str, forwards: int) -> None:
    """28 images in batches of 8, for two epochs; to remember them, they fit one batch."""
    dense, asked = tiny.network(seed=3), []
    dense.register_forward_hook(lambda *_: asked.append(1))
    settled = recipe(tune__distill=0.5, tune__epochs=2, tune__batch_size=8, tune__teacher=when, data__augment=augment)
    tuned(pruned(tiny.network()), tmp_path, settled=settled, dense=dense)
    assert len(asked) == forwards


def test_distilled_weights_come_nearer_to_the_dense_outputs(tmp_path: Path) -> None:
    """Labels alone, and the dense network alone: what each is nearer to."""
    dense = tiny.network(seed=3)
    with torch.no_grad():
        dense.get_submodule("linear").get_parameter("bias").copy_(torch.tensor([2.0, 0, -2]))  # as no label says
    before = tiny.snapshot(dense)
    canvas, pixels = build_canvas(recipe(), prompted=False), tiny.data().train.pixels
    assert pixels is not None
    x = canvas(pixels / 255)
    distance = {}
    for share in (0.0, 1.0):
        settled = recipe(tune__distill=share, tune__epochs=6, tune__weight_lr=0.05)
        result = tuned(pruned(tiny.network()), tmp_path / str(share), settled=settled, dense=dense)
        with torch.no_grad():
            distance[share] = float((result.backbone(x).softmax(1) - dense(x).softmax(1)).abs().mean())
    assert distance[1.0] < 0.7 * distance[0.0]
    assert tiny.snapshot(dense) == before


def test_a_share_of_nothing_asks_no_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Teacher, "divergence", lambda *_: pytest.fail("it was asked"))
    tuned(tiny.network(), tmp_path, settled=recipe(tune__distill=0.0, tune__temperature=7.0))
