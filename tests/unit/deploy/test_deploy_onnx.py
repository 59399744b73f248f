"""Baking and exporting: the file computes what the network computes, for any batch and size, and parity would notice
if it did not."""

import copy
import io
import os
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image
from torch import nn

from vpdeploy.data.resize import resize
from vpdeploy.deploy.bake import Deployable, bake
from vpdeploy.deploy.onnx_file import to_onnx
from vpdeploy.deploy.parity import PARITY_LIMIT, check_parity
from vpdeploy.deploy.session import describe, read_metadata
from vpdeploy.errors import ModelError, ParityError, VpdeployError
from vpdeploy.prompts.canvas import Canvas
from vpdeploy.prompts.pixels import build_prompt
from vpdeploy.recipe.reading import parse_recipe
from vpdeploy.recipe.tables import Recipe
from vpdeploy.recipe.writing import recipe_hash
from vpdeploy.values import Tuned

HOWS = ["stretch", "shorter-side-crop"]
FORMS = ["uint8", "float"]
EXPORTS = [("uint8", "stretch"), ("uint8", "shorter-side-crop"), ("float", "stretch")]  # "float" resizes outside
SIZE, CANVAS = 12, 16
CLASSES = ("ant", "bee", "cat")


def recipe_of(how: str, kind: str = "pad") -> Recipe:
    raw = {
        "model": {"name": "cifar_resnet20"},
        "data": {"name": "digits"},
        "budget": {"macs_ratio": 0.5},
        "input": {"image_size": SIZE, "canvas_size": CANVAS, "resize": how},
        "prompt": {"pixels": {"kind": kind, "size": 2}},
    }
    return parse_recipe(raw, where="test", folder=Path("."))


def network(seed: int = 0) -> nn.Module:
    """A small convnet with redrawn norm statistics: a fresh BatchNorm would hide a wrong fold."""
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2, bias=False),
        nn.BatchNorm2d(8), nn.SiLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 7),
    )  # fmt: skip
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5)
            if name.endswith("running_var"):
                tensor.abs_().add_(0.2)
    return net


def prompt_state(kind: str = "pad", seed: int = 1) -> dict[str, torch.Tensor]:
    prompt = build_prompt(kind, canvas_size=CANVAS, size=2, seed=7)
    assert prompt is not None
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in prompt.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return prompt.state_dict()


def tuned() -> Tuned:
    return Tuned(network(), prompt_state(), label_map=(4, 0, 6))


def pictures(count: int = 8, *, h: int = 20, w: int = 15) -> list[np.ndarray]:
    """Smooth pictures that differ in brightness and colour, as photographs do: averaged noise would be all grey."""
    rng = np.random.default_rng(5)
    coarse = rng.integers(0, 256, (count, 3, 3, 3), dtype=np.uint8)
    return [np.array(Image.fromarray(c).resize((w, h), Image.Resampling.BILINEAR)) for c in coarse]


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[tuple[str, str], tuple[Deployable, Path]]:
    """(form, how) -> the baked module and its file."""
    folder = tmp_path_factory.mktemp("export")
    result = {}
    for form, how in EXPORTS:
        recipe = recipe_of(how)
        baked = bake(tuned(), recipe=recipe, classifier="8", form=form)
        path = folder / f"{how}.{form}.onnx"
        metadata = describe(recipe, arm="pruned", form=form, classes=CLASSES, version="1.2.3")
        to_onnx(baked, path, opset=18, metadata=metadata)
        result[form, how] = baked, path
    return result


