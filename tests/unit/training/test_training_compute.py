"""Where and how training runs: what is asked for stays, what "auto" becomes is measured and written down."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from vpdeploy import workbench
from vpdeploy.errors import VpdeployError
from vpdeploy.recipe.tables import Recipe
from vpdeploy.recipe.writing import with_values
from vpdeploy.stages import Stage
from vpdeploy.training import compute
from vpdeploy.training.compute import GAIN, choose_compute, find_device
from vpdeploy.training.evaluate import EVALUATION_BATCH, accuracy, predict
from vpdeploy.training.network import Compute, Prompted, build_canvas

CPU = torch.device("cpu")


def recipe(**values: Any) -> Recipe:
    asked = {f"compute.{key}": value for key, value in {"device": "cpu", **values}.items()}
    return tiny.recipe(asked)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[bool, bool], float]:
    """Seconds of a step by (bf16, channels_last), instead of a measurement; a candidate that is absent must not be tried."""
    seconds: dict[tuple[bool, bool], float] = {}
    monkeypatch.setattr(compute, "_step_seconds", lambda _, __, c, **kw: seconds[c.bf16, c.channels_last])
    return seconds


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("layout", ["no", "yes"])
def test_what_is_asked_for_stays(measured: dict[tuple[bool, bool], float], precision: str, layout: str) -> None:
    assert not measured  # nothing may be tried
    found = choose_compute(tiny.network(), recipe=recipe(precision=precision, channels_last=layout))
    assert found == Compute(CPU, bf16=precision == "bf16", channels_last=layout == "yes")


def test_fp32_asked_for_stays_fp32_however_slow_it_is(measured: dict[tuple[bool, bool], float]) -> None:
    measured |= {(False, False): 9.0, (False, True): 1.0, (True, True): 0.001}
    found = choose_compute(tiny.network(), recipe=recipe(precision="fp32"))
    assert found == Compute(CPU, bf16=False, channels_last=True)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ((1.0, 2.0, 0.5), (True, True)),
        ((1.0, 0.5, 0.6), (False, True)),
        ((1.0, 1.1, GAIN + 0.01), (False, False)),  # too little for the loss of precision
        ((1.0, GAIN, 2.0), (False, False)),
    ],
)
def test_auto_takes_the_fastest_that_pays(
    measured: dict[tuple[bool, bool], float], seconds: tuple[float, float, float], expected: tuple[bool, bool]
) -> None:
    measured |= dict(zip([(False, False), (False, True), (True, True)], seconds, strict=True))
    found = choose_compute(tiny.network(), recipe=recipe())
    assert (found.bf16, found.channels_last) == expected


def test_a_layout_asked_for_holds_for_both_precisions(measured: dict[tuple[bool, bool], float]) -> None:
    measured |= {(False, False): 1.0, (True, False): 0.5}
    assert choose_compute(tiny.network(), recipe=recipe(channels_last="no")) == Compute(CPU, True, False)


@pytest.mark.parametrize(("per_image", "batch"), [(2.0, 4), (0.05, 10), (1e-5, 128)])
def test_slow_steps_are_timed_with_fewer_images(monkeypatch: pytest.MonkeyPatch, per_image: float, batch: int) -> None:
    """A step of ResNet-50 with 128 images of 224 pixels takes two cores a minute."""
    seen: list[int] = []

    def step(_: object, __: object, ___: object, *, batch: int, **kw: object) -> float:
        seen.append(batch)
        return per_image * batch

    monkeypatch.setattr(compute, "_step_seconds", step)
    choose_compute(tiny.network(), recipe=with_values(recipe(), {"tune.batch_size": 128}))
    assert seen == [4, batch, batch, batch]
    gpu = Compute(torch.device("cuda"), False, False)
    assert compute._batch_in_time(tiny.network(), with_values(recipe(), {"tune.batch_size": 128}), gpu) == 128


def test_a_measurement_is_a_number_and_leaves_the_network_alone() -> None:
    backbone = tiny.network()
    before = tiny.snapshot(backbone)
    for bf16, last in ((False, False), (True, True)):
        assert compute._step_seconds(backbone, recipe(), Compute(CPU, bf16, last), batch=2, seconds=0.0) > 0
    assert tiny.snapshot(backbone) == before


def test_what_auto_became_is_in_the_run_folder_and_not_measured_again_once_training_began(
    measured: dict[tuple[bool, bool], float], tmp_path: Path
) -> None:
    measured |= {(False, False): 1.0, (False, True): 1.0, (True, True): 0.5}
    asked = tiny.recipe({"model.name": "cifar_resnet8", "data.limit_train": 30})
    work = workbench.open_workbench(asked, tmp_path, redo=None, display=tiny.QUIET)
    written = tomllib.loads((tmp_path / "recipe.toml").read_text())["compute"]
    expected = {"device": "cuda" if torch.cuda.is_available() else "cpu", "precision": "bf16", "channels_last": "yes"}
    assert written == {**expected, "workers": work.recipe.compute.workers}
    assert isinstance(written["workers"], int)
    other = tiny.recipe({"model.name": "cifar_resnet8", "data.limit_train": 30, "compute.precision": "fp32"})
    workbench.open_workbench(other, tmp_path, redo=None, display=tiny.QUIET)  # a trial, of which nothing is kept
    assert workbench.open_workbench(asked, tmp_path, redo=None, display=tiny.QUIET).recipe == work.recipe
    work.ledger.begin(Stage("fit"), work.recipe)
    measured.clear()
    again = workbench.open_workbench(asked, tmp_path, redo=None, display=tiny.QUIET)
    assert again.recipe == work.recipe
    assert again.compute() == work.compute()


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "warp drive"])
def test_a_device_that_is_not_there_is_an_error(name: str) -> None:
    with pytest.raises(VpdeployError) as error:
        find_device(name)
    message = str(error.value)
    assert message.startswith(f"compute.device: got {name!r}, which is not usable here (")
    assert message.endswith("); expected 'auto' or 'cpu'") and "\n" not in message


def test_devices() -> None:
    assert find_device("cpu") == CPU
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


# --- the network under autocast, and evaluation -----------------------------------------------------------------------


class Recording(nn.Module):
    """The tiny network; keeps the type of what its convolution gave, and of what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.network = tiny.network()
        self.seen: list[tuple[torch.dtype, torch.dtype]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append((x.dtype, self.network.get_submodule("conv1")(x).dtype))
        return self.network(x)


@pytest.mark.parametrize("last", [False, True])
def test_autocast_covers_the_backbone_in_training_alone(last: bool) -> None:
    backbone = Recording()
    network = Prompted(build_canvas(tiny.recipe(), prompted=True), backbone, Compute(CPU, True, last)).train()
    logits = network(torch.rand(4, 3, tiny.SIZE, tiny.SIZE))
    assert backbone.seen == [(torch.float32, torch.bfloat16)]  # the canvas is float32
    assert logits.dtype == torch.float32
    network.eval()(torch.rand(4, 3, tiny.SIZE, tiny.SIZE))
    assert backbone.seen[1:] == [(torch.float32, torch.float32)]
    assert all(p.dtype == torch.float32 for p in network.parameters())


def test_evaluation_is_float32_and_puts_the_mode_back() -> None:
    backbone = Recording()
    canvas = build_canvas(tiny.recipe(), prompted=True)
    fast, plain = (Prompted(canvas, backbone, Compute(CPU, bf16, False)) for bf16 in (True, False))
    images = tiny.data().val
    found = predict(fast.train(), images)
    assert fast.training and backbone.training
    assert backbone.seen == [(torch.float32, torch.float32)]
    assert torch.equal(found, predict(plain.eval(), images))
    assert not plain.training
    assert found.dtype == torch.int64 and found.shape == (9,)


def test_predictions_are_in_the_order_of_the_images_over_all_batches() -> None:
    count = EVALUATION_BATCH + 44
    images = tiny.images(count, seed=3)
    network = Prompted(build_canvas(tiny.recipe(), prompted=False), tiny.network(), tiny.COMPUTE).eval()
    assert images.pixels is not None
    with torch.no_grad():
        expected = network(images.pixels / 255).argmax(dim=1)
    assert torch.equal(predict(network, images), expected)
    assert accuracy(network, images) == int((expected == images.labels).sum()) / count


def test_evaluation_shows_the_prompt() -> None:
    """A frame that is switched off would be another network (and a better or worse one)."""
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(3 * tiny.CANVAS**2, 2, bias=False))
    canvas = build_canvas(tiny.recipe(), prompted=True)
    network = Prompted(canvas, backbone, tiny.COMPUTE).eval()
    frame = torch.ones(3, tiny.CANVAS, tiny.CANVAS)
    frame[:, 2:-2, 2:-2] = 0
    weight = next(backbone.parameters())
    with torch.no_grad():
        weight.copy_(torch.stack([torch.zeros_like(frame), frame]).flatten(1))
        assert canvas.prompt is not None
        assert predict(network, tiny.data().val).tolist() == [0] * 9
        for parameter in canvas.prompt.parameters():
            parameter.fill_(1.0)
    assert predict(network, tiny.data().val).tolist() == [1] * 9
