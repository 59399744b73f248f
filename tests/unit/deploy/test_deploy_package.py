"""What lies beside the .onnx files, and what works with them alone: verify, predict and the README's snippet. The files
here are written by hand, so that nothing needs torch."""

import hashlib
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import vpdeploy.deploy.verify as verify_module
from vpdeploy.deploy.package import write_package
from vpdeploy.deploy.predict import predict
from vpdeploy.deploy.session import MAX_PIXELS, describe, open_session
from vpdeploy.deploy.vectors import Vectors, choose_vectors
from vpdeploy.deploy.verify import VerifyError, compare, main, verify
from vpdeploy.errors import RunFolderError, VpdeployError
from vpdeploy.recipe.reading import parse_recipe
from vpdeploy.recipe.tables import Recipe
from vpdeploy.recipe.writing import recipe_hash

CLASSES = ("red", "green", "blue")
SIZE = 6


def recipe_of(how: str = "stretch", **data: int) -> Recipe:
    raw = {
        "model": {"name": "cifar_resnet20"},
        "data": {"name": "digits", **data},
        "budget": {"macs_ratio": 0.5},
        "input": {"image_size": SIZE, "resize": how},
        "prompt": {"pixels": {"kind": "none"}},
    }
    return parse_recipe(raw, where="test", folder=Path("."))