# --- baking ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("kind", ["pad", "fix", "random"])
def test_baked_equals_backbone_of_normalise_of_prompt_of_resize(how, kind):
    recipe, backbone = recipe_of(how, kind), network()
    state = prompt_state(kind)
    image = torch.from_numpy(np.stack(pictures(3)))
    prompt = build_prompt(kind, canvas_size=CANVAS, size=2, seed=99)
    assert prompt is not None
    prompt.load_state_dict(state)
    prompt.eval()
    canvas = Canvas(SIZE, CANVAS, mean=recipe.input.mean, std=recipe.input.std, prompt=prompt)
    with torch.no_grad():
        resized = resize(image, SIZE, how=how)
        expected = backbone.eval()(canvas.normalise(canvas.place(resized)))
        for form, given in (("uint8", image), ("float", resized)):
            got = bake(Tuned(backbone, state), recipe=recipe, classifier="8", form=form)(given)
            assert torch.allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_without_a_prompt_nothing_is_added():
    recipe, backbone = recipe_of("stretch"), network()
    image = torch.from_numpy(np.stack(pictures(2)))
    canvas = Canvas(SIZE, CANVAS, mean=recipe.input.mean, std=recipe.input.std, prompt=None)
    with torch.no_grad():
        got = bake(Tuned(backbone, {}), recipe=recipe, classifier="8", form="uint8")(image)
        assert torch.equal(got, backbone.eval()(canvas(resize(image, SIZE, how="stretch"))))


def test_a_label_map_leaves_the_mapped_classes_in_their_order():
    recipe, image = recipe_of("stretch"), torch.from_numpy(np.stack(pictures(2)))
    whole = bake(Tuned(network(), {}), recipe=recipe, classifier="8", form="uint8")(image)
    mapped = bake(Tuned(network(), {}, label_map=(4, 0, 6)), recipe=recipe, classifier="8", form="uint8")(image)
    assert torch.allclose(mapped, whole[:, [4, 0, 6]], atol=1e-6)


def test_baking_changes_nothing_of_what_went_in():
    value = tuned()
    value.backbone.train()
    before = copy.deepcopy(value.backbone.state_dict())
    baked = bake(value, recipe=recipe_of("stretch"), classifier="8", form="uint8")
    for parameter in baked.parameters():
        assert not parameter.requires_grad
        parameter.add_(1)
    assert not any(module.training for module in baked.modules())
    assert value.backbone.training and all(p.requires_grad for p in value.backbone.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in value.backbone.state_dict().items())


# --- the file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("form", "how"), EXPORTS)
def test_parity_holds_and_says_what_was_compared(exported, form, how):
    baked, path = exported[form, how]
    parity, vectors = check_parity(baked, path, images=pictures(), vector_bytes=1 << 20)
    assert parity.form == vectors.form == form
    assert parity.images >= 32 and parity.batches == (1, 3, 8)
    assert parity.relative_error <= PARITY_LIMIT and parity.top1_agreement == 1.0 and parity.logit_spread >= 1e-2
    shapes = {image.shape for image, _ in vectors.batches}
    assert {shape[0] for shape in shapes} == {1, 3, 8}
    assert len({shape[1:] for shape in shapes}) == (6 if form == "uint8" else 1)  # three sizes and three tiny ones


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 1, 700), (1, 700, 1), (2, 12, 12), (4, 33, 50), (1, 3000, 5)])
def test_any_batch_height_and_width(exported, how, shape):
    baked, path = exported["uint8", how]
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    got = np.asarray(onnxruntime.InferenceSession(str(path)).run(["logits"], {"image": image})[0])
    expected = baked(torch.from_numpy(image)).numpy()
    assert got.shape == (shape[0], 3) and np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


def test_the_file_is_alone_complete_and_free_of_traces_of_training_and_of_this_machine(exported):
    for (form, _), (_, path) in exported.items():
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
        assert [i.name for i in model.graph.input] == ["image"] and [o.name for o in model.graph.output] == ["logits"]
        operations = [node.op_type for node in model.graph.node]
        # Resize, because many runtimes lack its antialiased form.
        assert not {"BatchNormalization", "Dropout", "Identity", "Resize"} & set(operations)
        # The rows and the columns of the resize; a third would come from a flatten of strided pixels.
        assert operations.count("Gather") == 2 * (form == "uint8") and operations.count("Pad") == 1
        assert os.fsencode(Path(__file__).parents[3]) not in path.read_bytes()
        # The first Add on the canvas is the prompt: one constant [3, C, C].
        constants = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
        assert (3, CANVAS, CANVAS) in constants.values()
    folder = exported["float", "stretch"][1].parent
    expected = {f"{how}.{form}.onnx" for form, how in EXPORTS}
    assert {path.name for path in folder.iterdir()} == expected  # no .data, no temporary file


