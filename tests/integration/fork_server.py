"""Run commands of vpdeploy in forks of one process that has imported everything, one order (a JSON line) at a time.

A process cannot be stopped at an exact place from outside, so the fork does to itself what the order says.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.backends.backend_svg
import onnxscript
import sklearn.datasets
import torch

from vpdeploy import cli, pipeline
from vpdeploy.deploy.bake import Deployable
from vpdeploy.deploy.onnx_file import to_onnx
from vpdeploy.prompts.canvas import Canvas
from vpdeploy.report import render

LOADED = (matplotlib.backends.backend_svg, onnxscript, sklearn.datasets, pipeline, render)
CANVAS = Canvas(8, 8, mean=(0, 0, 0), std=(1, 1, 1), prompt=None)
with TemporaryDirectory() as exports:  # the exporter's first use imports for seconds, and a resize is exported once
    images = Deployable(torch.nn.Identity(), CANVAS, form="uint8", image_size=8, resize_how="stretch")
    to_onnx(images.eval(), Path(exports) / "images.onnx", opset=18, metadata={})


def arrange(at: str, nth: int, what: str) -> None:
    """Let ``what`` happen at the ``nth`` file whose path ends in ``at``, as it is put into place."""
    replace, seen = Path.replace, 0

    def put(self: Path, target: Path) -> Path:
        nonlocal seen
        seen += str(target).endswith(at)
        now = seen == nth and str(target).endswith(at)
        if now and what == "kill before":
            os.kill(os.getpid(), signal.SIGKILL)
        if now and what == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        put_there = replace(self, target)
        if now and what == "interrupt after":
            os.kill(os.getpid(), signal.SIGINT)
        return put_there

    Path.replace = put  # type: ignore[method-assign]


def in_fork(order: dict) -> None:
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(Path(order["folder"]) / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits that it is ignored
    if order["what"]:
        arrange(order["at"], order["nth"], order["what"])
    sys.argv = ["vpdeploy", *order["arguments"]]
    try:
        cli.main()
        status = 0
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        in_fork(json.loads(line))
    _, ended = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(ended), flush=True)
