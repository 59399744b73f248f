"""Stage 0: what learns, what stays bit for bit, and the label map that comes with it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from vpdeploy.recipe.tables import Recipe
from vpdeploy.training.fit import at_rest, fit, map_by_frequency
from vpdeploy.training.network import Compute, Prompted, TrainingData, build_canvas
from vpdeploy.values import Dense


def recipe(**values: Any) -> Recipe:
    """Keys with their dots written as two underscores."""
    return tiny.recipe({key.replace("__", "."): value for key, value in values.items()})


def fitted(backbone: nn.Module, folder: Path, *, settled: Recipe, data: TrainingData | None = None) -> Dense:
    return fit(
        backbone, data or tiny.data(), recipe=settled, classifier="linear", compute=tiny.COMPUTE,
        journal=tiny.journal(folder, "fit"), display=tiny.QUIET,
    )  # fmt: skip


def changed(before: nn.Module, after: nn.Module) -> set[str]:
    """The tensors that differ in a bit."""
    new = after.state_dict()
    return {name for name, tensor in before.state_dict().items() if not torch.equal(tensor, new[name])}


def test_all_changes_every_tensor(tmp_path: Path) -> None:
    backbone = tiny.network()
    dense = fitted(backbone, tmp_path, settled=recipe(fit__what="all"))
    assert changed(backbone, dense.backbone) == set(backbone.state_dict())
    assert dense.label_map is None


def test_head_changes_the_head_alone(tmp_path: Path) -> None:
    backbone = tiny.network()
    dense = fitted(backbone, tmp_path, settled=recipe(fit__what="head"))
    parameters = {name for name, _ in backbone.named_parameters()}
    assert changed(backbone, dense.backbone) & parameters == {"linear.weight", "linear.bias"}


def test_none_changes_nothing(tmp_path: Path) -> None:
    backbone = tiny.network()
    settled = recipe(fit__what="none", model__weights="source.th")
    dense = fitted(backbone, tmp_path, settled=settled)
    assert dense.backbone is not backbone
    assert changed(backbone, dense.backbone) == set()
    assert list(tmp_path.iterdir()) == []  # no epoch, no state


def test_fit_learns_the_classes(tmp_path: Path) -> None:
    """The images' colour tells their class: six epochs are enough for most of them, by chance it would be a third."""
    from vpdeploy.training.evaluate import accuracy

    settled = recipe(fit__what="all", fit__epochs=6, data__augment="none")
    dense = fitted(tiny.network(), tmp_path, settled=settled)
    network = Prompted(build_canvas(settled, prompted=False), dense.backbone, tiny.COMPUTE)
    assert accuracy(network, tiny.data().val) >= 8 / 9


def test_the_same_call_gives_the_same_bits(tmp_path: Path) -> None:
    settled = recipe(fit__what="all")
    first, second = (
        fitted(tiny.network(dropout=0.3), tmp_path / name, settled=settled).backbone for name in ("first", "second")
    )
    assert changed(first, second) == set()
    other = fitted(tiny.network(dropout=0.3), tmp_path / "third", settled=recipe(fit__what="all", seed=8)).backbone
    assert "conv1.weight" in changed(first, other)


def test_what_is_handed_on_is_at_rest(tmp_path: Path) -> None:
    backbone = tiny.network()
    compute = Compute(torch.device("cpu"), bf16=True, channels_last=True)
    dense = fit(
        backbone, tiny.data(), recipe=recipe(fit__what="head"), classifier="linear", compute=compute,
        journal=tiny.journal(tmp_path, "fit"), display=tiny.QUIET,
    )  # fmt: skip
    assert not any(module.training for module in dense.backbone.modules())
    for name, parameter in dense.backbone.named_parameters():
        assert parameter.requires_grad and parameter.dtype == torch.float32 and parameter.is_contiguous(), name


def test_at_rest_keeps_every_value() -> None:
    backbone = tiny.network()
    moved = at_rest(tiny.network().to(memory_format=torch.channels_last).requires_grad_(False).train())
    assert changed(backbone, moved) == set()
    assert all(p.requires_grad for p in moved.parameters())


# --- label maps -------------------------------------------------------------------------------------------------------


class ByColour(nn.Module):
    """Predicts source class ``answers[c]`` for an image in which colour c is the brightest."""

    def __init__(self, *answers: int, sources: int):
        super().__init__()
        self.linear = nn.Linear(3, sources, bias=False)
        with torch.no_grad():
            self.linear.weight.zero_()
            for colour, source in enumerate(answers):
                self.linear.weight[source, colour] = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.mean((2, 3)))


def prompted(backbone: nn.Module) -> Prompted:
    settled = recipe(input__mean=[0.0, 0.0, 0.0], input__std=[1.0, 1.0, 1.0])
    return Prompted(build_canvas(settled, prompted=False), backbone, tiny.COMPUTE)


def test_the_map_is_what_the_network_says_most_often() -> None:
    network = prompted(ByColour(4, 0, 2, sources=6)).train()
    assert map_by_frequency(network, tiny.data()) == (4, 0, 2)
    assert network.training  # as it was


def test_a_map_has_an_entry_for_a_class_without_training_images() -> None:
    """As data.limit_train leaves it. The network says 4, 0, 2 for the others: what is left first is source 1."""
    whole = tiny.data()
    data = dataclasses.replace(whole, classes=4)
    assert int(data.train.labels.max()) == 2
    found = map_by_frequency(prompted(ByColour(4, 0, 2, sources=6)), data)
    assert found == (4, 0, 2, 1)


def test_a_network_may_call_its_own_part_backbone() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.linear = nn.Identity(), ByColour(4, 0, 2, sources=6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(self.backbone(x))

    assert map_by_frequency(prompted(Wrapped()), tiny.data()) == (4, 0, 2)


@pytest.mark.parametrize("head", ["flm", "ilm"])
@pytest.mark.parametrize("what", ["none", "all"])
def test_fit_hands_on_the_map_of_the_network_that_came(tmp_path: Path, head: str, what: str) -> None:
    settled = recipe(
        model__head=head, model__weights="source.th", fit__what=what,
        input__mean=[0.0, 0.0, 0.0], input__std=[1.0, 1.0, 1.0],
    )  # fmt: skip
    dense = fitted(ByColour(4, 0, 2, sources=6), tmp_path, settled=settled)
    assert dense.label_map == (4, 0, 2)
    assert isinstance(dense.backbone, ByColour) and dense.backbone.linear.out_features == 6


def test_a_map_takes_its_rows_of_the_logits() -> None:
    backbone = tiny.network(classes=6)
    plain, mapped = prompted(backbone).eval(), prompted(backbone).eval()
    mapped.map_labels((4, 0, 2))
    images = torch.rand(2, 3, tiny.SIZE, tiny.SIZE)
    assert torch.equal(mapped(images), plain(images)[:, [4, 0, 2]])
    assert torch.equal(mapped.source_logits(images), plain(images))
