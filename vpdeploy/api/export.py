"""Any model behind its preprocessing as one ONNX file, proved against torch."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vpdeploy import run_folder
from vpdeploy.deploy.bake import FORMS, ConstantPrompt, Deployable, Form
from vpdeploy.deploy.onnx_file import to_onnx
from vpdeploy.deploy.parity import BATCHES, check_parity
from vpdeploy.deploy.session import describe_input
from vpdeploy.errors import ModelError
from vpdeploy.models.plain import plain
from vpdeploy.prompts.canvas import Canvas
from vpdeploy.recipe.tables import IMAGENET_MEAN, IMAGENET_STD
from vpdeploy.surgery.trace import told
from vpdeploy.values import Certificate, Parity

RESIZES = ("stretch", "shorter-side-crop")


@dataclass(frozen=True)
class ExportSpec:
    """What surrounds the backbone in the exported file.

    ``form`` "uint8": images as they come, [n, h, w, 3], resized inside ("stretch" or "shorter-side-crop"); "float": resized
    by the caller, [n, 3, image_size, image_size] in [0, 1]. ``prompt``: [3, canvas_size, canvas_size], added on the canvas.
    ``certificate``: goes into the file's metadata, as JSON. ``metadata``: further text entries of the file.

    Raises: ModelError listing what does not fit together.
    """

    classes: Sequence[str]
    image_size: int = 224
    canvas_size: int | None = None
    resize: str = "stretch"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    form: Form = "uint8"
    prompt: Tensor | None = None
    opset: int = 18
    certificate: Certificate | None = None
    metadata: Mapping[str, str] | None = None

    @property
    def canvas(self) -> int:
        """The side of what the backbone sees."""
        return self.canvas_size or self.image_size

    def __post_init__(self) -> None:
        problems = []
        if self.canvas < self.image_size:
            problems.append(f"canvas_size: got {self.canvas}; expected image_size ({self.image_size}) or more")
        if self.form not in FORMS:
            problems.append(f"form: got {self.form!r}; expected one of {', '.join(FORMS)}")
        if self.resize not in RESIZES:
            problems.append(f"resize: got {self.resize!r}; expected one of {', '.join(RESIZES)}")
        if self.prompt is not None and list(self.prompt.shape) != [3, self.canvas, self.canvas]:
            problems.append(f"prompt: got {list(self.prompt.shape)}; expected [3, {self.canvas}, {self.canvas}]")
        if taken := sorted(set(self.metadata or {}) & set(_about(self))):
            problems.append(f"metadata: got {', '.join(taken)}; expected names that vpdeploy does not write itself")
        if problems:
            raise ModelError(f"spec: {'; '.join(problems)}")


def _about(spec: ExportSpec) -> dict[str, str]:
    """What vpdeploy itself says of the file."""
    about = describe_input(
        form=spec.form if spec.form in FORMS else FORMS[0], classes=spec.classes, image_size=spec.image_size,
        canvas_size=spec.canvas, resize=spec.resize, mean=spec.mean, std=spec.std, version=version("vpdeploy"),
    )  # fmt: skip
    return about if spec.certificate is None else {**about, "certificate": run_folder.dump_line(spec.certificate)}


def export_onnx(
    model: nn.Module, spec: ExportSpec, path: Path | str, *, images: Sequence[np.ndarray] | None = None
) -> Parity:
    """Write ``model`` behind its preprocessing as one ONNX file, and prove that ONNX Runtime computes what torch does.

    images: uint8 [h, w, 3] each, for the proof; None: 32 that are made up. They must not all get the same logits. Nothing is
    at ``path`` before the proof holds.

    Raises: ModelError when it cannot be exported; ParityError when the file disagrees, or the proof would prove nothing.
    """
    network = copy.deepcopy(plain(model, where="model")).to("cpu", torch.float32)
    network = network.to(memory_format=torch.contiguous_format).eval()
    _check_logits(network, spec)
    prompt = None if spec.prompt is None else ConstantPrompt(spec.prompt.detach().to("cpu", torch.float32))
    canvas = Canvas(spec.image_size, spec.canvas, mean=spec.mean, std=spec.std, prompt=prompt)
    deployable = Deployable(network, canvas, form=spec.form, image_size=spec.image_size, resize_how=spec.resize)
    deployable.eval().requires_grad_(False)
    shown = made_up_pictures(spec.image_size) if images is None else list(images)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / Path(path).name
        to_onnx(deployable, file, opset=spec.opset, metadata={**_about(spec), **(spec.metadata or {})})
        enough = max(len(shown), *BATCHES)  # the largest batch is made of as many images
        parity, _ = check_parity(deployable, file, images=shown, vector_bytes=0, at_least=enough)
        run_folder.write_bytes(Path(path), file.read_bytes())
    return parity


def _check_logits(network: nn.Module, spec: ExportSpec) -> None:
    """Raises: ModelError when ``network`` does not give one logit for each class on the canvas."""
    side, classes = spec.canvas, len(spec.classes)
    try:
        with torch.no_grad():
            logits = network(torch.zeros(2, 3, side, side))
    except Exception as e:
        raise ModelError(
            f"model: {type(network).__name__} does not take 3x{side}x{side} input: {told(e)}; set spec.image_size or "
            "spec.canvas_size to what it needs"
        ) from e
    if not isinstance(logits, Tensor) or tuple(logits.shape) != (2, classes):
        got = list(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise ModelError(
            f"model: {type(network).__name__} gives {got} for 2 images; expected logits [2, {classes}], one for each of "
            "spec.classes"
        )


def made_up_pictures(side: int) -> list[np.ndarray]:
    """32 pictures of waves in many colours, directions and scales, so that logits differ: uint8 [side, side, 3]."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:side, 0:side] / side
    made = []
    for _ in range(32):
        waves = [np.sin(2 * np.pi * (a * x + b * y + c)) for a, b, c in rng.normal(scale=4, size=(3, 3))]
        picture = np.stack(waves, axis=-1) * rng.uniform(20, 120) + rng.uniform(40, 215, size=3)
        made.append(
            np.clip(picture + rng.normal(scale=rng.uniform(0, 30), size=picture.shape), 0, 255).astype(np.uint8)
        )
    return made