def write_colour_model(path: Path, form: str, *, recipe: Recipe, classes: tuple[str, ...] = CLASSES) -> None:
    """A classifier of the mean colour: logits = 10 * (mean red, mean green, mean blue), each in [0, 1]."""
    shape, kind, axes = (
        (["n", "h", "w", 3], TensorProto.UINT8, [1, 2])
        if form == "uint8"
        else (["n", 3, SIZE, SIZE], TensorProto.FLOAT, [2, 3])
    )
    gain = np.eye(3, dtype=np.float32) * (10 / 255 if form == "uint8" else 10)
    graph = helper.make_graph(
        [
            helper.make_node("Cast", ["image"], ["x"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["x", "axes"], ["mean"], keepdims=0),
            helper.make_node("MatMul", ["mean", "gain"], ["logits"]),
        ],
        "colours",
        [helper.make_tensor_value_info("image", kind, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(gain, "gain"), numpy_helper.from_array(np.array(axes, np.int64), "axes")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    metadata = describe(recipe, arm="pruned", form=form, classes=classes, version="1.2.3")
    helper.set_model_props(model, metadata)
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)


def vectors_of(path: Path, form: str) -> Vectors:
    rng = np.random.default_rng(0)
    if form == "uint8":
        images = [rng.integers(0, 256, (n, h, 5, 3), dtype=np.uint8) for n, h in ((1, 2), (1, 7), (3, 4))]
    else:
        images = [rng.random((n, 3, SIZE, SIZE), dtype=np.float32) for n in (1, 2)]
    session = open_session(path)
    return Vectors(form, tuple((x, np.asarray(session.run(["logits"], {"image": x})[0])) for x in images))


def write_run(run: Path, *, how: str = "stretch", forms: tuple[str, ...] = ("uint8", "float")) -> Path:
    """A run folder with an export/ folder; gives the latter."""
    folder, recipe = run / "export", recipe_of(how)
    vectors = {}
    for form in forms:
        for arm in ("dense", "pruned"):
            name = f"{arm}.onnx" if form == "uint8" else f"{arm}.float.onnx"
            write_colour_model(folder / name, form, recipe=recipe)
            vectors[name] = vectors_of(folder / name, form)
    write_package(folder, vectors=vectors, classes=CLASSES, recipe=recipe, version="1.2.3")
    return folder


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def folder(original, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(original, tmp_path / "run" / "export"))


def flip_byte(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))


def edit_manifest(folder: Path, edit) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def resign(folder: Path, name: str) -> None:
    """Give ``name`` the checksum of what it holds now, as if it had been exported so."""
    content = (folder / name).read_bytes()
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    edit_manifest(folder, lambda manifest: manifest["files"].update({name: entry}))


# --- the package ----------------------------------------------------------------------------------------------------


def test_the_manifest_lists_every_file_but_itself(original):
    manifest = json.loads((original / "manifest.json").read_text())
    assert set(manifest["files"]) | {"manifest.json"} == {path.name for path in original.iterdir()}
    assert manifest["recipe_sha256"] == recipe_hash(recipe_of()) and manifest["vpdeploy_version"] == "1.2.3"
    assert set(manifest["vectors"]) == {"dense.onnx", "pruned.onnx", "dense.float.onnx", "pruned.float.onnx"}
    with np.load(original / "vectors.npz", allow_pickle=False) as stored:
        assert set(stored) == {key for pairs in manifest["vectors"].values() for pair in pairs for key in pair}


def test_labels_are_one_a_line_whatever_their_names(tmp_path):
    recipe = recipe_of()
    write_colour_model(tmp_path / "a.onnx", "uint8", recipe=recipe)
    write_package(
        tmp_path, vectors={"a.onnx": Vectors("uint8", ())}, classes=["a\nb", "größe", "c"], recipe=recipe, version="1"
    )
    assert (tmp_path / "labels.txt").read_text(encoding="utf-8").splitlines() == ["a b", "größe", "c"]


def test_verify_py_is_copied_as_it_is(original):
    assert (original / "verify.py").read_bytes() == Path(verify_module.__file__).read_bytes()


def test_an_exported_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(RunFolderError, match=r"gone\.onnx: cannot be read.*export again"):
        write_package(
            tmp_path, vectors={"gone.onnx": Vectors("uint8", ())}, classes=CLASSES, recipe=recipe_of(), version="1"
        )
    assert not (tmp_path / "manifest.json").exists()


def test_what_an_earlier_export_left_goes(tmp_path):
    write_run(tmp_path)
    folder = write_run(tmp_path, forms=("uint8",))
    assert sorted(path.name for path in folder.glob("*.onnx")) == ["dense.onnx", "pruned.onnx"]
    assert verify(folder)[0] == "6 files: checksums agree"


def test_what_cannot_be_removed_is_named(tmp_path):
    (tmp_path / "old.onnx").mkdir()
    with pytest.raises(RunFolderError, match=r"old\.onnx: cannot be removed \(.*remove it, then export again"):
        write_package(tmp_path, vectors={}, classes=CLASSES, recipe=recipe_of(), version="1")


def paste(folder: Path) -> tuple[str, ...]:
    """The classes that the snippet in the README prints, in its order, with photo.jpg in ``folder``."""
    snippet = (folder / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    run = subprocess.run([sys.executable, "-W", "error", "-c", snippet], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return tuple(line.split()[0] for line in run.stdout.splitlines())


@pytest.mark.parametrize("how", ["stretch", "shorter-side-crop"])
@pytest.mark.parametrize("forms", [("uint8", "float"), ("float",)])
def test_the_snippet_in_the_readme_works_when_pasted(tmp_path, forms, how):
    folder = write_run(tmp_path, how=how, forms=forms)
    Image.new("RGB", (31, 20), (10, 20, 250)).save(folder / "photo.jpg")
    assert paste(folder) == ("blue", "green", "red")
    readme = (folder / "README.md").read_text(encoding="utf-8")
    assert all(name in readme for name in ("pruned", "[n, 3]", "red, green, blue", "python verify.py"))
    assert readme.count("from 1;") == 2 * len(forms)  # ONNX Runtime refuses a batch of none


@pytest.mark.parametrize("forms", [("uint8",), ("float",)])
def test_the_snippet_sees_transparency_and_orientation_as_predict_does(tmp_path, forms):
    """Upright and on black the image is blue; it is red where its transparent red is seen or, cropped, upside down."""
    folder = write_run(tmp_path, how="shorter-side-crop", forms=forms)
    photo = np.full((13, 8, 4), (255, 0, 0, 1), np.uint8)
    photo[10] = (0, 90, 200, 128)  # in the central square, rows 2 to 9, only when upright: then this is row 2
    turned = Image.Exif()
    turned[0x0112] = 3
    Image.fromarray(photo).save(folder / "photo.jpg", "PNG", exif=turned)
    (found,) = predict(next(folder.glob("pruned*.onnx")), [folder / "photo.jpg"]).made
    assert paste(folder) == found.names == ("blue", "green", "red")


def test_vectors_fill_their_limit_from_the_smallest():
    batches = [(np.zeros((1, size, size, 3), np.uint8), np.zeros((1, 2), np.float32)) for size in (50, 10, 30)]
    assert [x.shape[1] for x, _ in choose_vectors("uint8", batches, max_bytes=6_000).batches] == [10, 30]
    assert choose_vectors("uint8", batches, max_bytes=100).batches == ()


# --- verify ---------------------------------------------------------------------------------------------------------


def test_an_undamaged_export_passes_from_either_folder(original):
    lines = verify(original.parent)
    assert lines == verify(original)
    assert lines[0] == "8 files: checksums agree"
    assert lines[-1].startswith("pruned.onnx: 5 stored images, relative error 0.0e+00 (at most 1e-03)")


@pytest.mark.parametrize("name", ["pruned.onnx", "vectors.npz", "labels.txt", "verify.py"])
def test_one_flipped_bit_is_found(folder, name):
    flip_byte(folder / name, (folder / name).stat().st_size // 2)
    with pytest.raises(VerifyError, match=rf"{name}: damaged: sha256 \w+…, expected \w+…: copy it again"):
        verify(folder)


def test_a_truncated_file_is_found(folder):
    content = (folder / "dense.onnx").read_bytes()
    (folder / "dense.onnx").write_bytes(content[:-1])
    expected = rf"dense\.onnx: damaged: {len(content) - 1:,} bytes, expected {len(content):,}: copy it again"
    with pytest.raises(VerifyError, match=expected):
        verify(folder)


def test_a_missing_file_is_found(folder):
    (folder / "dense.float.onnx").unlink()
    with pytest.raises(VerifyError, match=r"dense\.float\.onnx: cannot be read .*the manifest lists it: copy it again"):
        verify(folder)


@pytest.mark.parametrize("name", ["../secret.txt", "/etc/hostname", "a/../../secret.txt", "..\\secret.txt"])
def test_a_manifest_that_leaves_its_folder_is_refused(folder, name):
    (folder.parent / "secret.txt").write_text("x")
    edit_manifest(folder, lambda manifest: manifest["files"].update({name: {"sha256": "0", "bytes": 1}}))
    with pytest.raises(VerifyError, match="which lies outside its folder; expected names of files beside it"):
        verify(folder)


def test_a_link_that_leaves_the_folder_is_refused(folder):
    (folder.parent / "other.txt").write_text((folder / "labels.txt").read_text())
    (folder / "labels.txt").unlink()
    (folder / "labels.txt").symlink_to(folder.parent / "other.txt")
    with pytest.raises(VerifyError, match="lies outside its folder"):
        verify(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda logits: logits * np.float32(1.01), r"on the stored input 'pruned\.onnx\.1\.image' .* differs by .*e-0"),
        (lambda logits: logits[:, :-1], r"pruned\.onnx: logits of shape \(\d+, 3\), expected \(\d+, 2\)"),
    ],
)
def test_a_changed_vector_is_found_even_when_it_has_been_signed_again(change, message, folder):
    with np.load(folder / "vectors.npz", allow_pickle=False) as stored:
        arrays = dict(stored)
    arrays["pruned.onnx.1.logits"] = change(arrays["pruned.onnx.1.logits"])
    np.savez(folder / "vectors.npz", **arrays)
    resign(folder, "vectors.npz")
    with pytest.raises(VerifyError, match=message):
        verify(folder)


def stored_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no archive", "cannot be read"), (b"PK\x03\x04", "cannot be read"), (stored_array(), "holds one array")],
)
def test_vectors_that_are_no_archive_are_a_clear_error_even_when_signed_again(folder, content, message):
    (folder / "vectors.npz").write_bytes(content)
    resign(folder, "vectors.npz")
    with pytest.raises(VerifyError, match=rf"vectors\.npz: {message}.*expected the test vectors that the export wrote"):
        verify(folder)


def test_another_model_is_found_even_when_it_has_been_signed_again(folder):
    model = onnx.load(folder / "pruned.onnx")
    gain = numpy_helper.to_array(model.graph.initializer[0])[:, ::-1]
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.ascontiguousarray(gain), "gain"))
    onnx.save(model, folder / "pruned.onnx")
    resign(folder, "pruned.onnx")
    with pytest.raises(VerifyError, match=r"pruned\.onnx: .* differs by .*; expected at most 1e-03 and none"):
        verify(folder)


