"""Watching what a forward does, below autograd: operation by operation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vpdeploy.models.copies import Convert, on_cpu, on_meta


class Watch(TorchDispatchMode):
    """Sees every operation; what it does with them is for subclasses to say, in ``__torch_dispatch__``."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here; the wrapper that would hide this mode imports torch._dynamo, 5 s


@contextmanager
def unfused_attention() -> Iterator[None]:
    """nn.MultiheadAttention and nn.TransformerEncoder as plain operations: the fused one hides its products."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def cheapest_first(example: Tensor) -> Iterator[tuple[Convert, Tensor]]:
    """Where a forward may show what it does: how to copy the network there, and ``example``. On meta tensors there is no
    arithmetic; a forward that needs numbers runs in float32 on the CPU.
    """
    yield on_meta, example.to("meta")
    yield on_cpu(torch.float32), example.detach().to("cpu", torch.float32)
