"""Where candidates run, and what is measured of them there."""

from __future__ import annotations

import math
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
from vpdeploy.measure.latency import QUICK, REPORTED, Pace, measure_latency
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
SETTLED = 1.0  # seconds of a mask and of the dense network


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

    def glance(self, subjects: Mapping[str, Subject], *, seconds: float = GLANCE) -> Mapping[str, Latency]:
        """Of many networks, in the same rounds: a first look."""
        return self._timed(subjects, seconds, QUICK)

    def against_dense(self, widths: Array) -> tuple[float, float]:
        """Median milliseconds at ``widths`` and, in the same rounds, of the dense arm: as a report would tell them."""
        found = self._timed({"at": self.candidates.subject(widths), "dense": self.dense()}, SETTLED, REPORTED)
        return found["at"].p50_ms, found["dense"].p50_ms

    def _timed(self, subjects: Mapping[str, Subject], seconds: float, pace: Pace) -> Mapping[str, Latency]:
        images, form = self.images(), self.candidates.form
        return measure_latency(subjects, images, form=form, setting=self.setting, seconds=seconds, pace=pace).latencies

    def dense(self) -> Subject:
        return Subject(self.candidates.dense_without_prompt(), self.candidates.dense_module)

    def memory(self, widths: Array, *, runs: int = 1, most: float = math.inf) -> float | None:
        """Peak resident MiB, the largest of ``runs`` processes, or of those until one has more than ``most``."""
        path, largest = self.candidates.subject(widths).file(self.setting), 0.0
        for _ in range(runs):
            found = measure_memory(
                path,
                form=self.candidates.form,
                image_shape=self.image_shape,
                batch=self.setting.batch,
                threads=self.setting.threads,
            )
            if found is None:
                return None
            if (largest := max(largest, found.peak_rss_mib)) > most:
                break
        return largest


@dataclass(frozen=True)
class Measured:
    """What was measured of networks of ``widths`` [networks, groups], the narrowest first and the dense one last.

    layers: milliseconds of each module, where they were asked for and the engine tells; memory [networks]: where it was asked for
    and can be told.
    """

    widths: Array
    ms: Array
    dense_ms: float
    conditions: Conditions
    layers: Sequence[Mapping[str, float]]
    memory: Array | None

    @staticmethod
    def of(target: Target, widths: Array, *, layers: bool, memory: bool) -> Measured:
        last = len(widths) - 1
        subjects, found = _written(target, widths, weighed=memory)
        dense = target.dense()
        own = str(last) if dense.path == subjects[str(last)].path else "dense"  # the same where there is no prompt
        timed = target.glance({**subjects, own: dense})
        times = {name: row.p50_ms for name, row in timed.items()}
        images = target.images()
        told = layers and target.setting.engine in ("onnxruntime-cpu", "openvino-cpu")
        by_layer = [
            layer_times(subject.file(target.setting), images, setting=target.setting, runs=3, seconds=PROFILED)
            for subject in (subjects.values() if told else ())
        ]
        return Measured(
            widths,
            np.array([times[name] for name in subjects]),
            times[own],
            timed[own].conditions,
            by_layer,
            None if None in found else np.array(found, float),
        )

    def latency_terms(self, shapes: Shapes) -> tuple[Term, ...]:
        if self.layers:
            return fit_layers(self.layers, self.ms, self.widths, shapes)
        return fit_whole(self.ms, self.widths, shapes)

    def memory_terms(self, shapes: Shapes, file_terms: Sequence[Term]) -> tuple[Term, ...]:
        """So much for each byte of the file, and a constant: weights are most of what a process holds."""
        assert self.memory is not None
        file = shapes.sum_of(file_terms)
        mib = np.array([file.at(row) for row in self.widths])
        constant, per_mib = non_negative(np.stack([np.ones(len(mib)), mib], 1), self.memory)
        return (Term("", float(constant)), *(replace(term, amount=term.amount * float(per_mib)) for term in file_terms))


def _written(target: Target, widths: Array, *, weighed: bool) -> tuple[dict[str, Subject], list[float | None]]:
    """The networks of ``widths`` by their number, and where they are ``weighed`` their memory: in processes of their own, the
    largest first, while further files are written.
    """
    subjects: dict[int, Subject] = {}
    peaks: dict[int, Future[float | None]] = {}
    with ThreadPoolExecutor(2) as pool:
        for i in reversed(range(len(widths))):
            subjects[i] = target.candidates.subject(widths[i])
            if weighed and target.setting.engine == "onnxruntime-cpu":
                peaks[i] = pool.submit(target.memory, widths[i])
    found = [peaks[i].result() for i in sorted(peaks)]
    return {str(i): subjects[i] for i in sorted(subjects)}, found or [None]
