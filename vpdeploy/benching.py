"""Any ONNX files against each other, beside the road."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from vpdeploy.errors import VpdeployError, of_each
from vpdeploy.measure.engines import Subject, check_engine, check_subject
from vpdeploy.measure.environment import environment
from vpdeploy.measure.factors import latency_factor
from vpdeploy.measure.inputs import FileInput, check_batch, check_size, image_shape_of, input_of, random_images
from vpdeploy.measure.latency import measure_latency
from vpdeploy.measure.memory import measure_memory
from vpdeploy.measure.settings import settings_of
from vpdeploy.recipe.tables import BenchTable
from vpdeploy.values import FileBench, FileFigures, Latency, Memory


def bench_files(
    paths: Sequence[Path],
    *,
    table: BenchTable,
    image_size: tuple[int, int] | None,
    seed: int = 7,
    say: Callable[[str], None] = lambda line: None,
) -> FileBench:
    """Run ``paths`` on the same random images under every engine, thread count and batch of ``table``, interleaved.

    Anybody's image classifiers: one input, uint8 or float, [n, h, w, 3] or [n, 3, h, w]. image_size: height and width where
    the files leave them open.

    Raises: VpdeployError for files that are none or take different inputs, and engines that are not there.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise VpdeployError(f"bench: got {', '.join(map(str, paths))}; expected each file once")
    settings = settings_of(table)
    for setting in settings:
        check_engine(setting)
    taken = dict(zip(paths, of_each(paths, input_of), strict=True))
    form, shape = _common_input(taken, image_size)
    for setting in settings:
        check_size(shape, form, setting.batch)
        check_subject(Subject(paths[0]), setting)
    of_each(product(paths, table.batches), lambda pair: check_batch(pair[0], taken[pair[0]], pair[1]))
    rows: dict[str, list[Latency]] = {str(path): [] for path in paths}
    engines: dict[str, Mapping[str, Any]] = {}
    for setting in settings:
        say(f"{setting.engine}, batch {setting.batch}, threads {setting.threads}")
        timed = measure_latency(
            {str(path): Subject(path) for path in paths},
            random_images(form, shape, batch=setting.batch, seed=seed),
            form=form,
            setting=setting,
            seconds=table.seconds,
        )
        engines[setting.engine] = {key: value for key, value in timed.about.items() if key != "threads"}
        for name, row in timed.latencies.items():
            rows[name].append(row)
    base = rows[str(paths[0])]
    found = {
        name: FileFigures(
            file_bytes=taken[Path(name)].file_bytes,
            latency=tuple(of_file),
            memory=_memory(Path(name), form, shape, table, say),
            factors=tuple(
                latency_factor(b, row, seed=seed) for b, row in zip(base, of_file, strict=True) if b is not row
            ),
        )
        for name, of_file in rows.items()
    }
    return FileBench(found, shape, {**environment(), "engines": engines})


def _common_input(taken: Mapping[Path, FileInput], size: tuple[int, int] | None) -> tuple[str, tuple[int, ...]]:
    """The form and the image shape that all files take. Raises: VpdeployError when there is none."""
    forms = {found.form for found in taken.values()}
    if len(forms) > 1:
        told = ", ".join(f"{path} {found.form}" for path, found in taken.items())
        raise VpdeployError(f"bench: the files take different inputs ({told}); expected the same form of each")
    fixed = {path: _fixed_size(found) for path, found in taken.items()}
    known = next((own for own in fixed.values() if own is not None), None)  # where others leave it open
    shapes = {path: image_shape_of(path, found, size or fixed[path] or known) for path, found in taken.items()}
    if len(set(shapes.values())) > 1:
        told = ", ".join(f"{path} {list(shape)}" for path, shape in shapes.items())
        raise VpdeployError(f"bench: the files take different images ({told}); expected the same of each")
    return forms.pop(), next(iter(shapes.values()))


def _fixed_size(found: FileInput) -> tuple[int, int] | None:
    height, width = found.size
    return None if height is None or width is None else (height, width)


def _memory(
    path: Path, form: str, shape: tuple[int, ...], table: BenchTable, say: Callable[[str], None]
) -> tuple[Memory, ...]:
    """Of ONNX Runtime's CPU provider, whatever was timed: a file that it does not run has none."""
    batches = sorted({min(table.batches), max(table.batches)})
    try:
        found = [measure_memory(path, form=form, image_shape=shape, batch=b, threads=table.threads[0]) for b in batches]
    except VpdeployError as e:
        say(f"warning: memory and start are not known: {e}")
        return ()
    return tuple(row for row in found if row is not None)
