"""Every value to and from disk. Each file is written whole under a temporary name and renamed, so that a crash at any
moment leaves the old file or the new one, never half of one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from vpdeploy.errors import RunFolderError
from vpdeploy.values import EpochRecord, Found

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
SCHEMA = 1
PART = ".part"  # ends the temporary names


# --- bytes ----------------------------------------------------------------------------------------------------------


def write_bytes(path: Path, content: bytes) -> None:
    """Put ``content`` at ``path`` in one step.

    Raises: RunFolderError when the disk is full or the folder cannot be written; whatever was at ``path`` is still there.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", suffix=PART, delete=False) as file:
            temporary = Path(file.name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as e:
        raise _explained(path, e) from e
    finally:  # Ctrl-C, too
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_bytes(path, json.dumps(value, indent=1).encode())


def write_lines(path: Path, lines: Iterable[str]) -> None:
    write_bytes(path, "".join(f"{line}\n" for line in lines).encode())


def _explained(path: Path, error: OSError) -> RunFolderError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return RunFolderError(
            f"{path}: the disk is full; nothing that was there is lost. Free some space and run the same command again"
        )
    return RunFolderError(
        f"{path}: cannot be written: {error.strerror or error}; choose another folder with -o, or change its permissions"
    )


def read_bytes(path: Path, *, again: str = "run `vpdeploy run` on this run's recipe to make it again") -> bytes:
    """Raises: RunFolderError when there is no such file, with how to make it ``again``."""
    try:
        return path.read_bytes()
    except OSError as e:
        raise RunFolderError(f"{path}: cannot be read: {e.strerror or e}; {again}") from e


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- values ---------------------------------------------------------------------------------------------------------


def dump(value: object) -> bytes:
    """A noun of ``vpdeploy.values`` as JSON with a ``schema``."""
    plain = TypeAdapter(type(value)).dump_python(value, mode="json")
    return json.dumps({"schema": SCHEMA, **plain}, indent=1, allow_nan=False).encode()


def dump_line(value: object) -> str:
    """The same in one line, for the metadata of another file."""
    return json.dumps(json.loads(dump(value)), separators=(",", ":"))


def load(kind: type[T], content: bytes, *, where: str, again: str = "remove it and run the same command again") -> T:
    """The value that ``dump`` wrote. ``load(type(x), dump(x)) == x``.

    Raises: RunFolderError when the content is damaged, with how to make it ``again``, or was written by another version.
    """
    try:
        plain = json.loads(content)
        schema = plain.pop("schema", None)
        if schema != SCHEMA:
            raise RunFolderError(f"{where}: got schema {schema}; expected {SCHEMA}: it was written by another version")
        return TypeAdapter(kind).validate_python(plain)
    except (ValueError, AttributeError, TypeError, ValidationError, RecursionError) as e:
        raise RunFolderError(f"{where}: damaged: {str(e).splitlines()[0]}; {again}") from e


def write_value(path: Path, value: object) -> None:
    write_bytes(path, dump(value))


def read_value(path: Path, kind: type[T]) -> T:
    return load(kind, read_bytes(path), where=str(path))


# --- tensors --------------------------------------------------------------------------------------------------------


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, about: Mapping[str, Any] | None = None) -> None:
    """Tensors by name as safetensors; ``about`` is plain data kept beside them."""
    from safetensors.torch import save

    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_bytes(path, save(plain, metadata={"about": json.dumps(about or {})}))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What ``write_tensors`` wrote: tensors and ``about``.

    Raises: RunFolderError when the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load as load_tensors

    content = read_bytes(path)
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
        return load_tensors(content), about
    except (SafetensorError, ValueError) as e:
        raise RunFolderError(f"{path}: damaged: {e}; remove it and run the same command again") from e