def test_a_file_that_onnx_runtime_cannot_load_is_found(folder):
    (folder / "pruned.onnx").write_bytes(b"no model")
    resign(folder, "pruned.onnx")
    with pytest.raises(VerifyError, match=r"pruned\.onnx: ONNX Runtime .* cannot run it"):
        verify(folder)


def test_a_folder_without_export_is_named(tmp_path):
    with pytest.raises(VerifyError, match=r"no manifest\.json .*give that one, or write it \(vpdeploy export RUN\)"):
        verify(tmp_path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(schema=99), "schema 99; expected 1"),
        (lambda m: m.pop("files"), "incomplete .*files"),
        (lambda m: m.update(tolerance="wide"), "incomplete"),
        (lambda m: m["files"].pop("vectors.npz"), "names vectors of files that it does not list"),
        (lambda m: m["vectors"].update({"gone.onnx": [["a", "b"]]}), "names vectors of files that it does not list"),
        (lambda m: m["files"].update({"labels.txt": {"bytes": 3}}), "incomplete|without checksum"),
        (lambda m: m["vectors"].update({"dense.onnx": [["a", "b"]]}), "cannot run it"),
    ],
)
def test_a_damaged_manifest_is_a_clear_error(folder, edit, message):
    edit_manifest(folder, edit)
    with pytest.raises(VerifyError, match=message):
        verify(folder)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda m: (m["files"].pop("dense.onnx"), m["vectors"].pop("dense.onnx")), "no checksum of dense.onnx"),
        (lambda m: m["vectors"].pop("dense.onnx"), "no test vectors of dense.onnx"),
        (lambda m: m.update(files={}, vectors={}), "no checksum of dense.float.onnx"),
        (lambda m: m.update(vectors={}), "no test vectors of dense.float.onnx"),
    ],
)
def test_an_exported_file_that_would_not_be_checked_is_an_error(folder, edit, said):
    edit_manifest(folder, edit)
    with pytest.raises(VerifyError) as raised:
        verify(folder)
    assert str(raised.value).startswith(
        f"{folder / 'manifest.json'}: lists {said}; expected every .onnx file with its checksum and test vectors: "
    )
    assert "export again" in str(raised.value)


