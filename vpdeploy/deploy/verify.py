"""Check an exported folder on the machine where it will be used: are the files whole, and does ONNX Runtime compute
here what it computed where they were exported?

    python verify.py [FOLDER]      FOLDER: a run folder or its export/ folder; absent: where this file lies

Needs numpy and onnxruntime only. vpdeploy copies this file as it is into every export folder.
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

try:
    import numpy as np
    import onnxruntime
except ImportError as e:
    raise SystemExit(f"verify: {e}; it needs numpy and onnxruntime: pip install numpy onnxruntime") from e

SCHEMA = 1
MARGIN = 10  # a top-1 is decided when its lead over the second exceeds this many times the absolute error
AGAIN = "copy it again from where it was exported, or export again (vpdeploy export RUN)"
EVERY = "expected every .onnx file with its checksum and test vectors"


class VerifyError(Exception):
    """A file is not what was exported, or computes something else here."""


@dataclass(frozen=True)
class Agreement:
    """Two arrays of logits. ``relative_error`` is max|a-b| / max|a|, infinite where a value is not finite."""

    relative_error: float
    absolute_error: float
    images: int
    same_top1: int
    wrong_top1: int  # differing although the margin decides


def compare(expected: np.ndarray, got: np.ndarray) -> Agreement:
    """How far ``got`` is from ``expected``; both [n, k]."""
    a, b = expected.astype(np.float64), got.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Agreement(float("inf"), float("inf"), len(a), 0, len(a))
    error, scale = float(np.abs(a - b).max()), float(np.abs(a).max())
    relative = error / scale if scale > 0 else (0.0 if error == 0 else float("inf"))
    same = a.argmax(axis=1) == b.argmax(axis=1)
    ordered = np.sort(a, axis=1)
    lead = ordered[:, -1] - ordered[:, -2] if a.shape[1] > 1 else np.zeros(len(a))
    return Agreement(relative, error, len(a), int(same.sum()), int((~same & (lead > MARGIN * error)).sum()))


def verify(folder: Path) -> list[str]:
    """What was checked of a run folder or its export/ folder, one line each.

    Raises: VerifyError at the first file that is missing, damaged or computes something else.
    """
    folder = _export_folder(Path(folder))
    manifest = _manifest(folder / "manifest.json")
    _check_listed(folder, manifest)
    lines = []
    for name, entry in sorted(manifest["files"].items()):
        _check_file(folder, name, entry)
    lines.append(f"{len(manifest['files'])} files: checksums agree")
    if manifest["vectors"]:
        with _vectors(folder / "vectors.npz") as stored:
            for name, keys in sorted(manifest["vectors"].items()):
                lines.append(_check_vectors(_inside(folder, name), keys, stored, float(manifest["tolerance"])))
    return lines


def _vectors(path: Path) -> np.lib.npyio.NpzFile:
    try:
        # Through memory (the export bounds its size): of a damaged file numpy would leave the handle open.
        stored = np.load(io.BytesIO(path.read_bytes()), allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
        raise VerifyError(
            f"{path}: cannot be read ({e}); expected the test vectors that the export wrote: {AGAIN}"
        ) from e
    if not isinstance(stored, np.lib.npyio.NpzFile):
        raise VerifyError(f"{path}: holds one array; expected the test vectors that the export wrote: {AGAIN}")
    return stored


def _export_folder(folder: Path) -> Path:
    for candidate in (folder / "export", folder):
        if (candidate / "manifest.json").is_file():
            return candidate
    raise VerifyError(
        f"{folder}: no manifest.json in it or in its export/ folder; expected a run folder or its export/ folder: "
        "give that one, or write it (vpdeploy export RUN)"
    )


def _manifest(path: Path) -> dict:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        schema = manifest["schema"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise VerifyError(f"{path}: cannot be read ({e}); expected the JSON that the export wrote: {AGAIN}") from e
    if schema != SCHEMA:
        raise VerifyError(
            f"{path}: schema {schema!r}; expected {SCHEMA}: use the verify.py that lies beside it, or that vpdeploy"
        )
    try:
        files, vectors, _ = dict(manifest["files"]), dict(manifest["vectors"]), float(manifest["tolerance"])
        whole = all(isinstance(entry["sha256"], str) and isinstance(entry["bytes"], int) for entry in files.values())
        whole &= all(len(pair) == 2 for pairs in vectors.values() for pair in pairs)
    except (KeyError, TypeError, ValueError) as e:
        raise VerifyError(f"{path}: incomplete ({e!r}); expected files, vectors and tolerance: {AGAIN}") from e
    if not whole or not set(vectors) <= set(files) or (vectors and "vectors.npz" not in files):
        raise VerifyError(f"{path}: names vectors of files that it does not list, or files without checksum: {AGAIN}")
    return manifest


def _inside(folder: Path, name: str) -> Path:
    path = folder / name
    if "\\" in name or not path.resolve().is_relative_to(folder.resolve()):
        raise VerifyError(
            f"{folder / 'manifest.json'}: names {name!r}, which lies outside its folder; expected names of files "
            "beside it. Do not use this folder: export again"
        )
    return path


def _check_listed(folder: Path, manifest: dict) -> None:
    """Of a file that the manifest does not list nothing would be checked, and nothing would say so."""
    path, files, vectors = folder / "manifest.json", manifest["files"], manifest["vectors"]
    exported = {name for name in files if name.endswith(".onnx")} | {found.name for found in folder.glob("*.onnx")}
    for name in sorted(exported):
        missing = "checksum" if name not in files else "test vectors"
        if name not in files or name not in vectors:
            raise VerifyError(
                f"{path}: lists no {missing} of {name}; {EVERY}: take away what is not exported, or {AGAIN}"
            )
    if not exported:
        raise VerifyError(f"{path}: lists {len(files)} files and no .onnx file among them; {EVERY}: {AGAIN}")


def _check_file(folder: Path, name: str, entry: dict) -> None:
    path = _inside(folder, name)
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as e:
        raise VerifyError(f"{path}: cannot be read ({e.strerror or e}); the manifest lists it: {AGAIN}") from e
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise VerifyError(f"{path}: damaged: {size:,} bytes, expected {entry['bytes']:,}: {AGAIN}")
    if digest.hexdigest() != entry["sha256"]:
        got, expected = digest.hexdigest()[:16], entry["sha256"][:16]
        raise VerifyError(f"{path}: damaged: sha256 {got}…, expected {expected}…: {AGAIN}")


def _check_vectors(path: Path, keys: list, stored: np.lib.npyio.NpzFile, tolerance: float) -> str:
    """Run ``path`` on its stored inputs and compare with the stored logits."""
    if not keys:
        return f"{path.name}: no test vectors stored (its inputs are too large); only the checksum was checked"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what is wrong is said once, below
    worst, images = 0.0, 0
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        for input_key, logits_key in keys:
            expected = stored[logits_key]
            got = np.asarray(session.run(["logits"], {"image": stored[input_key]})[0])
            if got.shape != expected.shape:
                raise VerifyError(f"{path}: logits of shape {got.shape}, expected {expected.shape}: {AGAIN}")
            agreement = compare(expected, got)
            if not agreement.relative_error <= tolerance or agreement.wrong_top1:
                raise VerifyError(
                    f"{path}: on the stored input {input_key!r} ONNX Runtime {onnxruntime.__version__} differs by "
                    f"{agreement.relative_error:.1e} relative with {agreement.wrong_top1} other top-1; expected at "
                    f"most {tolerance:.0e} and none: do not use it here; try another version of onnxruntime"
                )
            worst, images = max(worst, agreement.relative_error), images + agreement.images
    except VerifyError:
        raise
    except Exception as e:  # ONNX Runtime's exceptions share no base class of their own
        raise VerifyError(
            f"{path}: ONNX Runtime {onnxruntime.__version__} cannot run it ({str(e).strip()[:200]}); expected logits: "
            f"install a newer onnxruntime, or {AGAIN}"
        ) from e
    return f"{path.name}: {images} stored images, relative error {worst:.1e} (at most {tolerance:.0e}), top-1 agrees"


def main(arguments: list[str]) -> int:
    """Exit status: 0 all agrees, 1 it does not, 2 usage."""
    if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
        print("usage: python verify.py [FOLDER]", file=sys.stderr)
        return 2
    try:
        lines = verify(Path(arguments[0]) if arguments else Path(__file__).resolve().parent)
    except VerifyError as e:
        print(f"verify: {e}", file=sys.stderr)
        return 1
    print("\n".join([*lines, "all checks passed"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
