"""A spread of architectures through what `benchmarks/architectures.py` does with all: analysed, cut at half the MACs by exact
groups, some of them exported, compared. Small inputs where the network takes them; docs/architectures.md has every network,
exported, at its own.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "architectures.py"
SPREAD = {
    "torchvision:alexnet": 64,
    "torchvision:resnet18": 64,
    "torchvision:resnext50_32x4d": 64,
    "torchvision:regnet_y_400mf": 64,
    "torchvision:densenet121": 64,
    "torchvision:squeezenet1_1": 64,
    "torchvision:mobilenet_v2": 64,
    "torchvision:mobilenet_v3_small": 64,
    "torchvision:mnasnet0_5": 64,
    "torchvision:shufflenet_v2_x0_5": 64,
    "torchvision:efficientnet_b0": 64,
    "torchvision:googlenet": 64,
    "torchvision:convnext_tiny": 64,
    "torchvision:swin_t": 64,
    "torchvision:swin_v2_t": 64,
    "torchvision:vit_b_32": 224,
    "timm:vit_tiny_patch16_224": 224,
}
# Exporting takes most of the time. These have what a file can get wrong: a flatten, groups, gathers, gates, heads.
EXPORTED = {"alexnet", "resnext50_32x4d", "shufflenet_v2_x0_5", "mobilenet_v3_small", "vit_tiny_patch16_224"}


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("architectures", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("name", "size"), SPREAD.items(), ids=list(SPREAD))
def test_half_of_the_macs_by_exact_groups(benchmark, name, size):
    export = name.partition(":")[2] in EXPORTED
    made = benchmark.cut_one(name, size=size, export=export)
    assert "error" not in made, made
    assert made["asked"] == 0.5 and 0.45 < made["reached"] <= 0.5
    assert made["masked_vs_pruned"] <= 1e-10  # float64: agreement is 1e-16 to 1e-13
    assert made["mask_effect"] >= 1e-3  # or the agreement would be about nothing
    assert made["params_ratio"] < 0.9
    if export:
        assert made["torch_vs_onnx"] <= 1e-4  # float32
        assert made["logit_spread"] >= 1e-2
