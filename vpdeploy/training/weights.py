"""The loop that trains weights (and a prompt beside them): stage 0 and stage 2 are the same loop."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vpdeploy.data.augment import augment
from vpdeploy.data.prepared import Images, batches
from vpdeploy.errors import VpdeployError
from vpdeploy.progress import Display
from vpdeploy.run_folder import Journal
from vpdeploy.training.evaluate import accuracy
from vpdeploy.training.network import Prompted, TrainingData, restart_prompt, set_learning_rates, to_pixels
from vpdeploy.training.streams import seeded, stream
from vpdeploy.values import EpochRecord


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


def train_weights(
    network: Prompted, data: TrainingData, *, schedule: WeightSchedule, journal: Journal, display: Display
) -> Prompted:
    """Train whatever of ``network`` requires a gradient, in place, and return it in eval mode.

    After every epoch the state is saved; a stage found half done goes on after its last finished epoch, bit for bit as if
    it had never stopped (on one machine, with one thread count).

    Raises: VpdeployError when the loss is not finite.
    """
    optimizer = _optimizer(network, schedule)
    state = journal.resume()
    start = 0
    if state is not None:
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["epoch"]
    for epoch in range(start, schedule.epochs):
        restart_prompt(network.canvas, seed=schedule.seed, stage=schedule.streams, epoch=epoch)
        with seeded(schedule.seed, schedule.streams, epoch):
            done = _epoch(network, data.train, optimizer, schedule=schedule, epoch=epoch, display=display)
        state = {"network": network.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
        note_epoch(journal, state, done=done, accuracy_val=accuracy(network, data.val), display=display)
    return network.eval()


def _epoch(
    network: Prompted,
    images: Images,
    optimizer: torch.optim.Optimizer,
    *,
    schedule: WeightSchedule,
    epoch: int,
    display: Display,
) -> EpochDone:
    """One pass over the training images."""
    network.train()
    count = images_per_epoch(len(images), schedule.batch_size)
    steps = math.ceil(count / schedule.batch_size)
    peaks = (schedule.weight_lr, schedule.weight_lr, schedule.prompt_lr)  # of the optimizer's groups
    total, began = torch.zeros((), device=network.compute.device), time.perf_counter()
    walk = training_batches(
        images, schedule.batch_size, seed=schedule.seed, stage=schedule.streams, epoch=epoch, how=schedule.augment
    )
    with display.bar(walk, label=f"epoch {epoch + 1}/{schedule.epochs}", total=steps) as bar:
        for step, (pixels, labels) in enumerate(bar):
            set_learning_rates(optimizer, peaks=peaks, done=(epoch * steps + step) / (schedule.epochs * steps))
            logits = network(to_pixels(pixels, network.compute.device))
            loss = F.cross_entropy(logits, labels.to(logits.device), label_smoothing=schedule.label_smoothing)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(labels)
    loss = finite(float(total) / count, "a smaller weight_lr")
    return EpochDone(epoch, schedule.epochs, loss, time.perf_counter() - began, images=count)


def images_per_epoch(count: int, batch_size: int) -> int:
    """How many of ``count`` images one epoch trains on: a last batch of one image is left out.

    From one image alone a norm on a 1x1 map has nothing to compute a variance from, and torch refuses it.
    """
    lone = count % batch_size == 1 and count > batch_size > 1
    return count - lone


def training_batches(
    images: Images, batch_size: int, *, seed: int, stage: str, epoch: int, how: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch's batches, shuffled and augmented: (uint8 [n, 3, s, s], int64 [n]). Order and augmentation have their own
    streams, so that changing one leaves the other.
    """
    order = torch.randperm(len(images), generator=stream(seed, stage, epoch, "order"))
    order = order[: images_per_epoch(len(images), batch_size)]
    generator = stream(seed, stage, epoch, "augment")
    for pixels, labels in batches(images, order, batch_size):
        yield augment(pixels, how, generator=generator), labels


def _optimizer(network: Prompted, schedule: WeightSchedule) -> torch.optim.Optimizer:
    """Three groups: weights with decay; norms and biases without; the prompt without, at its own rate."""
    trainable = [p for p in network.backbone.parameters() if p.requires_grad]
    prompt = [] if network.canvas.prompt is None else list(network.canvas.prompt.parameters())
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": schedule.weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
        {"params": prompt, "weight_decay": 0.0},
    ]
    if schedule.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=schedule.weight_lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=schedule.weight_lr)


def finite(loss: float, remedy: str) -> float:
    """``loss``. Raises: VpdeployError when it is not finite, before the epoch's state replaces the last good one."""
    if not math.isfinite(loss):
        raise VpdeployError(
            f"training: the loss became {loss}; expected a number: the steps are too large, try {remedy}"
        )
    return loss


@dataclass(frozen=True)
class EpochDone:
    """One pass over the training images: which, of how many, its mean loss, and what it took."""

    epoch: int
    epochs: int
    loss: float
    seconds: float
    images: int


def note_epoch(
    journal: Journal, state: Mapping[str, object], *, done: EpochDone, accuracy_val: float, display: Display
) -> None:
    """Save what the stage goes on from, write the epoch down, and tell it."""
    record = EpochRecord(
        stage=journal.stage,
        epoch=done.epoch + 1,
        epochs=done.epochs,
        loss=done.loss,
        accuracy_val=accuracy_val,
        seconds=done.seconds,
        images_per_second=done.images / done.seconds,
    )
    journal.save(state, record)
    display.say(
        f"{record.stage}  epoch {record.epoch}/{record.epochs}  loss {record.loss:.4f}  "
        f"val top-1 {record.accuracy_val:.2%}  {record.seconds:.1f} s  {record.images_per_second:.0f} images/s"
    )


def freeze_all_but(backbone: nn.Module, layer: nn.Module) -> None:
    """Let only ``layer`` learn."""
    backbone.requires_grad_(False)
    layer.requires_grad_(True)