def constants(path: Path) -> dict[str, bytes]:
    return {tensor.name: tensor.raw_data for tensor in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("how", HOWS)
def test_both_forms_hold_the_same_network_and_uint8_a_resize_in_front_of_it(exported, how, tmp_path):
    baked, path = exported["uint8", how]
    own, whole = constants(exported["float", "stretch"][1]), constants(path)
    assert own.items() <= whole.items()
    assert all(name.startswith("resize/") for name in whole.keys() - own.keys())
    core = to_onnx(exported["float", "stretch"][0], tmp_path / "float.onnx", opset=18, metadata={"form": "float"})
    to_onnx(baked, tmp_path / "again.onnx", opset=18, metadata=read_metadata(path), core=core)
    assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()


def test_nodes_are_named_once(exported):
    for _, path in exported.values():
        names = [node.name for node in onnx.load(path).graph.node]
        assert len(set(names)) == len(names)


def test_exporting_again_gives_the_same_bytes(exported, tmp_path):
    baked, path = exported["float", "stretch"]
    to_onnx(baked, tmp_path / "again.onnx", opset=18, metadata=read_metadata(path))
    assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()


def test_metadata_says_what_a_caller_must_know(exported):
    metadata = read_metadata(exported["uint8", "shorter-side-crop"][1])
    recipe = recipe_of("shorter-side-crop")
    assert metadata["vpdeploy_version"] == "1.2.3" and metadata["recipe_sha256"] == recipe_hash(recipe)
    assert (metadata["form"], metadata["resize"], metadata["arm"]) == ("uint8", "shorter-side-crop", "pruned")
    assert metadata["classes"] == '["ant", "bee", "cat"]'
    assert (metadata["image_size"], metadata["canvas_size"]) == (str(SIZE), str(CANVAS))


def test_a_later_opset_is_what_the_file_says(tmp_path, capfd):
    baked = bake(tuned(), recipe=recipe_of("stretch"), classifier="8", form="float")
    to_onnx(baked, tmp_path / "a.onnx", opset=21, metadata={})
    assert onnx.load(tmp_path / "a.onnx").opset_import[0].version >= 21
    assert capfd.readouterr() == ("", "")


class ByValue(nn.Module):
    def forward(self, x):
        return x.flatten(1) if float(x.sum()) > 0 else -x.flatten(1)


def test_a_network_that_cannot_be_exported_is_a_clear_error(tmp_path, capfd):
    baked = bake(Tuned(ByValue(), {}), recipe=recipe_of("stretch"), classifier="", form="float")
    with pytest.raises(ModelError, match=r"bad\.onnx: torch .* cannot export this network .*expected a forward"):
        to_onnx(baked, tmp_path / "bad.onnx", opset=18, metadata={})
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())


def test_files_that_are_not_from_vpdeploy_are_refused(tmp_path, exported):
    with pytest.raises(VpdeployError, match=r"no such file; expected an \.onnx file"):
        read_metadata(tmp_path / "missing.onnx")
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(exported["float", "stretch"][1].read_bytes()[:200])
    with pytest.raises(VpdeployError, match=r"damaged\.onnx: .*copy it again, or export again"):
        read_metadata(damaged)
    model = onnx.load(exported["float", "stretch"][1])
    model.ClearField("metadata_props")
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(VpdeployError, match="without vpdeploy's metadata"):
        read_metadata(tmp_path / "foreign.onnx")


# --- parity notices -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_the_file_of_other_weights_fails(exported, form):
    baked, path = exported[form, "stretch"]
    other = copy.deepcopy(baked)
    next(other.backbone.parameters()).mul_(1.01)
    with pytest.raises(ParityError, match=r"differ by .* relative.*expected at most 1e-04.*Do not ship this file"):
        check_parity(other, path, images=pictures(), vector_bytes=0)


def test_the_file_of_another_resize_fails(exported):
    with pytest.raises(ParityError, match="differ by"):
        baked, other = exported["uint8", "stretch"][0], exported["uint8", "shorter-side-crop"][1]
        check_parity(baked, other, images=pictures(), vector_bytes=0)


