"""Every kind of prompt, head, resize and budget once from end to end, on generated images; several in one run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from integration.stand_ins import write_images

from vpdeploy import pipeline, run_folder
from vpdeploy.deploy.bake import bake
from vpdeploy.progress import Display
from vpdeploy.recipe.reading import parse_recipe
from vpdeploy.stages import read_recipe
from vpdeploy.values import EpochRecord, Found, Report
from vpdeploy.workbench import open_workbench, read_tuned

FACTORY = """
import torch
from torch import nn


class Tiny(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.linear = nn.Linear(16, classes)

    def forward(self, x):
        x = torch.relu(self.norm1(self.conv1(x)))
        return self.linear(torch.relu(self.norm2(self.conv2(x))).mean((2, 3)))


def make(classes=7):
    return Tiny(classes)
"""
CLASSES = 3
SIZE, CANVAS = 8, 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Images of three classes and of many sizes, the factory of a tiny network, and a checkpoint of it for 7 classes."""
    place = tmp_path_factory.mktemp("kinds")
    write_images(
        place / "images.zip", classes=[f"class {k}" for k in range(CLASSES)], each=12, sizes=((9, 14), (12, 8))
    )
    (place / "tiny.py").write_text(FACTORY)
    namespace: dict[str, Any] = {}
    exec(FACTORY, namespace)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        torch.save(namespace["make"]().state_dict(), place / "tiny.pt")
    return place


def go(folder: Path, run: Path, **changes: dict[str, Any]) -> Report:
    """The whole road with one epoch a stage. ``changes``: table -> keys."""
    raw: dict[str, dict[str, Any]] = {
        "model": {"name": "tiny.py:make"},
        "data": {"name": "imagefolder", "root": "images.zip", "val_fraction": 0.25, "augment": "none"},
        "input": {"image_size": SIZE, "canvas_size": CANVAS},
        "prompt": {"pixels": {"kind": "pad", "size": 2}},
        "fit": {"epochs": 1, "batch_size": 8, "weight_lr": 0.1},
        "search": {"epochs": 1, "batch_size": 8, "prompt_lr": 0.1},
        "budget": {"macs_ratio": 0.5, "round_to": 2},
        "tune": {"epochs": 1, "batch_size": 8, "prompt_lr": 0.5},
        "compute": {"precision": "fp32", "channels_last": "no", "device": "cpu"},
        "compare": {"arms": ["dense", "pruned"]},
        "export": {"forms": ["uint8"]},
        "bench": {"batches": [1], "threads": [1], "seconds": 0.001, "image_size": [9, 9]},
    }
    for table, keys in changes.items():
        raw[table] = {**raw.get(table, {}), **keys}
    recipe = parse_recipe(raw, where="kinds", folder=folder)
    return pipeline.run(recipe, run, command="a test", display=Display(quiet=True))


def logits(run: Path, arm: str, image: np.ndarray) -> np.ndarray:
    """What the exported file gives for one image, uint8 [h, w, 3]: [k]."""
    session = onnxruntime.InferenceSession(run / "export" / f"{arm}.onnx", providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"image": image[None]})[0][0]


def prompt_of(run: Path, arm: str) -> dict[str, torch.Tensor]:
    """The learned tensors of the prompt that the arm ships; empty without one."""
    return run_folder.read_network(run / f"{arm}.safetensors")[1]


def found(run: Path, arm: str = "pruned") -> Found:
    return run_folder.read_found(run / ("found.safetensors" if arm == "pruned" else f"found.{arm}.safetensors"))


def records(run: Path) -> list[EpochRecord]:
    return list(run_folder.read_history(run / "history.jsonl"))


# --- prompts ------------------------------------------------------------------------------------------------------------


def test_a_square_in_the_corner_on_the_central_crop(folder, tmp_path):
    """kind fix, resize shorter-side-crop, budget channel_ratio."""
    report = go(
        folder,
        tmp_path,
        prompt={"pixels": {"kind": "fix", "size": 3}},
        input={"resize": "shorter-side-crop"},
        budget={"macs_ratio": None, "channel_ratio": 0.5},
    )
    assert prompt_of(tmp_path, "pruned")["square"].shape == (3, 3, 3)
    drawn = run_folder.read_arrays(tmp_path / "prompt.npz")["prompt"]
    assert np.abs(drawn[:, :3, :3]).min() > 0 and not drawn[:, 3:].any() and not drawn[:, :, 3:].any()
    # What lies outside of the central square is never seen.
    wide = np.random.default_rng(0).integers(0, 256, (10, 30, 3)).astype(np.uint8)
    other = wide.copy()
    other[:, :10], other[:, 20:] = 0, 255
    assert np.array_equal(logits(tmp_path, "pruned", wide), logits(tmp_path, "pruned", other))
    other[:, 10:20] = 255 - other[:, 10:20]
    assert not np.array_equal(logits(tmp_path, "pruned", wide), logits(tmp_path, "pruned", other))
    certificate = report.certificates["pruned"]
    assert (certificate.budget, certificate.requested, certificate.reached) == ("channel_ratio", 0.5, 0.5)
    prunable = [group for group in certificate.groups if group.status == "exact"]
    assert (sum(g.kept for g in prunable), sum(g.width for g in prunable)) == (16, 32)


