"""What lies beside the .onnx files of an export: class names, test vectors, checksums, a page and a check to run."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from vpdeploy.deploy.vectors import Vectors
from vpdeploy.errors import RunFolderError
from vpdeploy.recipe.tables import Recipe
from vpdeploy.recipe.writing import recipe_hash
from vpdeploy.run_folder import write_bytes

SCHEMA = 1
# Relative, between machines: other CPUs run other kernels (AVX2, AVX-512, NEON), which sum in another order. Wider than
# the 1e-4 of parity on one machine, far narrower than any damaged weight.
TOLERANCE = 1e-3

UINT8_SNIPPET = """\
import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("{file}")
classes = open("labels.txt", encoding="utf-8").read().splitlines()
photo = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGBA")
black = Image.new("RGBA", photo.size, "black")                    # what is transparent was black in training
image = np.asarray(Image.alpha_composite(black, photo))[..., :3]  # uint8 [h, w, 3], any size
logits = session.run(["logits"], {{"image": image[None]}})[0]       # float32 [1, {k}]
for i in np.argsort(-logits[0])[:5]:
    print(classes[i], logits[0][i])
"""

FLOAT_SNIPPET = """\
import numpy as np
import onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("{file}")
classes = open("labels.txt", encoding="utf-8").read().splitlines()
photo = ImageOps.exif_transpose(Image.open("photo.jpg")).convert("RGBA")
black = Image.new("RGBA", photo.size, "black")                            # what is transparent was black in training
photo = Image.alpha_composite(black, photo).convert("RGB")
{crop}photo = photo.resize(({s}, {s}), Image.Resampling.BILINEAR)
image = np.asarray(photo, dtype=np.float32).transpose(2, 0, 1) / 255      # float32 [3, {s}, {s}] in [0, 1]
logits = session.run(["logits"], {{"image": image[None]}})[0]              # float32 [1, {k}]
for i in np.argsort(-logits[0])[:5]:
    print(classes[i], logits[0][i])
"""

CROP_LINES = """\
side = min(photo.size)
left, top = ((length - side) // 2 for length in photo.size)
photo = photo.crop((left, top, left + side, top + side))
"""


def write_package(
    folder: Path, *, vectors: Mapping[str, Vectors], classes: Sequence[str], recipe: Recipe, version: str
) -> None:
    """Write labels.txt, vectors.npz, README.md, verify.py and, last of all, manifest.json into ``folder``.

    ``vectors`` maps the name of each .onnx file, which must lie in ``folder`` already, to its test vectors. Other .onnx
    files there are removed.

    Raises: RunFolderError when a file cannot be read, written or removed.
    """
    _drop_others(folder, vectors)
    arrays, keys = _named(vectors)
    beside = {
        "labels.txt": "".join(" ".join(name.splitlines()) + "\n" for name in classes).encode(),
        "vectors.npz": _npz(arrays),
        "README.md": _readme(vectors, classes, recipe, version).encode(),
        "verify.py": Path(__file__).with_name("verify.py").read_bytes(),
    }
    for name, content in beside.items():
        write_bytes(folder / name, content)
    manifest = {
        "schema": SCHEMA,
        "vpdeploy_version": version,
        "recipe_sha256": recipe_hash(recipe),
        "tolerance": TOLERANCE,
        "files": {name: _fingerprint(folder / name) for name in sorted([*vectors, *beside])},
        "vectors": keys,
    }
    write_bytes(folder / "manifest.json", (json.dumps(manifest, indent=2) + "\n").encode())


def _drop_others(folder: Path, vectors: Mapping[str, Vectors]) -> None:
    """Left by an earlier export with other arms or forms, of another network perhaps: ``verify`` would refuse them."""
    for path in folder.glob("*.onnx"):
        if path.name not in vectors:
            try:
                path.unlink()
            except OSError as e:
                raise RunFolderError(
                    f"{path}: cannot be removed ({e.strerror or e}); expected only the files that were just exported: "
                    "remove it, then export again"
                ) from e


def _named(vectors: Mapping[str, Vectors]) -> tuple[dict[str, np.ndarray], dict[str, list[tuple[str, str]]]]:
    """The arrays by their name in vectors.npz, and for each file the names of its inputs and logits."""
    arrays: dict[str, np.ndarray] = {}
    keys: dict[str, list[tuple[str, str]]] = {}
    for file, of_file in vectors.items():
        keys[file] = [(f"{file}.{i}.image", f"{file}.{i}.logits") for i in range(len(of_file.batches))]
        for (image_key, logits_key), (image, logits) in zip(keys[file], of_file.batches, strict=True):
            arrays[image_key], arrays[logits_key] = image, logits
    return arrays, keys


def _npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **dict(arrays))  # type: ignore[arg-type]
    return buffer.getvalue()


def _readme(vectors: Mapping[str, Vectors], classes: Sequence[str], recipe: Recipe, version: str) -> str:
    s, k, resize = recipe.input.image_size, len(classes), recipe.input.resize
    shapes = {
        "uint8": "uint8 `[n, h, w, 3]`, RGB, any n, h and w from 1; resize, padding, prompt and normalisation are inside",
        "float": f"float32 `[n, 3, {s}, {s}]`, RGB in [0, 1], any n from 1; the caller resizes ({resize}); padding, "
        "prompt and normalisation are inside",
    }
    rows = [f"| `{file}` | {of_file.form} | {shapes[of_file.form]} |" for file, of_file in vectors.items()]
    shown = ", ".join(" ".join(name.splitlines()) for name in classes[:20])
    more = f" and {k - 20} more" if k > 20 else ""
    return "\n".join(
        [
            "# Exported image classifiers",
            "",
            f"Written by vpdeploy {version}. Recipe sha256: `{recipe_hash(recipe)}`.",
            "",
            "| file | form | input `image` |",
            "|---|---|---|",
            *rows,
            "",
            f"Output `logits`: float32 `[n, {k}]`, one column per class, in the order of `labels.txt`: {shown}{more}.",
            "",
            "```python",
            _snippet(vectors, k, s, resize) + "```",
            "",
            "Grey images of 16 bits are scaled by 1/257 first: Pillow's own conversion makes them white. "
            "`vpdeploy predict` does that. 16-bit colour needs nothing: Pillow reduces it to 8 bits as it loads, in "
            "training too.",
            "",
            "Check the files on the machine where they will run (needs numpy and onnxruntime only):",
            "",
            "```",
            "python verify.py",
            "```",
            "",
        ]
    )


def _snippet(vectors: Mapping[str, Vectors], k: int, s: int, resize: str) -> str:
    """Ten lines for the pruned file if there is one, and for the form that does the resizing itself if there is one."""
    file = max(vectors, key=lambda name: (vectors[name].form == "uint8", name.startswith("pruned.")))
    if vectors[file].form == "uint8":
        return UINT8_SNIPPET.format(file=file, k=k)
    return FLOAT_SNIPPET.format(file=file, k=k, s=s, crop="" if resize == "stretch" else CROP_LINES)


def _fingerprint(path: Path) -> dict[str, str | int]:
    try:
        with path.open("rb") as file:
            return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}
    except OSError as e:
        raise RunFolderError(
            f"{path}: cannot be read ({e.strerror or e}); expected the file that was just exported: export again"
        ) from e
