"""Where candidates run, and what is measured of them there."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vpdeploy.measure.arms import image_shape
from vpdeploy.measure.cost_fit import fit_layers, fit_whole, non_negative
from vpdeploy.measure.engines import Setting, Subject
from vpdeploy.measure.inputs import random_images
from vpdeploy.measure.latency import QUICK, REPORTED, measure_latency
from vpdeploy.measure.layers import layer_times
from vpdeploy.measure.memory import measure_memory
from vpdeploy.pricing.candidates import Candidates, is_prompted
from vpdeploy.recipe.tables import Recipe
from vpdeploy.surgery.cost import Array
from vpdeploy.surgery.shapes import Shapes
from vpdeploy.values import ChannelGroups, Conditions, Latency, Term
from vpdeploy.workbench import Workbench

PROFILED = 0.15  # seconds of each: prices are read from single layers
GLANCE = 0.02  # seconds of each of many networks, and a few rounds: the fit takes the mean of them


@contextmanager
def opened(work: Workbench, groups: ChannelGroups, *, arm: str = "pruned") -> Iterator[Candidates]:
    with tempfile.TemporaryDirectory() as folder:
        form = work.recipe.target.form or min(work.recipe.export.forms)
        yield Candidates(work, groups, Path(folder), form=form, prompted=is_prompted(work.recipe, arm))


def shape_of_image(recipe: Recipe) -> tuple[int, ...]:
    return tuple(image_shape(recipe.target.form or min(recipe.export.forms), recipe))


@dataclass(frozen=True)
class Target:
    """Where candidates run."""

    candidates: Candidates
    setting: Setting
    image_shape: tuple[int, ...]

    def images(self) -> Any:
        return random_images(self.candidates.form, self.image_shape, batch=self.setting.batch, seed=0)

    def times(self, subjects: Mapping[str, Subject], *, seconds: float = GLANCE) -> dict[str, float]:
        """Median milliseconds of each, in the same rounds."""
        return {name: row.p50_ms for name, row in self.timed(subjects, seconds=seconds).items()}

    def timed(self, subjects: Mapping[str, Subject], *, seconds: float = GLANCE) -> Mapping[str, Latency]:
        return measure_latency(
            subjects,
            self.images(),
            form=self.candidates.form,
            setting=self.setting,
            seconds=seconds,
            pace=QUICK if seconds == GLANCE else REPORTED,
        ).latencies

    def against_dense(self, widths: Array, *, seconds: float = 1.0) -> tuple[float, float]:
        """Median milliseconds at ``widths`` and, in the same rounds, of the dense arm."""
        found = self.times({"at": self.candidates.subject(widths), "dense": self.dense()}, seconds=seconds)
        return found["at"], found["dense"]

    def dense(self) -> Subject:
        return Subject(self.candidates.dense_without_prompt(), self.candidates.dense_module)

    def memory(self, widths: Array, *, runs: int = 1) -> float | None:
        """Peak resident MiB, the largest of ``runs`` processes."""
        path = self.candidates.subject(widths).file(self.setting)
        found = [
            measure_memory(
                path,
                form=self.candidates.form,
                image_shape=self.image_shape,
                batch=self.setting.batch,
                threads=self.setting.threads,
            )
            for _ in range(runs)
        ]
        return None if None in found else max(row.peak_rss_mib for row in found if row is not None)


@dataclass(frozen=True)
class Measured:
    """What was measured of networks of ``widths`` [networks, groups], the narrowest first and the dense one last. ``layers``:
    milliseconds of each module, where the engine tells; ``memory`` [networks], of the narrowest and the dense one alone where
    no budget asks for it.
    """

    widths: Array
    ms: Array
    dense_ms: float
    conditions: Conditions
    layers: Sequence[Mapping[str, float]]
    memory: Array | None

    @staticmethod
    def of(target: Target, widths: Array, *, memory: bool) -> Measured:
        last = len(widths) - 1
        subjects, found = _written(target, widths, range(len(widths)) if memory else (0, last))
        dense = target.dense()
        own = str(last) if dense.path == subjects[str(last)].path else "dense"  # the same where there is no prompt
        timed = target.timed({**subjects, own: dense})
        times = {name: row.p50_ms for name, row in timed.items()}
        images = target.images()
        reads_files = target.setting.engine in ("onnxruntime-cpu", "openvino-cpu")
        layers = [
            layer_times(subject.file(target.setting), images, setting=target.setting, runs=3, seconds=PROFILED)
            for subject in (subjects.values() if reads_files else ())
        ]
        return Measured(
            widths,
            np.array([times[name] for name in subjects]),
            times[own],
            timed[own].conditions,
            layers,
            None if None in found else np.array(found, float),
        )

    def latency_terms(self, shapes: Shapes) -> tuple[Term, ...]:
        if self.layers:
            return fit_layers(self.layers, self.ms, self.widths, shapes)
        return fit_whole(self.ms, self.widths, shapes)

    def memory_terms(self, shapes: Shapes, file_terms: Sequence[Term]) -> tuple[Term, ...]:
        """So much for each byte of the file, and a constant: weights are most of what a process holds."""
        assert self.memory is not None
        rows = self.widths if len(self.memory) == len(self.widths) else self.widths[[0, -1]]
        file = shapes.sum_of(file_terms)
        mib = np.array([file.at(row) for row in rows])
        constant, per_mib = non_negative(np.stack([np.ones(len(mib)), mib], 1), self.memory)
        return (Term("", float(constant)), *(replace(term, amount=term.amount * float(per_mib)) for term in file_terms))


def _written(target: Target, widths: Array, weighed: Sequence[int]) -> tuple[dict[str, Subject], list[float | None]]:
    """The networks of ``widths`` by their number, and the memory of those ``weighed``: in processes of their own, the largest
    first, while further files are written.
    """
    subjects: dict[str, Subject] = {}
    peaks: dict[int, Future[float | None]] = {}
    with ThreadPoolExecutor(2) as pool:
        for i in reversed(range(len(widths))):
            subjects[str(i)] = target.candidates.subject(widths[i])
            if i in weighed and target.setting.engine == "onnxruntime-cpu":
                peaks[i] = pool.submit(target.memory, widths[i])
    return dict(sorted(subjects.items())), [peaks[i].result() for i in sorted(peaks)] or [None]
