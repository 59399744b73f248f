"""The loop of stages 0 and 2: what decays, how rates fall, which images it sees, and what it says when it fails."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import CLOSED_FORM_FLOAT32
from torch import nn

from vpdeploy.errors import VpdeployError
from vpdeploy.run_folder import read_history
from vpdeploy.training import loop, weights
from vpdeploy.training.loop import images_per_epoch, training_batches
from vpdeploy.training.network import Prompted, TrainingData, build_canvas, set_learning_rates
from vpdeploy.training.weights import WeightSchedule, freeze_all_but, train_weights

Groups = list[dict[str, Any]]


def schedule(**values: Any) -> WeightSchedule:
    plain: dict[str, Any] = {
        "streams": "tune", "seed": 7, "epochs": 2, "batch_size": 8, "optimizer": "sgd", "weight_lr": 0.1,
        "prompt_lr": 0.02, "weight_decay": 0.5, "label_smoothing": 0.0, "augment": "none",
    }  # fmt: skip
    return WeightSchedule(**{**plain, **values})


def prompted(backbone: nn.Module | None = None, *, prompt: bool = True) -> Prompted:
    canvas = build_canvas(tiny.recipe(), prompted=prompt)
    return Prompted(canvas, tiny.network() if backbone is None else backbone, tiny.COMPUTE)


def train(network: Prompted, folder: Path, *, how: WeightSchedule, data: TrainingData | None = None) -> Prompted:
    return train_weights(network, data or tiny.data(), schedule=how, journal=tiny.journal(folder), display=tiny.QUIET)


@pytest.fixture
def optimizers(monkeypatch: pytest.MonkeyPatch) -> list[torch.optim.Optimizer]:
    """Every optimizer that the loop makes."""
    made: list[torch.optim.Optimizer] = []
    original: Callable[..., torch.optim.Optimizer] = weights._optimizer

    def kept(*args: Any) -> torch.optim.Optimizer:
        made.append(original(*args))
        return made[-1]

    monkeypatch.setattr(weights, "_optimizer", kept)
    return made


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_prompt_norms_and_biases_do_not_decay(
    name: str, optimizers: list[torch.optim.Optimizer], tmp_path: Path
) -> None:
    network = prompted()
    train(network, tmp_path, how=schedule(optimizer=name))
    (optimizer,) = optimizers
    assert isinstance(optimizer, {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name])
    names = {id(p): n for n, p in network.named_parameters()}
    decay = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert set(decay) == {n for n, _ in network.named_parameters()}  # nothing is forgotten, nothing twice
    assert len(decay) == sum(len(group["params"]) for group in optimizer.param_groups)
    heavy = {f"backbone.{layer}.weight" for layer in ("conv1", "conv2", "linear")}
    assert decay == {n: 0.5 if n in heavy else 0.0 for n in decay}
    if name == "sgd":
        assert all(group["momentum"] == 0.9 for group in optimizer.param_groups)


def test_decay_alone_shrinks_the_weights_and_leaves_the_rest(tmp_path: Path) -> None:
    """At a rate of 1e-30 no gradient shows, and one step is w * (1 - rate * decay): a closed form."""
    network, before, rate = prompted(), tiny.network(), 1e-30
    train(network, tmp_path, how=schedule(epochs=1, batch_size=28, weight_lr=rate, prompt_lr=rate, weight_decay=1e29))
    after = dict(network.backbone.named_parameters())
    for name, old in before.named_parameters():
        expected = 0.9 * old if old.ndim > 1 else old
        torch.testing.assert_close(after[name], expected, rtol=CLOSED_FORM_FLOAT32, atol=1e6 * rate, msg=name)


def test_only_what_requires_a_gradient_is_trained(optimizers: list[torch.optim.Optimizer], tmp_path: Path) -> None:
    network = prompted(prompt=False)
    freeze_all_but(network.backbone, network.backbone.get_submodule("linear"))
    train(network, tmp_path, how=schedule())
    trained = {id(p) for group in optimizers[0].param_groups for p in group["params"]}
    assert trained == {id(p) for p in network.backbone.get_submodule("linear").parameters()}
    assert all(p.grad is None for n, p in network.backbone.named_parameters() if not n.startswith("linear"))


@given(st.floats(0, 1), st.floats(1e-4, 1))
def test_rates_fall_as_a_cosine_from_peak_to_zero(done: float, peak: float) -> None:
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)]}, {"params": []}], lr=1)
    set_learning_rates(optimizer, peaks=(peak, 2 * peak), done=done)
    first, second = (group["lr"] for group in optimizer.param_groups)
    assert math.isclose(first, peak * math.cos(math.pi * done / 2) ** 2, rel_tol=1e-9, abs_tol=1e-12)
    assert second == 2 * first


def test_every_step_has_its_place_on_the_cosine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """28 images in batches of 8 are 4 steps; over two epochs the share done rises by an eighth each."""
    seen: list[tuple[tuple[float, ...], float]] = []
    monkeypatch.setattr(weights, "set_learning_rates", lambda _, *, peaks, done: seen.append((tuple(peaks), done)))
    train(prompted(), tmp_path, how=schedule())
    assert seen == [((0.1, 0.1, 0.02), step / 8) for step in range(8)]


# --- which images -----------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 12))
def test_an_epoch_sees_every_image_once_but_never_one_alone(count: int, batch_size: int) -> None:
    images = tiny.images(count, seed=0)
    walked = [labels for _, labels, _ in training_batches(images, batch_size, seed=1, stage="fit", epoch=0, how="none")]
    seen = sum(len(labels) for labels in walked)
    assert seen == images_per_epoch(count, batch_size)
    assert len(walked) == math.ceil(seen / batch_size)
    assert seen >= count - 1
    if batch_size > 1 and count > 1:
        assert all(len(labels) > 1 for labels in walked)
    else:
        assert seen == count


class AtOnePixel(nn.Module):
    """As a ResNet on small images: its last norm sees a map of 1x1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(3, 4, tiny.CANVAS), nn.BatchNorm2d(4), nn.Linear(4, tiny.CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.norm(self.conv(x)).flatten(1))