def test_a_square_that_moves_ships_at_its_one_place(folder, tmp_path):
    """kind random, budget params_ratio, head ilm."""
    report = go(
        folder,
        tmp_path,
        prompt={"pixels": {"kind": "random", "size": 4}},
        budget={"macs_ratio": None, "params_ratio": 0.4},
        model={"weights": "tiny.pt", "head": "ilm"},
        search={"method": "vpns", "epochs": 2},
    )
    state = prompt_of(tmp_path, "pruned")
    top, left = state["place"].tolist()
    drawn = run_folder.read_arrays(tmp_path / "prompt.npz")["prompt"]
    inside = np.zeros(drawn.shape, bool)
    inside[:, top : top + 4, left : left + 4] = True
    assert np.array_equal(drawn[inside], state["square"].numpy().ravel()) and not drawn[~inside].any()
    assert np.abs(drawn[inside]).max() > 0
    certificate = report.certificates["pruned"]
    assert certificate.budget == "params_ratio" and certificate.reached <= 0.4
    check_label_maps(tmp_path, list(report.arms))


def test_without_a_prompt_none_is_learned_or_shipped(folder, tmp_path):
    """kind none, the HYDRA baseline; weights of other classes, so that the head is replaced and fitted alone."""
    report = go(
        folder,
        tmp_path,
        prompt={"pixels": {"kind": "none"}},
        input={"canvas_size": SIZE},
        compare={"arms": None},
        model={"weights": "tiny.pt", "head": "auto"},
    )
    assert sorted(path.name for path in tmp_path.glob("export/*.onnx")) == ["dense.onnx", "pruned.onnx"]
    assert not found(tmp_path).prompt and not prompt_of(tmp_path, "pruned")
    assert not (tmp_path / "prompt.npz").exists()
    dense = run_folder.read_network(tmp_path / "source.safetensors")[0]
    source = torch.load(folder / "tiny.pt", weights_only=True)
    assert dense["linear.weight"].shape == (CLASSES, 16)
    assert torch.equal(dense["conv1.weight"], source["conv1.weight"])
    assert 'head = "replace"' in report.recipe and 'what = "head"' in report.recipe


TRANSFORMER = """
from torchvision.models import VisionTransformer


def make(classes=3):
    network = VisionTransformer(
        image_size=12, patch_size=4, num_layers=2, num_heads=4, hidden_dim=16, mlp_dim=24, num_classes=classes
    )
    network.heads.head.weight.data.normal_()
    return network
"""


