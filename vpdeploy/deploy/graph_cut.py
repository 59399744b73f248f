"""An exported network cut in its ONNX graph: a candidate for timing in a tenth of a second, where an export takes seconds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from vpdeploy.errors import VpdeployError
from vpdeploy.values import PrunePlan, Term

PREFIX, PROMPT = "backbone.", "canvas.prompt."
OF_A_NAME = 32  # bytes by which a name in two places gets longer, and what frames a constant
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
        """The bytes of all constants, as they follow the widths."""
        terms = []
        for tensor in self.model.graph.initializer:
            array = numpy_helper.to_array(tensor)
            places = self.axes[tensor.name]
            fixed = [size for size, place in zip(array.shape, places, strict=True) if place is None]
            owner = next((place[0].rpartition(".")[0] for place in places if place is not None), "")
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
        model = _without_weights(self.model)
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
    spare = _open_shapes(model)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    sizes = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    axes: dict[str, Axes] = {}
    for name, size in sizes.items():
        own = name.removeprefix(PREFIX)
        same = name.startswith(PREFIX) and shapes.get(own) == size
        axes[name] = tuple((own, axis) for axis in range(len(size))) if same else (None,) * len(size)
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


def _open_shapes(model: onnx.ModelProto) -> int:
    """Where constants tell reshapes a width, let it follow from what is reshaped: heads of tokens, flattened maps. How many bytes
    these would take if no two reshapes had one in common.
    """
    values = {tensor.name: tensor for tensor in model.graph.initializer}
    shapes = _shapes(model)
    reshapes = [node for node in model.graph.node if node.op_type == "Reshape" and node.input[1] in values]
    found: dict[str, set[tuple[int, ...] | None]] = {}
    spare = 0
    for node in reshapes:
        before, after = shapes.get(node.input[0], []), numpy_helper.to_array(values[node.input[1]]).tolist()
        batch = before[:1] if after[:1] == [-1] and _ratio(before[1:], after[1:]) == 1 else after[:1]
        shape = _open_shape(before, [*batch, *after[1:]])
        found.setdefault(node.input[1], set()).add(shape)
    for node in reshapes:
        name = node.input[1]
        (shape, *others) = found[name]
        if shape is None or others:
            continue
        spare += values[name].ByteSize() + OF_A_NAME
        values[name].CopyFrom(numpy_helper.from_array(np.array(shape, np.int64), name))
        for attribute in node.attribute:
            if attribute.name == "allowzero":
                attribute.i = 0
    return spare


def _shapes(model: onnx.ModelProto) -> dict[str, list[int | str]]:
    """Of what every node writes; an axis is a number, or the name of one that is open."""
    bare = _without_weights(model)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT64:  # what shapes are computed of
            bare.graph.initializer.append(tensor)
        else:
            bare.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    graph = onnx.shape_inference.infer_shapes(bare, data_prop=True).graph
    known = [*graph.value_info, *graph.input, *graph.output]
    return {v.name: [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim] for v in known}


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    bare = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    bare.graph.name = model.graph.name
    bare.graph.node.extend(model.graph.node)
    bare.graph.input.extend(model.graph.input)
    bare.graph.output.extend(model.graph.output)
    return bare


def _open_shape(before: list[int | str], after: list[int | str]) -> tuple[int, ...] | None:
    """As ONNX's Reshape takes it: 0 for an axis that is as before, -1 for the first part of the one axis that is split, or that
    several become. None where that does not tell.
    """
    shape: list[int | str] = []
    i = j = 0
    while j < len(after):
        i_end, j_end = i + 1, j + 1
        if before[i:i_end] == after[j:j_end]:
            shape.append(0 if i == j else after[j])
        else:
            while (ratio := _ratio(before[i:i_end], after[j:j_end])) != 1:
                if ratio is None or i_end > len(before) or j_end > len(after):
                    return None
                i_end, j_end = (i_end + 1, j_end) if ratio < 1 else (i_end, j_end + 1)
            shape += [-1, *after[j + 1 : j_end]]
        i, j = i_end, j_end
    known = tuple(size for size in shape if not isinstance(size, str))
    return known if len(known) == len(shape) and known.count(-1) <= 1 else None


def _ratio(before: list[int | str], after: list[int | str]) -> float | None:
    """Of the products of their sizes; None where one is not known."""
    known = [size for size in (*before, *after) if not isinstance(size, str) and size > 0]
    if len(known) < len(before) + len(after):
        return None
    return math.prod(known[: len(before)]) / math.prod(known[len(before) :])


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