def test_a_network_that_gives_every_image_the_same_answer_proves_nothing(tmp_path):
    net = network()
    with torch.no_grad():
        net.get_parameter("8.weight").zero_()
    baked = bake(Tuned(net, {}), recipe=recipe_of("stretch"), classifier="8", form="float")
    to_onnx(baked, tmp_path / "constant.onnx", opset=18, metadata={})
    with pytest.raises(ParityError, match=r"vacuous: over \d+ images the logits vary by .* at least 1e-02.*train it"):
        check_parity(baked, tmp_path / "constant.onnx", images=pictures(), vector_bytes=0)


def test_logits_that_are_not_numbers_fail(exported):
    baked, path = exported["float", "stretch"]
    broken = copy.deepcopy(baked)
    broken.backbone.get_parameter("8.bias").fill_(float("nan"))
    with pytest.raises(ParityError, match="torch gives 3 logits that are not finite; expected numbers"):
        check_parity(broken, path, images=pictures(), vector_bytes=0)


def test_other_numbers_of_classes_fail(exported):
    baked = bake(Tuned(network(), prompt_state()), recipe=recipe_of("stretch"), classifier="8", form="float")
    with pytest.raises(ParityError, match=r"torch gives logits \[1, 7\], ONNX Runtime \[1, 3\]"):
        check_parity(baked, exported["float", "stretch"][1], images=pictures(), vector_bytes=0)


def test_no_images_is_an_error(exported):
    baked, path = exported["float", "stretch"]
    with pytest.raises(ParityError, match="no images to compare"):
        check_parity(baked, path, images=[], vector_bytes=0)


@pytest.mark.parametrize("limit", [0, 5_000, 40_000])
def test_vectors_keep_to_their_limit_the_small_ones_first(exported, limit):
    baked, path = exported["uint8", "stretch"]
    _, vectors = check_parity(baked, path, images=pictures(), vector_bytes=limit)
    sizes = [image.nbytes for image, _ in vectors.batches]
    assert sizes == sorted(sizes) and sum(sizes) + sum(logits.nbytes for _, logits in vectors.batches) <= limit
    assert (len(sizes) >= 2) == (limit > 0)


# --- photographs ----------------------------------------------------------------------------------------------------


def photographs() -> list[np.ndarray]:
    shared = Path(os.environ.get("VPDEPLOY_TEST_DATA") or Path(__file__).parents[4] / "shared")
    path = shared / "data" / "photos.zip"
    if not path.is_file():
        pytest.skip("photos.zip is not here: set VPDEPLOY_TEST_DATA to the folder that holds data/photos.zip")
    with zipfile.ZipFile(path) as archive:
        names = [n for n in archive.namelist() if n.lower().endswith((".jpg", ".jpeg", ".png")) and "__MACOSX" not in n]
        return [np.array(Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in sorted(names)]


@pytest.mark.parametrize("how", HOWS)
def test_on_photographs_the_graph_is_within_2_grey_levels_of_pillow(tmp_path, how):
    photos = photographs()
    canvas = Canvas(224, 224, mean=(0, 0, 0), std=(1, 1, 1), prompt=None)
    preprocessing = Deployable(nn.Identity(), canvas, form="uint8", image_size=224, resize_how=how).eval()
    to_onnx(preprocessing, tmp_path / "preprocessing.onnx", opset=18, metadata={})
    session = onnxruntime.InferenceSession(str(tmp_path / "preprocessing.onnx"))
    worst = 0.0
    for photo in photos:
        image = Image.fromarray(photo)
        if how == "shorter-side-crop":
            side, (w, h) = min(image.size), image.size
            left, top = (w - side) // 2, (h - side) // 2
            image = image.crop((left, top, left + side, top + side))
        pillow = np.asarray(image.resize((224, 224), Image.Resampling.BILINEAR), dtype=np.float32).transpose(2, 0, 1)
        ours = np.asarray(session.run(["logits"], {"image": photo[None]})[0])[0] * 255
        worst = max(worst, float(np.abs(ours - pillow).max()))
    print(f"{len(photos)} photographs, {how}: worst difference {worst:.2f} grey levels")
    assert len(photos) == 40 and worst <= 2
