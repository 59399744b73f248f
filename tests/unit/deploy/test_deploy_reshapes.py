"""Reshapes whose widths the exporter wrote down follow what they reshape."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from vpdeploy.deploy.reshapes import open_reshapes, open_shape


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (["n", 17, 64], ["n", 17, 4, 16], (0, 0, -1, 16)),
        (["n", 17, 4, 16], ["n", 17, 64], (0, 0, -1)),
        (["n", 64, 4, 4], ["n", 64, 16], (0, 0, -1)),
        (["n", 64, 1, 1], ["n", 64], (0, 0)),
        (["n", 64, 4, 4], ["n", 1024], (0, -1)),
        (["n", 64, 4, 4], ["n", 4, 16, 4, 4], (0, -1, 16, 4, 4)),
        (["n", 8, 8, 32], ["n", 2, 4, 2, 4, 32], None),
        (["n", 16, 4, 32], [-1, 4, 32], None),
        (["n", 64], ["m", 64], None),
        ([], ["n", 64], None),
        (["n", 17, 64], [-1, 17, 4, 16], (0, 0, -1, 16)),  # as exporters write the batch
    ],
)
def test_a_shape_follows_where_the_sizes_tell(before, after, expected):
    assert open_shape(before, after) == expected


def graph(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    made = helper.make_graph(
        nodes,
        "reshapes",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 1024])],
        [numpy_helper.from_array(np.array([-1, 1024], np.int64), "shape")],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def three_reshapes() -> onnx.ModelProto:
    return graph(
        *(helper.make_node("Reshape", ["x", "shape"], [name], allowzero=1) for name in "abc"),
        helper.make_node("Sum", ["a", "b", "c"], ["y"]),
    )


def test_a_shape_is_opened_in_place():
    model = three_reshapes()
    open_reshapes(model)
    assert numpy_helper.to_array(model.graph.initializer[0]).tolist() == [0, -1]
    assert [a.i for node in model.graph.node for a in node.attribute] == [0, 0, 0]
    onnx.checker.check_model(model, full_check=True)


def test_the_bytes_are_told_that_a_shape_for_every_reshape_would_take():
    model = three_reshapes()
    spare, one = open_reshapes(model), model.ByteSize()
    for place in (1, 2):
        model.graph.initializer.append(model.graph.initializer[0])
        model.graph.node[place].input[1] = model.graph.initializer[place].name = f"{place}th shape of a layer"
    assert model.ByteSize() <= one + spare


@pytest.mark.parametrize(
    "other",
    [
        helper.make_node("Cast", ["shape"], ["b"], to=TensorProto.FLOAT),  # more than a shape
        helper.make_node("Reshape", ["a", "shape"], ["b"]),  # of something that has two axes already
    ],
)
def test_a_constant_that_others_need_as_it_is_stays(other):
    model = graph(helper.make_node("Reshape", ["x", "shape"], ["a"]), other, helper.make_node("Add", ["a", "b"], ["y"]))
    assert open_reshapes(model) == 0
    assert numpy_helper.to_array(model.graph.initializer[0]).tolist() == [-1, 1024]
