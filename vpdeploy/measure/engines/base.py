"""What an engine is: something that opens a network under a setting, runs it, and says what it really used."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from vpdeploy.errors import VpdeployError

if TYPE_CHECKING:
    from torch import nn

PRECISIONS = ("fp32", "fp16", "bf16")
ENOUGH = 30


class EngineError(VpdeployError):
    """An engine is not there, would not do what was asked, or did something else."""


@dataclass(frozen=True)
class Setting:
    """How a network is run. ``threads`` are those of one inference; on a GPU they only feed it.

    ``device``: of the engine, such as "cuda:1"; "" is its first. ``precision``: of weights and activations, where the
    engine can choose; a file otherwise runs in what it holds.
    """

    engine: str = "onnxruntime-cpu"
    threads: int = 1
    batch: int = 1
    device: str = ""
    precision: str = "fp32"


@dataclass(frozen=True)
class Subject:
    """A network to be run: its file, the torch module that the file came from, or both."""

    path: Path | None = None
    module: Callable[[], nn.Module] | None = None

    def file(self, setting: Setting) -> Path:
        """Raises: EngineError without a file; VpdeployError when it is not there."""
        if self.path is None:
            raise EngineError(
                f"engine {setting.engine}: runs ONNX files; expected an exported one: `vpdeploy export` first"
            )
        if not self.path.is_file():
            raise VpdeployError(f"{self.path}: no such file; expected an exported model: run `vpdeploy export` first")
        return self.path

    def network(self, setting: Setting) -> nn.Module:
        """Raises: EngineError without a module."""
        self.check_module(setting)
        assert self.module is not None
        return self.module()

    def check_module(self, setting: Setting) -> None:
        """Raises: EngineError without one."""
        if self.module is None:
            raise EngineError(
                f"engine {setting.engine}: runs torch modules, and a file of itself holds none; expected a run folder, or one "
                "of the engines that run files: onnxruntime-cpu, onnxruntime-cuda, onnxruntime-tensorrt, openvino-cpu"
            )


class Run(Protocol):
    """Images [n, ...] to logits [n, classes]; returns when the result is there."""

    def __call__(self, images: NDArray[Any]) -> NDArray[Any]: ...


@dataclass(frozen=True)
class Session:
    """An opened network. ``about``: engine, its version, device and provider actually used, threads, precision: plain data.

    ``prepare`` brings images to where the engine wants them; ``run`` is what is timed; ``result`` brings logits back.
    """

    run: Callable[[Any], Any]
    about: Mapping[str, Any]
    prepare: Callable[[NDArray[Any]], Any] = field(default=lambda images: images)
    result: Callable[[Any], NDArray[Any]] = field(default=lambda logits: logits)

    def __call__(self, images: NDArray[Any]) -> NDArray[Any]:
        return self.result(self.run(self.prepare(images)))


Open = Callable[[Subject, Setting], Session]


def only_fp32(setting: Setting) -> None:
    """Raises: EngineError where another precision is asked of an engine that runs what the file holds."""
    if setting.precision != "fp32":
        raise EngineError(
            f"engine {setting.engine}: got precision {setting.precision}; expected fp32: it runs what the file holds"
        )


def only_device(setting: Setting, *names: str) -> None:
    """Raises: EngineError for a device that the engine does not run on."""
    if setting.device not in ("", *names):
        raise EngineError(
            f"engine {setting.engine}: got device {setting.device!r}; expected {' or '.join(map(repr, names))}, or none"
        )


def enough(runs: int, seconds: float) -> Iterator[None]:
    """A first turn, and then ``runs`` more, and as many as ``seconds`` take, up to ENOUGH: a profile notes every operation."""
    yield
    begin, done = time.perf_counter(), 0
    while done < runs or (done < ENOUGH and time.perf_counter() - begin < seconds):
        yield
        done += 1
