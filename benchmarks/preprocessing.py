"""The exported preprocessing against Pillow and torchvision transforms: one image of 500x375 to 224.

Ours is the uint8 form exported around a network that gives its input back, so the file holds resize and normalisation
alone, run by ONNX Runtime. The reference is what is usually written: Resize, (CenterCrop,) ToTensor, Normalize on a
Pillow image. Both start from decoded pixels in memory.

    uv run python benchmarks/preprocessing.py [--threads 1 2] [--seconds 3]
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from side_by_side import print_machine, print_ratio
from torch import nn
from torchvision import transforms

from vpdeploy.deploy.bake import Deployable
from vpdeploy.deploy.onnx_file import to_onnx
from vpdeploy.measure.engines.onnxruntime_engine import ort_session
from vpdeploy.prompts.canvas import Canvas

SIDE, BOUND = 224, 0.5
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HOWS = ("stretch", "shorter-side-crop")


def usual_transform(how: str) -> transforms.Compose:
    """Pillow image -> float32 [3, 224, 224], as torchvision's users write it."""
    sizing = (
        [transforms.Resize((SIDE, SIDE))]
        if how == "stretch"
        else [transforms.Resize(SIDE), transforms.CenterCrop(SIDE)]
    )
    return transforms.Compose([*sizing, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = sorted({1, len(os.sched_getaffinity(0))})
    options.add_argument("--threads", type=int, nargs="+", default=every, help="of ONNX Runtime and torch")
    options.add_argument("--seconds", type=float, default=3, help="of each of the two")
    chosen = options.parse_args()
    coarse = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    photograph = Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC)
    print_machine()
    with tempfile.TemporaryDirectory() as folder:
        for how in HOWS:
            path = Path(folder) / f"{how}.onnx"
            canvas = Canvas(SIDE, SIDE, mean=MEAN, std=STD, prompt=None)
            deployable = Deployable(nn.Identity(), canvas, form="uint8", image_size=SIDE, resize_how=how).eval()
            to_onnx(deployable, path, opset=18, metadata={})
            for threads in chosen.threads:
                compare(path, deployable, photograph, threads=threads, seconds=chosen.seconds)


def compare(path: Path, deployable: Deployable, photograph: Image.Image, *, threads: int, seconds: float) -> None:
    """Time one exported file against the usual transform; the file must do the same work as ``deployable``."""
    torch.set_num_threads(threads)
    how, feed = deployable.resize.how, {"image": np.array(photograph)[None]}
    session, transform = ort_session(path, threads=threads), usual_transform(how)
    (ours,) = session.run(None, feed)
    wanted = deployable(torch.from_numpy(feed["image"])).numpy()
    assert np.abs(np.asarray(ours) - wanted).max() < 1e-4, "the exported file does other work"
    print_ratio(
        f"{photograph.width}x{photograph.height} -> {SIDE}, {how}, batch 1, threads {threads}",
        lambda: session.run(None, feed),
        lambda: transform(photograph),
        bound=BOUND,
        seconds=seconds,
    )


if __name__ == "__main__":
    main()
