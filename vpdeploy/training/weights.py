"""Training weights, and a prompt beside them: stages 0 and 2, and search methods that train weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vpdeploy.progress import Display
from vpdeploy.run_folder import Journal
from vpdeploy.training.loop import Course, train
from vpdeploy.training.network import Prompted, TrainingData, prompt_parameters, set_learning_rates
from vpdeploy.training.teacher import Teacher


@dataclass(frozen=True)
class WeightSchedule:
    """How weights are trained. ``streams`` names the random streams: arms that share it see the same data in the same order."""

    streams: str
    seed: int
    epochs: int
    batch_size: int
    optimizer: str
    weight_lr: float
    prompt_lr: float
    weight_decay: float
    label_smoothing: float
    augment: str
    decays: bool = True  # along a cosine to 0; else all rates stay as they are
    earlier: int = 0  # epochs of the stage that were trained before
    total: int | None = None  # epochs of the stage, where it has several parts


def train_weights(
    network: Prompted,
    data: TrainingData,
    *,
    schedule: WeightSchedule,
    journal: Journal,
    display: Display,
    gates: tuple[Tensor, ...] = (),
    before_step: Callable[[], None] | None = None,
    after_step: Callable[[], object] | None = None,
    teacher: Teacher | None = None,
) -> Prompted:
    """Train whatever of ``network`` requires a gradient, in place, and return it in eval mode. It goes on where it stopped.

    gates: values that a gated backbone takes. before_step: is called when gradients are there and nothing has moved yet;
    after_step: when all has moved.
    teacher: whose outputs take part in the loss.
    Raises: VpdeployError when the loss is not finite.
    """
    course = Course(
        streams=schedule.streams,
        seed=schedule.seed,
        epochs=schedule.epochs,
        batch_size=schedule.batch_size,
        augment=schedule.augment,
        remedy="a smaller weight_lr",
        earlier=schedule.earlier,
        total=schedule.total,
    )
    learner = _Weights(network, schedule, _optimizer(network, schedule), gates, before_step, after_step, teacher)
    train(learner, data, course=course, journal=journal, display=display)
    return network.eval()


@dataclass(frozen=True)
class _Weights:
    network: Prompted
    schedule: WeightSchedule
    optimizer: torch.optim.Optimizer
    gates: tuple[Tensor, ...]
    before_step: Callable[[], None] | None
    after_step: Callable[[], object] | None
    teacher: Teacher | None

    def begin_epoch(self, epoch: int) -> None:
        pass

    def step(self, images: Tensor, labels: Tensor, *, places: Tensor, done: float) -> Tensor:
        peaks = (self.schedule.weight_lr, self.schedule.weight_lr, self.schedule.prompt_lr)  # of the optimizer's groups
        set_learning_rates(self.optimizer, peaks=peaks, done=done if self.schedule.decays else 0.0)
        logits = self.network(images, *self.gates)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.schedule.label_smoothing)
        if self.teacher is not None:
            loss = (
                self.teacher.share * self.teacher.divergence(logits, images, places) + (1 - self.teacher.share) * loss
            )
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if self.before_step is not None:
            self.before_step()
        self.optimizer.step()
        if self.after_step is not None:
            self.after_step()
        return loss

    def values(self) -> tuple[Tensor, ...]:
        return self.gates

    def state(self) -> dict[str, Any]:
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])


def _optimizer(network: Prompted, schedule: WeightSchedule) -> torch.optim.Optimizer:
    """Three groups: weights with decay; norms and biases without; the prompt without, at its own rate."""
    prompt = prompt_parameters(network)
    trainable = [p for p in network.backbone.parameters() if p.requires_grad and all(p is not own for own in prompt)]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
        {"params": prompt, "weight_decay": 0.0},
    ]
    if schedule.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=schedule.weight_lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=schedule.weight_lr)


def freeze_all_but(backbone: nn.Module, layer: nn.Module) -> None:
    """Let only ``layer`` learn."""
    backbone.requires_grad_(False)
    layer.requires_grad_(True)