# --- arrays -----------------------------------------------------------------------------------------------------------


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """NumPy arrays by name, as .npz without pickles."""
    buffer = BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    write_bytes(path, buffer.getvalue())


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """What ``write_arrays`` wrote.

    Raises: RunFolderError when the file is missing or damaged.
    """
    try:
        with np.load(BytesIO(read_bytes(path)), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        raise RunFolderError(f"{path}: damaged: {e}; remove it and run the same command again") from e


# --- stages ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Journal:
    """Where one training stage leaves its state after every epoch, and finds it again after a crash."""

    stage: str
    key: str  # of the recipe tables and files that the stage depends on: another key's state is not resumed
    state_file: Path
    history_file: Path

    def resume(self) -> dict[str, Any] | None:
        """The state after the last finished epoch, or None."""
        state = self._state()
        return state if state is not None and state.get("key") == self.key else None

    @property
    def has_begun(self) -> bool:
        """Whether there is a state of the stage, or of its first part."""
        state = self._state()
        return state is not None and str(state.get("key")).partition(" ")[0] == self.key

    def _state(self) -> dict[str, Any] | None:
        import torch

        if not self.state_file.exists():
            return None
        try:
            return torch.load(BytesIO(read_bytes(self.state_file)), weights_only=True, map_location="cpu")
        except RunFolderError:
            raise
        except Exception as e:  # whatever a damaged archive raises; torch's own words advise to unpickle it
            raise RunFolderError(
                f"{self.state_file}: damaged: not a state that torch can read ({type(e).__name__}); remove it to start the "
                "stage again"
            ) from e

    def part(self, number: int, *, under: bytes = b"") -> Journal:
        """That of one of several parts of the stage, one after the other; the first is the stage's own. ``under``: what it goes
        on from; a state that was left under something else is not taken up.
        """
        suffix = f".{number}" if number else ""
        of = f" {hashlib.sha256(under).hexdigest()}" if under else ""
        return replace(
            self,
            key=f"{self.key}{f' {number}' if number else ''}{of}",
            state_file=self.state_file.with_suffix(f"{suffix}{self.state_file.suffix}"),
        )

    def save(self, state: Mapping[str, Any], record: EpochRecord) -> None:
        import torch

        append_history(self.history_file, record)
        buffer = BytesIO()
        torch.save({**state, "key": self.key}, buffer)
        write_bytes(self.state_file, buffer.getvalue())


def append_history(path: Path, record: EpochRecord) -> None:
    """Add one epoch. An epoch that a crash made run twice stands there twice; ``read_history`` takes the last."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"schema": SCHEMA, **asdict(record)}).encode() + b"\n"
        with path.open("a+b") as file:
            if file.tell() and path.read_bytes()[-1:] != b"\n":  # cut off by a crash: not to be cut into this one
                line = b"\n" + line
            file.write(line)
    except OSError as e:
        raise _explained(path, e) from e


def read_history(path: Path) -> tuple[EpochRecord, ...]:
    """Every epoch of every stage once, in the order of the stages. A last line cut off by a crash is left out."""
    if not path.exists():
        return ()
    records: dict[tuple[str, int], EpochRecord] = {}
    for line in read_bytes(path).splitlines():
        try:
            record = load(EpochRecord, line, where=str(path))
        except RunFolderError:  # only a write that was cut off can be unreadable, and its epoch is run again
            continue
        records.pop((record.stage, record.epoch), None)
        records[record.stage, record.epoch] = record
    return tuple(records.values())


def drop_history(path: Path, stage: str) -> None:
    """Forget a stage's epochs before it is trained anew."""
    kept = [record for record in read_history(path) if record.stage != stage]
    write_lines(path, (json.dumps({"schema": SCHEMA, **asdict(record)}) for record in kept))


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the run folder for this process alone, without what a process left that was killed while it wrote.

    Raises: as ``held``.
    """
    with held(run):
        for left in run.rglob(f".*{PART}"):
            left.unlink(missing_ok=True)
        yield


@contextmanager
def held(run: Path) -> Iterator[None]:
    """Hold a folder for this process alone; runs below it may be others'.

    Raises: RunFolderError when another process holds it, or it cannot be made.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock = FileLock(run / ".lock", timeout=0)
        lock.acquire()
    except Timeout as e:
        raise RunFolderError(
            f"{run}: another vpdeploy process works on this run; wait for it, or choose another folder with -o"
        ) from e
    except OSError as e:
        raise _explained(run, e) from e
    try:
        yield
    finally:
        lock.release()


# --- networks -------------------------------------------------------------------------------------------------------


def write_network(
    path: Path, backbone: Mapping[str, Tensor], *, prompt: Mapping[str, Tensor], about: Mapping[str, Any]
) -> None:
    """A backbone's state and its prompt's (empty without one); ``about`` is plain data."""
    write_tensors(path, _packed({"backbone": backbone, "prompt": prompt}), about=about)


def read_network(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """(backbone state, prompt state, about) as ``write_network`` got them."""
    flat, about = read_tensors(path)
    parts = _unpacked(flat)
    return parts.get("backbone", {}), parts.get("prompt", {}), about


def write_found(path: Path, found: Found) -> None:
    parts = {"scores": found.scores, "prompt": found.prompt, "tensors": found.tensors}
    write_tensors(path, _packed(parts), about={"label_map": found.label_map})


def read_found(path: Path) -> Found:
    flat, about = read_tensors(path)
    parts = _unpacked(flat)
    if strange := parts.keys() - {"scores", "prompt", "tensors"}:
        raise RunFolderError(
            f"{path}: holds {', '.join(sorted(strange))}; expected scores, prompt and tensors: it is of another version of "
            "vpdeploy, or no result of a search; search again"
        )
    return Found(
        scores=parts.get("scores", {}),
        prompt=parts.get("prompt", {}),
        tensors=parts.get("tensors", {}),
        label_map=as_label_map(about.get("label_map")),
    )


def as_label_map(plain: list[int] | None) -> tuple[int, ...] | None:
    return None if plain is None else tuple(plain)


def _packed(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{part}/{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def _unpacked(flat: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in flat.items():
        part, _, name = key.partition("/")
        parts.setdefault(part, {})[name] = tensor
    return parts
