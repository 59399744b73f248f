"""Anybody's ONNX files against each other: measured in the same rounds, or refused with the reason."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from vpdeploy import benching, cli
from vpdeploy.benching import bench_files
from vpdeploy.errors import VpdeployError
from vpdeploy.recipe.reading import bench_table
from vpdeploy.recipe.tables import BenchTable

QUICK = BenchTable(seconds=0.001, batches=(1, 4), threads=(1,))


def model(path: Path, *, axes=("n", 3, "h", "w"), kind=TensorProto.FLOAT, inputs: int = 1, work: int = 1) -> Path:
    """Logits are the mean of each colour, ``work`` times over."""
    names = [f"x{i}" for i in range(inputs)]
    cast = [helper.make_node("Cast", ["x0"], ["y0"], to=TensorProto.FLOAT)]
    same = [helper.make_node("Neg", [f"y{i}"], [f"y{i + 1}"]) for i in range(work)]
    places = [1, 2] if axes[-1] == 3 and axes[1] != 3 else [2, 3]
    mean = helper.make_node("ReduceMean", [f"y{work}", "places"], ["logits"], keepdims=0)
    graph = helper.make_graph(
        [*cast, *same, mean], "colours",
        [helper.make_tensor_value_info(name, kind, list(axes)) for name in names],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [axes[0], 3])],
        [numpy_helper.from_array(np.array(places, np.int64), "places")],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def beside(folder: Path, location: str, size: int = 1000) -> Path:
    """A model with a tensor in a file of its own."""
    path = model(folder / "a.onnx", axes=("n", 3, 8, 8))
    found = onnx.load(path)
    (folder / "w.bin").write_bytes(bytes(4 * size))
    tensor = found.graph.initializer.add()
    tensor.CopyFrom(numpy_helper.from_array(np.zeros(0, np.float32), "w"))
    tensor.ClearField("raw_data")
    tensor.dims[:] = [size]
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": str(4 * size)}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    onnx.save(found, path)
    return path


@pytest.fixture
def pair(tmp_path) -> list[Path]:
    return [model(tmp_path / "slow.onnx", axes=("n", 3, 16, 16), work=40), model(tmp_path / "fast.onnx")]


def test_files_are_measured_against_the_first(pair):
    made = bench_files(pair, table=QUICK, image_size=None)
    slow, fast = (made.files[str(path)] for path in pair)
    assert made.image_shape == (3, 16, 16)  # the one that is fixed decides for the one that is open
    assert [row.batch for row in slow.latency] == [row.batch for row in fast.latency] == [1, 4]
    assert slow.factors == () and len(fast.factors) == 2
    for factor, base, row in zip(fast.factors, slow.latency, fast.latency, strict=True):
        assert factor.factor == base.p50_ms / row.p50_ms and factor.conditions == base.conditions == row.conditions
        assert len(base.samples_ms) == len(row.samples_ms)
    assert fast.file_bytes == pair[1].stat().st_size
    assert made.environment["engines"]["onnxruntime-cpu"]["providers"] == ["CPUExecutionProvider"]


REFUSED = {
    "gone": (lambda at: [at / "gone.onnx"], "gone.onnx: no such file; expected an ONNX file, or a run folder"),
    "a folder": (lambda at: [at, at / "text.onnx"], ": a folder; expected ONNX files, or one run: "),
    "no model": (lambda at: [at / "text.onnx"], "text.onnx: is no ONNX file"),
    "of nothing": (lambda at: [model(at / "a.onnx", axes=(0, 3, 8, 8))], r"its input 'x0' is float \[0, 3, 8, 8\]; expected"),
    "empty": (lambda at: [at / "empty.onnx"], r"empty.onnx: is no ONNX file .it holds no operation.; expected one"),
    "no tensor": (lambda at: [model(at / "a.onnx", kind=TensorProto.UNDEFINED)], "its input 'x0' is no tensor; expected"),
    "tensors elsewhere": (lambda at: [beside(at, "../w.bin")], r"a.onnx: keeps tensors in '../w.bin', which is not beside it"),
    "tensors that are gone": (lambda at: [beside(at, "gone.bin")], "a.onnx: keeps tensors in 'gone.bin', which is not beside"),
    "two inputs": (lambda at: [model(at / "a.onnx", inputs=2)], "a.onnx: takes x0, x1; expected one input, a batch of images"),
    "of integers": (lambda at: [model(at / "a.onnx", kind=TensorProto.INT64)], r"its input 'x0' is int64 .*; expected uint8"),
    "of vectors": (lambda at: [model(at / "a.onnx", axes=("n", 3))], r"its input 'x0' is float \['any', 3\]; expected uint8"),
    "of one image": (lambda at: [model(at / "a.onnx", axes=(1, 3, 8, 8))], "a.onnx: takes batches of 1 only, got 4; ask for"),
    "of any size": (lambda at: [model(at / "a.onnx")], "takes images of any size; expected --image-size HEIGHTxWIDTH"),
    "of two sizes": (
        lambda at: [model(at / "a.onnx", axes=("n", 3, 8, 8)), model(at / "b.onnx", axes=("n", 3, 9, 9))],
        r"the files take different images \(.*a.onnx \[3, 8, 8\], .*b.onnx \[3, 9, 9\]\); expected the same of each",
    ),
    "of two forms": (
        lambda at: [model(at / "a.onnx"), model(at / "b.onnx", axes=("n", "h", "w", 3), kind=TensorProto.UINT8)],
        "the files take different inputs .*a.onnx float, .*b.onnx uint8.; expected the same form of each",
    ),
    "nothing there, twice": (lambda at: [at / "a.onnx", at / "b.onnx"], r"a.onnx: no such file[^\n]*\n.*b.onnx: no such file"),
    "twice the same": (lambda at: [model(at / "a.onnx"), at / "b" / ".." / "a.onnx"], "expected each file once"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_measured_is_refused(name, tmp_path):
    (tmp_path / "text.onnx").write_text("not a model")
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "b").mkdir()
    make, message = REFUSED[name]
    with pytest.raises(VpdeployError, match=message):
        bench_files(make(tmp_path), table=QUICK, image_size=None)


def test_a_batch_that_no_memory_holds_is_refused(tmp_path):
    path = model(tmp_path / "a.onnx")
    with pytest.raises(
        VpdeployError, match="a batch of 4 images of 3 x 16000 x 16000 takes 11.4 GiB; expected at most 4"
    ):
        bench_files([path], table=QUICK.model_copy(update={"batches": (4,)}), image_size=(16000, 16000))


def test_what_is_known_beforehand_costs_no_measurement(tmp_path, monkeypatch):
    monkeypatch.setattr(benching, "measure_latency", lambda *args, **values: pytest.fail("it was measured"))
    path = model(tmp_path / "a.onnx")
    both = QUICK.model_copy(update={"engines": ("onnxruntime-cpu", "torch-eager")})
    with pytest.raises(VpdeployError, match="engine torch-eager: runs torch modules, and a file of itself holds none"):
        bench_files([path], table=both, image_size=(8, 9))
    with pytest.raises(VpdeployError, match="a batch of 100000000 images of 3 x 8 x 9 takes"):
        bench_files([path], table=QUICK.model_copy(update={"batches": (1, 10**8)}), image_size=(8, 9))


def test_times_are_told_though_memory_cannot_be_measured(tmp_path, monkeypatch):
    """OpenVINO runs files that ONNX Runtime does not."""

    def fails(*args, **values):
        raise VpdeployError("a.onnx: the process ended")

    said = []
    monkeypatch.setattr(benching, "measure_memory", fails)
    made = bench_files([model(tmp_path / "a.onnx")], table=QUICK, image_size=(8, 9), say=said.append)
    (found,) = made.files.values()
    assert found.latency and found.memory == ()
    assert said[-1] == "warning: memory and start are not known: a.onnx: the process ended"


def test_all_that_is_wrong_with_the_options_is_told_at_once():
    with pytest.raises(VpdeployError) as caught:
        bench_table({"engines": ("tvm",), "batches": (0,), "seconds": -1.0}, base=BenchTable())
    assert all(part in str(caught.value) for part in ("engines", "tvm", "batches", "seconds"))


def test_what_the_runtime_cannot_compute_is_told_once(tmp_path, capfd):
    """The runtime's own lines on stderr would come before the error that says the same."""
    path = model(tmp_path / "a.onnx", axes=("n", 3, 8, 8))
    found = onnx.load(path)
    found.graph.initializer.append(numpy_helper.from_array(np.zeros((4, 5, 1, 1), np.float32), "of five channels"))
    found.graph.node[1].CopyFrom(helper.make_node("Conv", ["y0", "of five channels"], ["y1"]))
    onnx.save(found, path)
    with pytest.raises(VpdeployError, match="a.onnx: onnxruntime-cpu does not run it"):
        bench_files([path], table=QUICK, image_size=None)
    assert "onnxruntime" not in capfd.readouterr().err