def test_tokens_of_a_transformer_learned_condensed_and_folded_away(folder, tmp_path):
    """kind vpt-deep beside pixels, condense.keep; the dense arm with all tokens."""
    (folder / "transformer.py").write_text(TRANSFORMER)
    report = go(
        folder,
        tmp_path,
        model={"name": "transformer.py:make"},
        prompt={"pixels": {"kind": "pad", "size": 1}, "tokens": {"kind": "vpt-deep", "count": 5}},
        condense={"keep": 0.4},
        budget={"macs_ratio": 0.7, "round_to": 1},
        tune={"epochs": 2},
        compare={"arms": ["dense", "dense+prompt", "pruned"]},
    )
    before, after = found(tmp_path).prompt, prompt_of(tmp_path, "pruned")
    tokens = {name: rows for name, rows in after.items() if name.startswith("tokens.")}
    assert sum(len(rows) for rows in tokens.values()) == 4  # of 10
    assert {len(rows) for name, rows in before.items() if name.startswith("tokens.")} == {5}
    assert {len(rows) for name, rows in prompt_of(tmp_path, "dense+prompt").items() if "tokens" in name} == {5}
    assert prompt_of(tmp_path, "dense") == {} and "top" in after
    certificate = report.certificates["pruned"]
    assert certificate.masked_vs_pruned < 1e-6
    # 4 tokens, read by at most 10 others, each 2 * 16 products; the budget is of the network without them, and of its last block
    # counts what files compute, the class token alone.
    assert certificate.reached <= 0.7
    assert report.arms["pruned"].macs - 4 * 10 * 2 * 16 <= 0.7 * report.arms["dense"].macs
    names = [node.name for node in onnx.load(tmp_path / "export" / "pruned.onnx").graph.initializer]
    assert not any("tokens" in name for name in names)
    # The tokens are in the file, and matter: without them it says something else.
    image = np.random.default_rng(0).integers(0, 256, (9, 9, 3)).astype(np.uint8)
    work = open_workbench(read_recipe(tmp_path), tmp_path, redo=None, display=Display(quiet=True))
    whole = read_tuned(work, "pruned")
    for prompt, same in ((whole.prompt, True), ({k: v for k, v in after.items() if k not in tokens}, False)):
        deployable = bake(
            replace(whole, prompt=prompt), recipe=work.recipe, classifier=work.built.classifier, form="uint8"
        )
        with torch.no_grad():
            expected = deployable(torch.from_numpy(image)[None])[0].numpy()
        assert (
            np.allclose(logits(tmp_path, "pruned", image), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
            == same
        )


def test_a_prompt_of_the_search_alone_is_not_exported(folder, tmp_path):
    """stages search, head flm."""
    report = go(
        folder,
        tmp_path,
        prompt={"pixels": {"kind": "pad", "size": 2, "stages": "search"}},
        model={"weights": "tiny.pt", "head": "flm"},
        export={"forms": ["float"]},
    )
    assert max(float(v.abs().max()) for v in found(tmp_path).prompt.values()) > 0
    assert not prompt_of(tmp_path, "pruned") and not (tmp_path / "prompt.npz").exists()
    model = onnx.load(tmp_path / "export" / "pruned.float.onnx")
    shapes = [tuple(tensor.dims) for tensor in model.graph.initializer]
    assert (3, CANVAS, CANVAS) not in shapes and "Clip" not in [node.op_type for node in model.graph.node]
    check_label_maps(tmp_path, list(report.arms))


def test_arms_with_and_without_the_prompt(folder, tmp_path):
    """stages tune; arms pruned-prompt and dense+prompt."""
    arms = ["dense", "dense+prompt", "pruned", "pruned-prompt"]
    report = go(
        folder,
        tmp_path,
        prompt={"pixels": {"kind": "pad", "size": 2, "stages": "tune"}},
        compare={"arms": arms},
        export={"forms": ["float"]},
    )
    assert list(report.arms) == arms and list(report.certificates) == ["pruned", "pruned-prompt"]
    assert not found(tmp_path).prompt and not found(tmp_path, "pruned-prompt").prompt
    assert {arm for arm in arms if prompt_of(tmp_path, arm)} == {"dense+prompt", "pruned"}
    for arm in arms:
        model = onnx.load(tmp_path / "export" / f"{arm}.float.onnx")
        shapes = [tuple(tensor.dims) for tensor in model.graph.initializer]
        assert ((3, CANVAS, CANVAS) in shapes) == (arm in ("dense+prompt", "pruned"))
    # Without a prompt in the search both arms search alike.
    assert (tmp_path / "plan.json").read_bytes() == (tmp_path / "plan.pruned-prompt.json").read_bytes()


# --- heads --------------------------------------------------------------------------------------------------------------


def check_label_maps(run: Path, arms: list[str]) -> dict[str, list[int]]:
    """Of every arm: one source class of the kept classifier for each class, and as many outputs as classes."""
    maps: dict[str, list[int]] = {}
    for arm in arms:
        state, _, about = run_folder.read_network(run / f"{arm}.safetensors")
        maps[arm] = about["label_map"]
        assert len(set(maps[arm])) == len(maps[arm]) == CLASSES and set(maps[arm]) <= set(range(7))
        assert state["linear.weight"].shape[0] == 7
        session = onnxruntime.InferenceSession(
            next(run.glob(f"export/{arm}.*onnx")), providers=["CPUExecutionProvider"]
        )
        assert session.get_outputs()[0].shape[1] == CLASSES
    assert list(found(run).label_map or ()) == maps["pruned"]
    assert not [r for r in records(run) if r.stage == "fit"]  # weights and head are given: nothing to fit
    return maps


def test_a_torchvision_network_goes_the_whole_road(folder, tmp_path):
    report = go(
        folder,
        tmp_path,
        model={"name": "torchvision:resnet18"},
        input={"image_size": 32, "canvas_size": 40},
        budget={"macs_ratio": 0.6, "round_to": 4},
        fit={"epochs": 1, "batch_size": 9, "weight_lr": 0.001},
        tune={"epochs": 1, "batch_size": 9, "weight_lr": 0.001},
        export={"forms": ["float"]},
    )
    certificate = report.certificates["pruned"]
    assert 0.5 < certificate.reached <= 0.6
    assert report.arms["pruned"].macs / report.arms["dense"].macs == pytest.approx(certificate.reached, abs=1e-9)
