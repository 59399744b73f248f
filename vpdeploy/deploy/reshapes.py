"""Reshapes of an exported graph, told to follow the widths of what they reshape."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import onnx
from onnx import numpy_helper

OF_A_NAME = 32  # bytes by which a name in two places gets longer, and what frames a constant
Sizes = list[int | str]  # of axes: numbers, and names of open ones


def open_reshapes(model: onnx.ModelProto) -> int:
    """Where the exporter wrote a width into the shape of a reshape (heads of tokens, flattened maps), let it follow, in place.
    How many bytes these shapes would take if no two reshapes had one in common.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    sizes = _sizes(model)
    reshapes: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        if node.op_type == "Reshape" and node.input[1] in constants:
            reshapes.setdefault(node.input[1], []).append(node)
    uses = Counter(name for node in model.graph.node for name in node.input)
    spare = 0
    for name, nodes in reshapes.items():
        written = numpy_helper.to_array(constants[name]).tolist()
        (shape, *others) = {open_shape(sizes.get(node.input[0], []), written) for node in nodes}
        if shape is None or others or uses[name] > len(nodes):
            continue  # they would need one each, or it is more than a shape
        spare += len(nodes) * (constants[name].ByteSize() + OF_A_NAME)
        constants[name].CopyFrom(numpy_helper.from_array(np.array(shape, np.int64), name))
        for attribute in (attribute for node in nodes for attribute in node.attribute):
            if attribute.name == "allowzero":
                attribute.i = 0
    return spare


def open_shape(before: Sizes, after: Sizes) -> tuple[int, ...] | None:
    """The shape ``after`` of a reshape from ``before`` as ONNX takes it: 0 for an axis that is as before, -1 for the first part
    of the one axis that is split, or for what several become. None where the sizes do not tell. A -1 that comes first is the
    batch.
    """
    if after[:1] == [-1] and _ratio(before[1:], after[1:]) == 1:
        after = [*before[:1], *after[1:]]
    shape: Sizes = []
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


def _ratio(before: Sizes, after: Sizes) -> float | None:
    """Of the products of their sizes; None where one is not known."""
    known = [size for size in (*before, *after) if not isinstance(size, str) and size > 0]
    if len(known) < len(before) + len(after):
        return None
    return math.prod(known[: len(before)]) / math.prod(known[len(before) :])


def _sizes(model: onnx.ModelProto) -> dict[str, Sizes]:
    """Of what every node writes."""
    bare = without_weights(model)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT64:  # what shapes are computed of
            bare.graph.initializer.append(tensor)
        else:
            bare.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    graph = onnx.shape_inference.infer_shapes(bare, data_prop=True).graph
    known = [*graph.value_info, *graph.input, *graph.output]
    return {v.name: [d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim] for v in known}


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of the graph alone."""
    bare = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    bare.graph.name = model.graph.name
    bare.graph.node.extend(model.graph.node)
    bare.graph.input.extend(model.graph.input)
    bare.graph.output.extend(model.graph.output)
    return bare
