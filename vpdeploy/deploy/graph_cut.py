"""An exported network cut in its ONNX graph: a candidate for timing in a tenth of a second, where an export takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from vpdeploy.deploy.reshapes import open_reshapes, without_weights
from vpdeploy.errors import VpdeployError
from vpdeploy.values import PrunePlan, Term

PREFIX, PROMPT = "backbone.", "canvas.prompt."
Values = np.ndarray[Any, np.dtype[Any]]
Axes = tuple[tuple[str, int] | None, ...]  # which axis of which tensor each axis of an initializer is


class CannotCut(VpdeployError):
    """The graph holds something of which it is not known how it follows the widths."""


@dataclass(frozen=True)
class Graph:
    """An exported network, and what its constants are made of: initializer -> axes of the backbone's tensors. ``computed``: those
    that are a buffer of indices, which a cut computes anew; ``spare``: bytes that an export of any cut may have more, where
    layers that tell their widths by one constant no longer have the same.
    """

    model: onnx.ModelProto
    axes: Mapping[str, Axes]
    computed: Mapping[str, str]
    spare: int

    def write_cut(self, plan: PrunePlan, path: Path, tensors: Callable[[], Mapping[str, Values]]) -> None:
        """Write what a cut in torch and an export would give. tensors: of the network that was cut in torch, by name;
        asked for where the graph holds what a cut computes anew.

        Raises: CannotCut when a tensor that loses something is not in the graph under a name that is known.
        """
        path.write_bytes(self._cut(plan, tensors).SerializeToString())

    def write_without_prompt(self, path: Path) -> bool:
        """Write the graph without the sum with the prompt and the clamp behind it; False where they are not found."""
        uses = {name: node for node in self.model.graph.node for name in node.input}
        prompt = next((t.name for t in self.model.graph.initializer if t.name.startswith(PROMPT)), None)
        added = uses.get(prompt or "")
        clipped = None if added is None else uses.get(added.output[0])
        if prompt is None or added is None or clipped is None or (added.op_type, clipped.op_type) != ("Add", "Clip"):
            return False
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        before = next(name for name in added.input if name != prompt)
        for node in [*model.graph.node]:
            if node.output[0] in (added.output[0], clipped.output[0]):
                model.graph.node.remove(node)
            for place, name in enumerate(node.input):
                if name == clipped.output[0]:
                    node.input[place] = before
        for tensor in [*model.graph.initializer]:
            if tensor.name == prompt:
                model.graph.initializer.remove(tensor)
        path.write_bytes(model.SerializeToString())
        return True

    def terms(self) -> list[Term]:
        """The bytes of all constants, as they follow the widths. What follows none is told by its own name."""
        terms = []
        for tensor in self.model.graph.initializer:
            array = numpy_helper.to_array(tensor)
            places = self.axes[tensor.name]
            fixed = [size for size, place in zip(array.shape, places, strict=True) if place is None]
            bare = tensor.name.removeprefix("backbone.")
            owner = next((place[0].rpartition(".")[0] or place[0] for place in places if place is not None), bare)
            axes = tuple(place for place in places if place is not None)
            terms.append(Term(owner, float(array.itemsize * np.prod(fixed, dtype=float)), axes))
        return terms

    def _cut(self, plan: PrunePlan, tensors: Callable[[], Mapping[str, Values]]) -> onnx.ModelProto:
        found = {place for axes in self.axes.values() for place in axes if place is not None}
        for tensor, kept in plan.kept.items():
            weight = len(plan.fits[tensor]) > 1  # vectors are folded into the weights beside them
            missing = [axis for axis in kept if weight and (tensor, axis) not in found]
            if missing:
                raise CannotCut(f"{tensor}: axis {missing[0]} is not in the graph")
        anew = tensors() if self.computed else {}
        model = without_weights(self.model)
        for tensor in self.model.graph.initializer:
            places = self.axes[tensor.name]
            array = numpy_helper.to_array(tensor)
            if tensor.name in self.computed:
                array = anew[self.computed[tensor.name]]
            for axis, place in enumerate(places):
                kept = None if place is None else plan.kept.get(place[0], {}).get(place[1])
                if kept is not None:
                    array = np.take(array, kept, axis)
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(array, order="C"), tensor.name))
        for node in model.graph.node:
            changed = plan.attributes.get(node.name.rpartition("/")[0].removeprefix(PREFIX), {})
            if node.op_type in ("Conv", "ConvTranspose") and "groups" in changed:
                next(a for a in node.attribute if a.name == "group").i = int(changed["groups"])  # type: ignore[arg-type]
        return model


def read_graph(path: Path, tensors: Mapping[str, Values]) -> Graph:
    """A file as ``deploy.onnx_file.to_onnx`` writes it. tensors: of the backbone, by name."""
    model = onnx.load(path, load_external_data=False)
    spare = open_reshapes(model)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    sizes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    axes: dict[str, Axes] = {}
    for tensor in model.graph.initializer:
        name, size = tensor.name, sizes[tensor.name]
        own = name.removeprefix(PREFIX)
        same = name.startswith(PREFIX) and shapes.get(own) == size
        axes[name] = tuple((own, axis) for axis in range(len(size))) if same else _by_value(tensor, tensors)
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            if name in sizes and all(axis is None for axis in axes[name]):
                axes[name] = _by_use(node, place, sizes[name], shapes, axes)
    return Graph(model, axes, dict(_computed(model, tensors)), spare)


def _computed(model: onnx.ModelProto, tensors: Mapping[str, Values]) -> Iterator[tuple[str, str]]:
    """Constants of a gather that equal a buffer of the module that they stand in."""
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Gather" and node.input[1] in values:
            indices = numpy_helper.to_array(values[node.input[1]])
            module = node.name.rpartition("/")[0].removeprefix(PREFIX)
            for name, tensor in tensors.items():
                if (
                    name.rpartition(".")[0] == module
                    and tensor.dtype == indices.dtype
                    and np.array_equal(tensor, indices)
                ):
                    yield node.input[1], name


def _by_value(initializer: onnx.TensorProto, tensors: Mapping[str, Values]) -> Axes:
    """Of an initializer under a name of the exporter's: the axes of the one tensor that it holds, as it is or transposed."""
    array = numpy_helper.to_array(initializer)
    order = list(range(array.ndim))
    found = [
        tuple((name, axis) for axis in axes)
        for axes in (order, [*order[:-2], *order[:-3:-1]])
        for name, tensor in tensors.items()
        if array.ndim > 2 and tensor.ndim == array.ndim and np.array_equal(tensor.transpose(axes), array)
    ]
    return found[0] if len(found) == 1 else (None,) * array.ndim


def _by_use(node: Any, place: int, size: tuple[int, ...], shapes: Mapping[str, Any], axes: Mapping[str, Axes]) -> Axes:
    """What an initializer without a name of the backbone is, by the node that takes it: norms fold into biases, and linear layers
    over tokens hold their weight transposed.
    """
    if node.op_type == "Conv" and place == 2:
        return axes[node.input[1]][:1]
    module = node.name.rpartition("/")[0].removeprefix(PREFIX)
    weight = f"{module}.weight".lstrip(".")
    if node.op_type == "MatMul" and place == 1 and shapes.get(weight) == size[::-1]:
        return ((weight, 1), (weight, 0))
    return (None,) * len(size)