def test_one_image_over_does_not_end_the_training(tmp_path: Path) -> None:
    data = TrainingData(tiny.images(17, seed=0), tiny.images(9, seed=1), tiny.CLASSES)
    network = train(prompted(AtOnePixel()), tmp_path, how=schedule(), data=data)
    assert all(bool(p.isfinite().all()) for p in network.parameters())
    assert [record.epoch for record in read_history(tiny.journal(tmp_path).history_file)] == [1, 2]


def test_the_loss_is_the_mean_over_the_images(tmp_path: Path) -> None:
    """At rates of 0 the network stands still: batches of 8, 8, 8 and 4 give what all 28 images give at once."""
    network = prompted(nn.Sequential(nn.Flatten(), nn.Linear(3 * tiny.CANVAS**2, tiny.CLASSES)))
    data = tiny.data()
    train(network, tmp_path, how=schedule(epochs=1, batch_size=8, weight_lr=0.0, prompt_lr=0.0), data=data)
    pixels = data.train.pixels
    assert pixels is not None
    with torch.no_grad():
        expected = nn.functional.cross_entropy(network(pixels / 255), data.train.labels)
    (record,) = read_history(tiny.journal(tmp_path).history_file)
    assert record.loss == pytest.approx(float(expected), rel=CLOSED_FORM_FLOAT32)
    assert record.accuracy_val in [correct / 9 for correct in range(10)]
    assert (record.epoch, record.epochs, record.stage) == (1, 1, "stage")
    assert record.images_per_second == pytest.approx(28 / record.seconds)


# --- failure ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_an_error_and_the_last_state_stays(tmp_path: Path, poison: float) -> None:
    class Poisoned(nn.Module):
        """Fails from the second epoch on: 4 training steps and 1 evaluation come before it."""

        def __init__(self) -> None:
            super().__init__()
            self.linear, self.calls = nn.Linear(3, tiny.CLASSES), 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            logits = self.linear(x.mean((2, 3)))
            return logits if self.calls <= 5 else logits.index_fill(1, torch.tensor([0]), poison)

    with pytest.raises(VpdeployError) as error:
        train(prompted(Poisoned()), tmp_path, how=schedule())
    assert str(error.value) == (
        "training: the loss became nan; expected a number: the steps are too large, try a smaller weight_lr"
    )
    state = tiny.journal(tmp_path).resume()
    assert state is not None and state["epoch"] == 1
    assert all(bool(t.isfinite().all()) for t in state["network"].values())


def test_finite_gives_the_loss_back() -> None:
    assert loop._finite(2.5, "") == 2.5
    for loss in (float("inf"), float("-inf"), float("nan")):
        with pytest.raises(VpdeployError, match=f"the loss became {loss}; .*try a smaller step"):
            loop._finite(loss, "a smaller step")
