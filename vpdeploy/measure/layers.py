"""Where the time of an exported file goes, layer by layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from numpy.typing import NDArray
from torch import nn

from vpdeploy.measure.engines import Setting, node_times
from vpdeploy.values import Layer

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# What engines add to the names of nodes and values that they fuse or lay out anew.
ADDED = re.compile(r"(_nchwc|_token_\d+|_transposed|_Gemm|/MatMulAddFusion|/WithoutBiases)+$")
PREFIX = "backbone."  # of an exported file's modules


def layer_times(
    path: Path, images: NDArray[Any], *, setting: Setting, runs: int = 5, seconds: float = 0.0
) -> dict[str, float]:
    """Milliseconds of each module with products, by its name in the backbone, and of all the rest: "" -> ms.

    An activation or a sum that the engine fuses into a product counts with it: what is left of both is one node. Empty for
    engines that do not tell. ``runs`` and ``seconds``: at least, after a first one.
    """
    nodes = node_times(path, images, setting, runs=runs, seconds=seconds)
    if nodes is None:
        return {}
    model = onnx.load(path, load_external_data=False)
    made_by = {output: node for node in model.graph.node for output in node.output}
    named = {node.name: node for node in model.graph.node}
    times: dict[str, float] = {"": 0.0}
    for noted in nodes:
        name = ADDED.sub("", str(noted["name"]))
        node = named.get(name) or made_by.get(name)
        module = "" if node is None or noted["op"] in ("ReorderInput", "ReorderOutput") else _product_of(node, made_by)
        times[module] = times.get(module, 0.0) + float(noted["ms"])
    return times


def _product_of(node: onnx.NodeProto, made_by: Mapping[str, onnx.NodeProto]) -> str:
    """The module of the nearest product that ``node`` may be fused with, itself first; "" when there is none."""
    for _ in range(4):  # a product, a sum, an activation and a factor are the longest chain that becomes one
        if node.op_type in PRODUCTS:  # attention has products of its own, without weights
            return node.name.rpartition("/")[0].removeprefix(PREFIX)
        before = [made_by[name] for name in node.input if name in made_by]
        if not before:
            return ""
        node = before[0]
    return ""


def layers_of(backbone: nn.Module, times: Mapping[str, float], macs: Mapping[str, int]) -> tuple[Layer, ...]:
    """Every convolution and linear layer of ``backbone`` that was timed, in its order, and the rest."""
    rows: list[Layer] = []
    for name, module in backbone.named_modules():
        if name in times and isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            width = module.out_features if isinstance(module, nn.Linear) else module.out_channels
            rows.append(Layer(name, width, macs.get(name, 0), round(times[name], 4)))
    rest = sum(times.values()) - sum(times[row.module] for row in rows)
    total = macs.get("", 0) - sum(row.macs for row in rows)
    return (*rows, Layer("", 0, total, round(rest, 4)))
