"""Products of a network, counted; the only door to fvcore.

``macs`` are the products of convolutions, linear layers and attention, at batch 1. Norms, pooling and elementwise
operations cost time but are no products, and count 0; what fvcore leaves out of attention is counted here.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from vpdeploy.data.resize import ROWS_TOGETHER, window
from vpdeploy.measure.not_products import NOT_PRODUCTS
from vpdeploy.models.watch import unfused_attention


@dataclass(frozen=True)
class MacCount:
    """Products at batch 1, in all and by module; operations without a count: name -> how often each occurs."""

    macs: int
    uncounted: dict[str, int]
    by_module: dict[str, int] = field(default_factory=dict)


def count_macs(backbone: nn.Module, *, canvas_size: int) -> MacCount:
    """Convolution, linear and attention products of one canvas [1, 3, canvas_size, canvas_size].

    Counted on a copy in eval mode on the CPU, by tracing. Elementwise and shape operations, norms and pooling are no
    products (the list is ``NOT_PRODUCTS``); every other operation without a count is named in ``uncounted``, so that
    nobody mistakes a hole for a saving.
    """
    network = copy.deepcopy(backbone).to("cpu", torch.float32).eval()
    example = torch.zeros(1, 3, canvas_size, canvas_size)
    with warnings.catch_warnings(), unfused_attention(), torch.no_grad():
        # fvcore traces with torch.jit, whose deprecation is announced at its import and at every trace.
        warnings.filterwarnings("ignore", message=r"`torch\.jit", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r"`torch\.jit", category=DeprecationWarning)
        from fvcore.nn import FlopCountAnalysis

        analysis = FlopCountAnalysis(network, example)
        # fvcore keeps its own handle where one asks it to ignore an operation: all its handles go, ours alone count.
        analysis.clear_op_handles().set_op_handle(**_HANDLES).set_op_handle(**dict.fromkeys(NOT_PRODUCTS))
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        macs = analysis.total()
        uncounted = analysis.unsupported_ops()
        by_module = {name: int(count) for name, count in analysis.by_module().items()}
    return MacCount(int(macs), {name: int(times) for name, times in sorted(uncounted.items())}, by_module)


# --- handles: (inputs, outputs) of one traced operation -> products ---------------------------------------------------


def _shape(value: Any) -> list[int]:
    return list(value.type().sizes())


def _convolution(inputs: list[Any], outputs: list[Any]) -> int:
    """out [n, o, ...] * weight [o, c / groups, ...]; transposed: in [n, c, ...] * weight [c, o / groups, ...]."""
    transposed = inputs[6].toIValue()
    return math.prod(_shape(inputs[0] if transposed else outputs[0])) * math.prod(_shape(inputs[1])[1:])


def _convolution_mode(inputs: list[Any], outputs: list[Any]) -> int:
    """padding="same" is an operation of its own, never transposed."""
    return math.prod(_shape(outputs[0])) * math.prod(_shape(inputs[1])[1:])


def _products(left: int) -> Callable[[list[Any], list[Any]], int]:
    """Every output is a sum over the last axis of input ``left``: linear, matmul, bmm, addmm, baddbmm, mv."""

    def handle(inputs: list[Any], outputs: list[Any]) -> int:
        return math.prod(_shape(outputs[0])) * _shape(inputs[left])[-1]

    return handle


def _summed_batch(inputs: list[Any], outputs: list[Any]) -> int:
    """addbmm sums over its batch as well: [b, n, m] @ [b, m, p] -> [n, p]."""
    return math.prod(_shape(inputs[1])) * _shape(inputs[2])[-1]


def _attention(inputs: list[Any], outputs: list[Any]) -> int:
    """query [..., l, e] with key [..., s, e], then the weights [..., l, s] with value [..., s, v]."""
    query, key, value = (_shape(inputs[i]) for i in range(3))
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _einsum(inputs: list[Any], outputs: list[Any]) -> int | float:
    """Two operands without "...": one product for each combination of all letters. Otherwise fvcore's estimate."""
    terms = inputs[0].toIValue().replace(" ", "").split("->")[0].split(",")
    shapes = [_shape(value) for value in inputs[1].node().inputs()]
    if len(terms) == 1:
        return 0  # a transpose or a sum
    if len(terms) == 2 and all(len(term) == len(shape) for term, shape in zip(terms, shapes, strict=True)):
        letters, sizes = "".join(terms), [size for shape in shapes for size in shape]
        return math.prod(dict(zip(letters, sizes, strict=True)).values())
    from fvcore.nn.jit_handles import einsum_flop_jit

    return einsum_flop_jit(inputs, outputs)  # type: ignore[return-value]


_HANDLES: dict[str, Callable[[list[Any], list[Any]], Any]] = {
    "aten::_convolution": _convolution,
    "aten::_convolution_mode": _convolution_mode,
    "aten::linear": _products(0),
    "aten::matmul": _products(0),
    "aten::mm": _products(0),
    "aten::mv": _products(0),
    "aten::dot": _products(0),
    "aten::bmm": _products(0),
    "aten::addmm": _products(1),
    "aten::addmv": _products(1),
    "aten::baddbmm": _products(1),
    "aten::addbmm": _summed_batch,
    "aten::scaled_dot_product_attention": _attention,
    "aten::einsum": _einsum,
}


# --- preprocessing ----------------------------------------------------------------------------------------------------


def preprocessing_macs(image_height: int, image_width: int, *, image_size: int, resize_how: str) -> int:
    """Products of the resize of one colour image to a square, as the exported file computes them.

    Rows first, then columns, each by matrices over windows (`vpdeploy.data.resize`), whose zeros are multiplied too.
    "shorter-side-crop" resizes the central square. Prompt and normalisation are elementwise.
    """
    h, w = image_height, image_width
    if resize_how == "shorter-side-crop":
        h = w = min(h, w)
    rows = -(-image_size // ROWS_TOGETHER) * ROWS_TOGETHER
    return 3 * rows * (window(h, image_size) * w + window(w, image_size) * image_size)