def test_the_command_prints_one_object(pair, capsys):
    command = ("bench", *pair, "--batch", "1,2", "--threads", "1", "--seconds", "0.001", "--json")
    cli.app(list(map(str, command)), standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert list(found["files"]) == [str(path) for path in pair]
    assert [row["batch"] for row in found["files"][str(pair[1])]["factors"]] == [1, 2]


@pytest.mark.parametrize(
    ("axes", "kind", "size", "shape"),
    [
        (("n", "h", "w", 3), TensorProto.FLOAT, (8, 9), (8, 9, 3)),
        (("n", 3, "h", "w"), TensorProto.UINT8, (8, 9), (3, 8, 9)),
        ((-1, 3, -1, -1), TensorProto.FLOAT, (8, 9), (3, 8, 9)),  # as some exporters write "any"
        (("n", 3, 8, 3), TensorProto.FLOAT, None, (3, 8, 3)),
        (("n", 3, "h", 3), TensorProto.FLOAT, (8, 3), (3, 8, 3)),  # colours are where the form has them
        (("n", 3, "w", 3), TensorProto.UINT8, (3, 8), (3, 8, 3)),
    ],
)
def test_images_are_laid_out_as_the_file_says(tmp_path, axes, kind, size, shape):
    path = model(tmp_path / "a.ONNX", axes=axes, kind=kind)
    made = bench_files([path], table=QUICK, image_size=size)
    assert made.image_shape == shape and [row.batch for row in made.files[str(path)].latency] == [1, 4]


def test_tensors_in_files_of_their_own_count(tmp_path):
    path = beside(tmp_path, "w.bin")
    (found,) = bench_files([path], table=QUICK, image_size=None).files.values()
    assert found.file_bytes == path.stat().st_size + 4000


def test_the_command_takes_any_case_and_no_empty_engine(tmp_path, capsys):
    path = model(tmp_path / "a.ONNX", axes=("n", 3, 8, 8))
    command = ["bench", str(path), "--batch", "1", "--threads", "1", "--seconds", "0.001", "--json"]
    cli.app(command, standalone_mode=False)
    assert list(json.loads(capsys.readouterr().out)["files"]) == [str(path)]
    with pytest.raises(VpdeployError, match="engines"):
        cli.app([*command, "--engine", ""], standalone_mode=False)
