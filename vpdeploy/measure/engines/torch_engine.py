"""torch itself: operation by operation, compiled, and as CUDA graphs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from vpdeploy.measure.engines.base import EngineError, Session, Setting, Subject

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
RECOMPILES = 256  # networks in one measurement: as many as torch lets one code object have in all


def check_torch(setting: Setting) -> None:
    """Raises: EngineError for a device or a precision that is not there."""
    _device(setting)


def _device(setting: Setting) -> torch.device:
    graphs = setting.engine == "torch-cudagraphs"
    name = setting.device or ("cuda:0" if graphs else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name) or (graphs and name == "cpu"):
        expected = "'cuda:N'" if graphs else "'cpu' or 'cuda:N'"
        raise EngineError(f"engine {setting.engine}: got device {name!r}; expected {expected}")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise EngineError(
                f"engine {setting.engine}: torch {torch.__version__} sees {count} GPUs here, and {name} was asked for; choose "
                "another engine, or a machine that has it"
            )
    elif setting.precision == "fp16":
        raise EngineError(f"engine {setting.engine}: fp16 on a CPU is slower than fp32; expected fp32 or bf16 there")
    return device


@contextmanager
def settings_of_torch(setting: Setting) -> Iterator[None]:
    """For one measurement: threads are torch's own for the whole process, and what is trained later shall have its own again.
    Networks of one class share their code, and beyond a limit of them torch would run the others uncompiled, and not say so.
    """
    threads = torch.get_num_threads()
    limits = {"recompile_limit": RECOMPILES, "fail_on_recompile_limit_hit": True}
    try:
        with torch._dynamo.config.patch(limits) if setting.engine == "torch-compile" else nullcontext():
            yield
    finally:
        torch.set_num_threads(threads)


def open_torch(subject: Subject, setting: Setting) -> Session:
    """Threads and TF32 are torch's own for the whole process: all networks of one measurement run under one setting.

    Raises: EngineError for a device that is not there, or a network that cannot be compiled.
    """
    device, dtype = _device(setting), DTYPES[setting.precision]
    network = subject.network(setting).eval().requires_grad_(False).to(device)
    torch.set_num_threads(setting.threads)
    forward: Callable[[Tensor], Tensor] = _in_precision(network, dtype)
    if setting.engine == "torch-compile":
        torch._dynamo.reset()
        forward = torch.compile(forward, dynamic=False)
    elif setting.engine == "torch-cudagraphs":
        forward = _graphed(forward, device)

    def run(x: Tensor) -> Tensor:
        with torch.inference_mode():
            logits = forward(x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return logits

    return Session(
        run=run,
        about=_about(setting, device),
        prepare=lambda images: torch.from_numpy(images).to(device),
        result=lambda logits: logits.float().cpu().numpy(),
    )


class _In(nn.Module):
    """A network in another precision than what is around it."""

    def __init__(self, network: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.network, self.dtype = network.to(dtype), dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.to(self.dtype))


def _in_precision(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Images are placed, prompted and normalised in float32, as in training; the backbone behind that is in ``dtype``."""
    if dtype == torch.float32:
        return network
    backbone = getattr(network, "backbone", None)
    if backbone is None:
        return _In(network, dtype)
    network.backbone = _In(backbone, dtype)
    return network


def _graphed(forward: Callable[[Tensor], Tensor], device: torch.device) -> Callable[[Tensor], Tensor]:
    """``forward`` as one CUDA graph for each input shape: launching kernels one by one would hide what they take."""
    graphs: dict[Any, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def replayed(x: Tensor) -> Tensor:
        key = (tuple(x.shape), x.dtype)
        if key not in graphs:
            given, stream = x.clone(), torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(3):
                    forward(given)
            torch.cuda.current_stream(device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = forward(given)
            graphs[key] = (graph, given, logits)
        graph, given, logits = graphs[key]
        given.copy_(x)
        graph.replay()
        return logits

    return replayed


def _about(setting: Setting, device: torch.device) -> dict[str, Any]:
    about: dict[str, Any] = {
        "engine": setting.engine,
        "torch": torch.__version__,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "precision": setting.precision,
    }
    if device.type == "cuda":
        about["gpu"] = torch.cuda.get_device_name(device)
        about["tf32"] = {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32}
        about["inputs"] = "on the device before a run begins"
    return about
