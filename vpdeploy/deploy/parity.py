"""Does the exported file compute what the network computes? torch against ONNX Runtime, on real images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from PIL import Image

from vpdeploy.deploy.bake import Deployable
from vpdeploy.deploy.session import open_session
from vpdeploy.deploy.vectors import Vectors, choose_vectors
from vpdeploy.deploy.verify import Agreement, compare
from vpdeploy.errors import ParityError
from vpdeploy.values import Parity

PARITY_LIMIT = 1e-4  # relative, float32
SPREAD_LIMIT = 1e-2  # of max|a|; an untrained ViT has a zero head and agrees with anything
MIN_IMAGES = 32
BATCHES = (1, 3, 8)  # 2 is the batch that was traced, so it would prove nothing
TINY = ((1, 1), (1, 37), (37, 1))  # height, width: the smallest images that are accepted
LONG_SIDE = 512  # of the images that are made here; given ones are used as they are


def check_parity(
    deployable: Deployable, path: Path, *, images: Sequence[np.ndarray], vector_bytes: int, at_least: int = MIN_IMAGES
) -> tuple[Parity, Vectors]:
    """How well the file at ``path`` agrees with ``deployable``, and at most ``vector_bytes`` of vectors for ``verify``.

    images: uint8 [h, w, 3] each, of the validation split; fewer than ``at_least`` are repeated mirrored and shifted. Form "uint8"
    gets images of mixed sizes at batch 1 and batches of 3 and 8 at three sizes; "float" the resized images at batches
    1, 3 and 8.

    Raises: ParityError when they disagree, when a logit is not finite, or when the logits hardly vary between images.
    """
    if not images:
        raise ParityError(
            f"{path.name}: no images to compare torch and ONNX Runtime on; expected at least one of the validation "
            "split: give more data or a larger data.val_fraction"
        )
    session = open_session(path)
    agreements: list[Agreement] = []
    expected: list[np.ndarray] = []
    batches: list[tuple[np.ndarray, np.ndarray]] = []
    for image in _inputs(deployable, _enough(images, at_least)):
        with torch.inference_mode():
            ours = deployable(torch.from_numpy(image)).numpy()
        theirs = np.asarray(session.run(["logits"], {"image": image})[0])
        agreements.append(_check(path, image, ours, theirs))
        expected.append(ours)
        batches.append((image, theirs))
    count = sum(agreement.images for agreement in agreements)
    parity = Parity(
        form=deployable.form,
        images=count,
        batches=BATCHES,
        relative_error=max(agreement.relative_error for agreement in agreements),
        top1_agreement=sum(agreement.same_top1 for agreement in agreements) / count,
        logit_spread=_spread(path, np.concatenate(expected)),
    )
    return parity, choose_vectors(deployable.form, batches, max_bytes=vector_bytes)


def _check(path: Path, image: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> Agreement:
    """The agreement of one batch. Raises: ParityError when it is not good enough."""
    where = f"{path.name}, form {image.dtype}, input {list(image.shape)}"
    versions = f"torch {torch.__version__}, ONNX Runtime {onnxruntime.__version__}"
    for who, logits in (("torch", ours), ("ONNX Runtime", theirs)):
        if not np.isfinite(logits).all():
            raise ParityError(
                f"{where}: {who} gives {int((~np.isfinite(logits)).sum())} logits that are not finite; expected "
                "numbers: the training diverged (look at the losses, lower weight_lr) or a layer overflows float32"
            )
    if ours.shape != theirs.shape:
        raise ParityError(
            f"{where}: torch gives logits {list(ours.shape)}, ONNX Runtime {list(theirs.shape)}; expected the same: "
            "the file belongs to another network, or the exporter fixed a size; export again"
        )
    agreement = compare(ours, theirs)
    if agreement.relative_error > PARITY_LIMIT or agreement.wrong_top1:
        raise ParityError(
            f"{where}: torch and ONNX Runtime differ by {agreement.relative_error:.1e} relative, with "
            f"{agreement.wrong_top1} of {agreement.images} other top-1; expected at most {PARITY_LIMIT:.0e} and none. "
            f"Do not ship this file: export again, with other versions if it stays ({versions})"
        )
    return agreement


def _spread(path: Path, logits: np.ndarray) -> float:
    """The largest range of one logit over the images, relative to max|a|. logits: [n, k]

    Raises: ParityError when it is so small that agreement would prove nothing.
    """
    scale = float(np.abs(logits).max())
    spread = float(np.ptp(logits, axis=0).max()) / scale if scale > 0 else 0.0
    if spread < SPREAD_LIMIT:
        raise ParityError(
            f"{path.name}: the check is vacuous: over {len(logits)} images the logits vary by {spread:.1e} of their "
            f"largest value, expected at least {SPREAD_LIMIT:.0e}; the network gives every image the same answer: "
            "train it (longer) first"
        )
    return spread


# --- inputs ---------------------------------------------------------------------------------------------------------


def _enough(images: Sequence[np.ndarray], at_least: int) -> list[np.ndarray]:
    """At least so many images: the given ones, and if they are fewer, their mirrored and shifted copies."""
    result = list(images)
    for i in range(at_least - len(images)):
        turn, of = divmod(i, len(images))
        result.append(np.roll(images[of][:, ::-1], turn, axis=1))
    return result


def _inputs(deployable: Deployable, images: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """The batches of one check, in the file's own input shape."""
    if deployable.form == "uint8":
        sizes = _sizes(images[0])
        alike = len({image.shape for image in images}) < len(sizes)
        for i, image in enumerate(images):
            yield (_scaled(image, sizes[i % len(sizes)]) if alike else np.ascontiguousarray(image))[None]
        for i, size in enumerate(TINY):
            yield _scaled(images[i], size)[None]
        for size in sizes:
            for batch in BATCHES[1:]:
                yield np.stack([_scaled(image, size) for image in images[-batch:]])
    else:
        for image in images:
            yield _resized(deployable, image)
        for batch in BATCHES[1:]:
            yield np.concatenate([_resized(deployable, image) for image in images[-batch:]])


def _sizes(image: np.ndarray) -> list[tuple[int, int]]:
    """Three sizes (height, width), near that of ``image``: its own, a wider and a taller one."""
    shrink = min(1.0, LONG_SIDE / max(image.shape[:2]))
    h, w = (max(1, round(side * shrink)) for side in image.shape[:2])
    return [(h, w), (max(1, 2 * h // 3), w + 5), (h + 9, max(1, w // 2))]


def _scaled(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    h, w = size
    return np.array(Image.fromarray(np.ascontiguousarray(image)).resize((w, h), Image.Resampling.BILINEAR))


def _resized(deployable: Deployable, image: np.ndarray) -> np.ndarray:
    """[h, w, 3] -> float32 [1, 3, image_size, image_size] in [0, 1]."""
    batch = torch.from_numpy(np.ascontiguousarray(image))[None]
    return deployable.resize(batch).numpy()
