"""What the caller set for all of torch, out of the way while something is analysed, cut or proved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def undisturbed() -> Iterator[None]:
    """Without autocast and inference mode, and with float32 and the CPU as the defaults, however the caller has them; all put
    back.

    Under autocast masked and removed differ by bfloat16's rounding; tensors of inference mode could not be tuned.
    """
    before, device = torch.get_default_dtype(), torch.get_default_device()
    torch.set_default_dtype(torch.float32)
    if device.type != "cpu":
        torch.set_default_device(None)
    try:
        with (
            torch.inference_mode(False),
            torch.autocast("cpu", enabled=False),
            torch.autocast("cuda", enabled=False),
        ):
            yield
    finally:
        torch.set_default_dtype(before)
        if device.type != "cpu":
            torch.set_default_device(device)