def test_a_manifest_of_nothing_is_an_error(folder, capsys):
    for path in folder.glob("*.onnx"):
        path.unlink()
    edit_manifest(folder, lambda m: m.update(files={}, vectors={}))
    assert main([str(folder)]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert "manifest.json: lists 0 files and no .onnx file among them; expected every .onnx file with" in told.err


def test_a_manifest_that_is_no_json_is_a_clear_error(folder):
    (folder / "manifest.json").write_text("{")
    with pytest.raises(VerifyError, match=r"manifest\.json: cannot be read .*expected the JSON that the export wrote"):
        verify(folder)


def test_compare_measures_relative_to_the_largest_and_lets_near_ties_differ():
    expected = np.array([[1.0, 4.0, 3.9995], [0.0, 1.0, 2.0]])
    got = expected + np.array([[0, -0.001, 0.001], [0, 0, 0]])
    agreement = compare(expected, got)
    assert agreement.relative_error == pytest.approx(0.001 / 4)
    assert (agreement.images, agreement.same_top1, agreement.wrong_top1) == (2, 1, 0)  # a near tie
    assert compare(np.array([[0.0, 1.0]]), np.array([[1.0, 0.9]])).relative_error == 1.0
    for broken in (float("nan"), float("inf")):
        agreement = compare(np.array([[1.0, 9.0]]), np.array([[1.0, broken]]))
        assert agreement.relative_error == float("inf") and agreement.wrong_top1 == 1


WITHOUT_TORCH = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
"""


def test_the_script_runs_without_torch_and_without_vpdeploy(original, tmp_path):
    code = (
        'BLOCKED = {"torch", "torchvision", "onnx", "vpdeploy", "PIL", "pydantic"}\n' + WITHOUT_TORCH
        + f"import runpy; sys.argv = ['verify.py', {str(original)!r}]\n"
        + f"runpy.run_path({str(original / 'verify.py')!r}, run_name='__main__')"
    )  # fmt: skip
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "all checks passed"


def test_the_script_says_what_is_wrong_in_one_line_and_exits_with_1(folder, tmp_path):
    flip_byte(folder / "pruned.onnx", 100)
    run = subprocess.run([sys.executable, folder / "verify.py"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr.startswith("verify: ") and "pruned.onnx: damaged" in run.stderr and run.stderr.count("\n") == 1


def test_usage_is_2(capsys):
    assert main(["--help"]) == 2 and main(["a", "b"]) == 2
    assert "usage: python verify.py [FOLDER]" in capsys.readouterr().err


# --- predict --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pruned.onnx", "pruned.float.onnx"])
def test_predict_names_the_likeliest_classes_first(original, tmp_path, name):
    Image.new("RGB", (9, 5), (0, 51, 255)).save(tmp_path / "blue.png")
    Image.new("L", (1, 1), 255).save(tmp_path / "white.png")
    first, second = predict(original / name, [tmp_path / "blue.png", tmp_path / "white.png"], top=2).made
    assert (first.image, first.names) == (tmp_path / "blue.png", ("blue", "green"))
    weights = np.exp([0.0, 2.0, 10.0])
    assert first.probabilities == pytest.approx((weights[2] / weights.sum(), weights[1] / weights.sum()), rel=1e-4)
    assert second.names == ("red", "green") and second.probabilities == pytest.approx((1 / 3, 1 / 3))


def test_the_float_form_sees_the_central_square(tmp_path):
    folder = write_run(tmp_path, how="shorter-side-crop", forms=("float",))
    image = np.zeros((4, 12, 3), np.uint8)
    image[:, :, 0] = 255
    image[:, 4:8] = (0, 255, 0)
    Image.fromarray(image).save(tmp_path / "flag.png")
    assert predict(folder / "pruned.float.onnx", [tmp_path / "flag.png"], top=1).made[0].names == ("green",)


def test_more_classes_than_there_are_gives_all(original, tmp_path):
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    (prediction,) = predict(original / "pruned.onnx", [tmp_path / "a.png"], top=50).made
    assert len(prediction.names) == 3 and sum(prediction.probabilities) == pytest.approx(1)


def test_an_image_that_cannot_be_read_keeps_no_other_from_its_prediction(original, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    Image.new("RGB", (2, 2), (0, 255, 0)).save(tmp_path / "green.png")
    images = [tmp_path / name for name in ("text.png", "green.png", "gone.png")]
    predictions = predict(original / "pruned.onnx", images, top=1)
    assert [(found.image.name, found.names) for found in predictions.made] == [("green.png", ("green",))]
    text, gone = predictions.problems
    assert text.startswith(f"{images[0]}: not a readable image (") and gone.startswith(f"{images[2]}: cannot be read (")


def test_the_limit_on_pixels_is_the_recipes(original, tmp_path):
    Image.new("RGB", (6, 5)).save(tmp_path / "a.png")
    write_colour_model(tmp_path / "small.onnx", "uint8", recipe=recipe_of(max_pixels=29))
    assert predict(tmp_path / "small.onnx", [tmp_path / "a.png"]).problems == (
        f"{tmp_path / 'a.png'}: 6 x 5 is 30 pixels; at most 29 are accepted: resize it to fewer pixels first, or leave "
        "it out",
    )
    assert predict(original / "pruned.onnx", [tmp_path / "a.png"]).problems == ()
    model = onnx.load(tmp_path / "small.onnx")  # as earlier versions wrote it: the recipe's default stands
    helper.set_model_props(
        model, {entry.key: entry.value for entry in model.metadata_props if entry.key != "max_pixels"}
    )
    onnx.save(model, tmp_path / "earlier.onnx")
    assert predict(tmp_path / "earlier.onnx", [tmp_path / "a.png"]).problems == ()
    assert recipe_of().data.max_pixels == MAX_PIXELS


def test_what_is_no_model_is_a_clear_error(original):
    with pytest.raises(VpdeployError, match=r"labels\.txt: ONNX Runtime .* cannot load it"):
        predict(original / "labels.txt", [])
    with pytest.raises(VpdeployError, match=r"gone\.onnx: no such file"):
        predict(original / "gone.onnx", [])


@pytest.mark.parametrize(
    ("key", "value"), [("classes", "red, green"), ("image_size", "big"), ("form", "int4"), ("max_pixels", "")]
)
def test_metadata_that_cannot_be_understood_is_a_clear_error(original, tmp_path, key, value):
    model = onnx.load(original / "pruned.onnx")
    for entry in model.metadata_props:
        if entry.key == key:
            entry.value = value
    onnx.save(model, tmp_path / "odd.onnx")
    with pytest.raises(VpdeployError, match=r"odd\.onnx: its metadata cannot be understood"):
        predict(tmp_path / "odd.onnx", [])


def test_metadata_with_another_number_of_classes_is_a_clear_error(tmp_path):
    write_colour_model(tmp_path / "two.onnx", "uint8", recipe=recipe_of(), classes=("a", "b"))
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    with pytest.raises(VpdeployError, match="3 outputs, but its metadata names 2 classes"):
        predict(tmp_path / "two.onnx", [tmp_path / "a.png"])


def test_predict_runs_without_torch(original, tmp_path):
    Image.new("RGB", (3, 3), (255, 0, 0)).save(tmp_path / "red.png")
    code = (
        'BLOCKED = {"torch", "torchvision", "onnx"}\n' + WITHOUT_TORCH + "from pathlib import Path\n"
        "from vpdeploy.deploy.predict import predict\n"
        f"print(predict(Path({str(original / 'pruned.onnx')!r}), [Path({str(tmp_path / 'red.png')!r})]).made[0].names[0])"
    )
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "red"
