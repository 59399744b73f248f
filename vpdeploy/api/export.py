"""Any model behind its preprocessing as one ONNX file, proved against torch."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vpdeploy import run_folder
from vpdeploy.api.context import undisturbed
from vpdeploy.api.pruning import network_of
from vpdeploy.api.scores import listed
from vpdeploy.deploy.bake import FORMS, ConstantPrompt, Deployable, Form
from vpdeploy.deploy.onnx_file import to_onnx
from vpdeploy.deploy.parity import BATCHES, check_parity
from vpdeploy.deploy.session import describe_input
from vpdeploy.errors import ModelError
from vpdeploy.models.attention.replace import replace_attention
from vpdeploy.models.tokens.fold import fold
from vpdeploy.prompts.canvas import Canvas
from vpdeploy.recipe.tables import IMAGENET_MEAN, IMAGENET_STD
from vpdeploy.surgery.plan import tensor_shapes
from vpdeploy.surgery.plan_check import written_by
from vpdeploy.surgery.trace import told
from vpdeploy.values import Certificate, Parity

RESIZES = ("stretch", "shorter-side-crop")
LEAST_OPSET = 18  # what the exporter writes; it does not go below without a word
# What vpdeploy writes itself, here or into the files of a run, and reads again.
RESERVED = {
    "vpdeploy_version", "form", "classes", "image_size", "canvas_size", "resize", "mean", "std", "input", "output",
    "certificate", "recipe_sha256", "arm", "max_pixels",
}  # fmt: skip


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
        problems = list(_wrong_sizes(self))
        sized = not problems
        if sized and self.canvas < self.image_size:
            problems.append(f"canvas_size: got {self.canvas}; expected image_size ({self.image_size}) or more")
        if self.form not in FORMS:
            problems.append(f"form: got {self.form!r}; expected one of {', '.join(FORMS)}")
        if self.resize not in RESIZES:
            problems.append(f"resize: got {self.resize!r}; expected one of {', '.join(RESIZES)}")
        if sized and self.prompt is not None:
            problems += _wrong_prompt(self.prompt, self.canvas)
        problems += [*_wrong_colours(self), *_wrong_texts(self)]
        if not _is_whole(self.opset, least=LEAST_OPSET):
            problems.append(f"opset: got {self.opset!r}; expected {LEAST_OPSET} or a later one")
        if self.certificate is not None and not isinstance(self.certificate, Certificate):
            got = type(self.certificate).__name__
            problems.append(f"certificate: got a {got}; expected that of prune_once(...)")
        if problems:
            raise ModelError(f"spec: {'; '.join(problems)}")


def _is_whole(value: object, *, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _wrong_sizes(spec: ExportSpec) -> Iterator[str]:
    for name, size in (("image_size", spec.image_size), ("canvas_size", spec.canvas_size)):
        if not (_is_whole(size, least=1) or (name == "canvas_size" and size is None)):
            yield f"{name}: got {size!r}; expected a whole number from 1"


def _wrong_prompt(prompt: object, side: int) -> Iterator[str]:
    if not isinstance(prompt, Tensor):
        yield f"prompt: got a {type(prompt).__name__}; expected a tensor [3, {side}, {side}]"
    elif list(prompt.shape) != [3, side, side]:
        yield f"prompt: got {list(prompt.shape)}; expected [3, {side}, {side}]"
    elif not bool(prompt.isfinite().all()):
        yield "prompt: got values that are not finite; expected numbers"


def _wrong_colours(spec: ExportSpec) -> Iterator[str]:
    for name, values in (("mean", spec.mean), ("std", spec.std)):
        numbers = isinstance(values, Sequence) and all(
            type(v) is not bool and isinstance(v, int | float) for v in values
        )
        if not numbers or len(values) != 3 or not all(map(math.isfinite, values)):
            yield f"{name}: got {values!r}; expected 3 numbers, one for each colour"
        elif name == "std" and min(values) <= 0:
            yield f"std: got {values!r}; expected numbers above 0"


def _wrong_texts(spec: ExportSpec) -> Iterator[str]:
    classes, metadata = spec.classes, {} if spec.metadata is None else spec.metadata
    if not _are_texts(classes) or not classes:
        yield f"classes: got {_short(classes)}; expected a list of names, one for each logit"
    if not isinstance(metadata, Mapping) or not _are_texts([*metadata, *metadata.values()]):
        yield f"metadata: got {_short(metadata)}; expected a mapping of text to text"
    elif taken := sorted(RESERVED & metadata.keys()):
        yield f"metadata: got {', '.join(taken)}; expected names that vpdeploy does not write itself"


def _are_texts(values: object) -> bool:
    return isinstance(values, Sequence) and not isinstance(values, str) and all(isinstance(v, str) for v in values)


def _short(value: object) -> str:
    return text if len(text := repr(value)) <= 80 else f"{text[:80]}..."


def _about(spec: ExportSpec) -> dict[str, str]:
    """What vpdeploy itself says of the file."""
    about = describe_input(
        form=spec.form, classes=spec.classes, image_size=spec.image_size, canvas_size=spec.canvas, resize=spec.resize,
        mean=spec.mean, std=spec.std, version=version("vpdeploy"),
    )  # fmt: skip
    return about if spec.certificate is None else {**about, "certificate": run_folder.dump_line(spec.certificate)}


@undisturbed()
def export_onnx(
    model: nn.Module, spec: ExportSpec, path: Path | str, *, images: Sequence[np.ndarray] | None = None
) -> Parity:
    """Write ``model`` behind its preprocessing as one ONNX file, and prove that ONNX Runtime computes what torch does.

    Of a vision transformer's last block the file computes what is read of it; the proof is against ``model`` as it is.
    images: uint8 [h, w, 3] each, for the proof; None: 32 that are made up. They must not all get the same logits. Nothing is
    at ``path`` before the proof holds.

    Raises: ModelError when it cannot be exported; ParityError when the file disagrees, or the proof would prove nothing.
    """
    if not isinstance(spec, ExportSpec):
        raise ModelError(f"spec: got a {type(spec).__name__}; expected a vpdeploy.ExportSpec")
    shown = made_up_pictures(spec.image_size) if images is None else _pictures(images)
    network = copy.deepcopy(network_of(model)).to("cpu", torch.float32)
    network = network.to(memory_format=torch.contiguous_format).eval()
    _check_logits(network, spec)
    if spec.certificate is not None:
        _check_certificate(spec.certificate, network)
    prompt = None if spec.prompt is None else ConstantPrompt(spec.prompt.detach().to("cpu", torch.float32))
    canvas = Canvas(spec.image_size, spec.canvas, mean=spec.mean, std=spec.std, prompt=prompt)
    shipped = copy.deepcopy(replace_attention(network, torch.zeros(1, 3, spec.canvas, spec.canvas)).network)
    fold(shipped, canvas_size=spec.canvas)
    given, deployable = (_deployable(of, canvas, spec) for of in (network, shipped))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / Path(path).name
        to_onnx(deployable, file, opset=spec.opset, metadata={**_about(spec), **(spec.metadata or {})})
        enough = max(len(shown), *BATCHES)  # the largest batch is made of as many images
        parity, _ = check_parity(given, file, images=shown, vector_bytes=0, at_least=enough)
        run_folder.write_bytes(Path(path), file.read_bytes())
    return parity


def _deployable(network: nn.Module, canvas: Canvas, spec: ExportSpec) -> Deployable:
    made = Deployable(network, canvas, form=spec.form, image_size=spec.image_size, resize_how=spec.resize)
    return made.eval().requires_grad_(False)


def _pictures(images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Raises: ModelError for what are no pictures as a camera gives them."""
    expected = "expected a list of uint8 arrays [h, w, 3], RGB"
    if not isinstance(images, Sequence | np.ndarray):
        raise ModelError(f"images: got a {type(images).__name__}; {expected}")
    for number, image in enumerate(images):
        if not isinstance(image, np.ndarray):
            raise ModelError(f"images: number {number} is a {type(image).__name__}; {expected}")
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or image.size == 0:
            raise ModelError(f"images: number {number} is {list(image.shape)} of {image.dtype}; {expected}")
    return list(images)


def _check_certificate(certificate: Certificate, network: nn.Module) -> None:
    """Raises: ModelError when the widths of ``network`` are not those that it records.

    A channel of a group may be several outputs of its layer, and it does not say how many. So these need only be a multiple
    of what is kept, unless all layers that were cut are as wide as before: then this is the network before the cut.
    """
    wrong, whole = [], []
    shapes = tensor_shapes(network)
    for record in certificate.groups:
        written = written_by(network, record.root)
        if written is None:
            wrong.append(f"it has no {record.root}")
        elif not written.ranges and record.kept < record.width:  # ranges count the channels before the cut
            sizes = [shapes[written.tensor][axis] for axis in written.axes]
            whole.append(record.width in sizes)
            if all(size % max(1, record.kept) for size in sizes):
                wrong.append(f"{record.root} has {sizes[0]} outputs, and keeps {record.kept} channels there")
    if whole and all(whole):
        wrong.append("none of its layers is cut")
    if wrong:
        raise ModelError(
            f"spec.certificate: not of this {type(network).__name__}: {listed(wrong)}; expected that of the network which is "
            "exported, as prune_once gave it, tuned or not: give that, or leave the certificate out"
        )


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
