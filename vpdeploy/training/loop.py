"""The loop of every stage that learns: epochs, batches, one state and one record after each epoch, and going on after a crash."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from vpdeploy.data.augment import augment
from vpdeploy.data.prepared import Images, batches
from vpdeploy.errors import VpdeployError
from vpdeploy.progress import Display
from vpdeploy.run_folder import Journal
from vpdeploy.training.evaluate import accuracy
from vpdeploy.training.network import Prompted, TrainingData, restart_prompt, to_pixels
from vpdeploy.training.streams import seeded, stream
from vpdeploy.values import EpochRecord


@dataclass(frozen=True)
class Course:
    """How often and in what order images come. ``streams`` names the random streams: stages that share it see the same data in
    the same order; ``label`` stands before a progress bar. A course that is one part of a stage has ``earlier`` epochs before it,
    of ``total`` in all parts.
    """

    streams: str
    seed: int
    epochs: int
    batch_size: int
    augment: str
    remedy: str  # for a loss that is not finite
    label: str = ""
    earlier: int = 0
    total: int | None = None


class Learner(Protocol):
    """What learns from batches: a network, and whatever it keeps beside it."""

    @property
    def network(self) -> Prompted: ...

    def begin_epoch(self, epoch: int) -> None: ...

    def step(self, images: Tensor, labels: Tensor, *, places: Tensor, done: float) -> Tensor:
        """Learn from one batch, [n, 3, s, s] in [0, 1] and [n]; gives its loss. ``places`` [n]: which training images these are;
        ``done``: the share of all steps before it.
        """
        ...

    def values(self) -> tuple[Tensor, ...]:
        """What the network takes beside images when it is evaluated."""
        ...

    def state(self) -> dict[str, Any]: ...

    def load(self, state: dict[str, Any]) -> None: ...


def train(learner: Learner, data: TrainingData, *, course: Course, journal: Journal, display: Display) -> None:
    """Let ``learner`` go through ``course``. After every epoch its state is saved; a stage found half done goes on after its
    last finished epoch, bit for bit as if it had never stopped (on one machine, with one thread count).

    Raises: VpdeployError when the loss is not finite.
    """
    state = journal.resume()
    start = 0
    if state is not None:
        learner.load(state)
        start = state["epoch"]
    for epoch in range(start, course.epochs):
        restart_prompt(learner.network.canvas, seed=course.seed, stage=course.streams, epoch=epoch)
        learner.begin_epoch(epoch)
        with seeded(course.seed, course.streams, epoch):
            loss, seconds, images = _epoch(learner, data.train, course=course, epoch=epoch, display=display)
        record = EpochRecord(
            stage=journal.stage,
            epoch=course.earlier + epoch + 1,
            epochs=course.total or course.epochs,
            loss=loss,
            accuracy_val=accuracy(learner.network, data.val, *learner.values()),
            seconds=seconds,
            images_per_second=images / seconds,
        )
        journal.save({**learner.state(), "epoch": epoch + 1}, record)
        display.say(
            f"{record.stage}  epoch {record.epoch}/{record.epochs}  loss {record.loss:.4f}  "
            f"val top-1 {record.accuracy_val:.2%}  {record.seconds:.1f} s  {record.images_per_second:.0f} images/s"
        )
    learner.network.eval()


def _epoch(
    learner: Learner, images: Images, *, course: Course, epoch: int, display: Display
) -> tuple[float, float, int]:
    """One pass over the training images: its mean loss, its seconds, and how many they were."""
    network = learner.network
    network.train()
    count = images_per_epoch(len(images), course.batch_size)
    steps = math.ceil(count / course.batch_size)
    device = network.compute.device
    total, began = torch.zeros((), device=device), time.perf_counter()
    walk = training_batches(
        images, course.batch_size, seed=course.seed, stage=course.streams, epoch=epoch, how=course.augment
    )
    with display.bar(walk, label=f"{course.label}epoch {epoch + 1}/{course.epochs}", total=steps) as bar:
        for step, (pixels, labels, places) in enumerate(bar):
            done = (epoch * steps + step) / (course.epochs * steps)
            loss = learner.step(to_pixels(pixels, device), labels.to(device), places=places, done=done)
            total += loss.detach() * len(labels)
    return _finite(float(total) / count, course.remedy), time.perf_counter() - began, count


def images_per_epoch(count: int, batch_size: int) -> int:
    """How many of ``count`` images one epoch trains on: a last batch of one image is left out.

    From one image alone a norm on a 1x1 map has nothing to compute a variance from, and torch refuses it.
    """
    lone = count % batch_size == 1 and count > batch_size > 1
    return count - lone


def training_batches(
    images: Images, batch_size: int, *, seed: int, stage: str, epoch: int, how: str
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """One epoch's batches, shuffled and augmented: uint8 [n, 3, s, s], labels and places among ``images``, both int64 [n]. Order
    and augmentation have their own streams, so that changing one leaves the other.
    """
    order = torch.randperm(len(images), generator=stream(seed, stage, epoch, "order"))
    order = order[: images_per_epoch(len(images), batch_size)]
    generator = stream(seed, stage, epoch, "augment")
    for (pixels, labels), places in zip(batches(images, order, batch_size), order.split(batch_size), strict=True):
        yield augment(pixels, how, generator=generator), labels, places


def _finite(loss: float, remedy: str) -> float:
    """``loss``. Raises: VpdeployError when it is not finite, before the epoch's state replaces the last good one."""
    if not math.isfinite(loss):
        raise VpdeployError(
            f"training: the loss became {loss}; expected a number: the steps are too large, try {remedy}"
        )
    return loss
