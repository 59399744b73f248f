"""Exported files run, measured and in a process of their own; broken ones give a message."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from vpdeploy.errors import VpdeployError
from vpdeploy.measure import environment as environment_module
from vpdeploy.measure import memory
from vpdeploy.measure.accuracy import predictor, walk
from vpdeploy.measure.engines import Setting, Subject
from vpdeploy.measure.engines.onnxruntime_engine import about_onnxruntime, ort_session
from vpdeploy.measure.environment import environment, machine
from vpdeploy.measure.inputs import random_images
from vpdeploy.measure.latency import measure_latency
from vpdeploy.measure.memory import measure_memory
from vpdeploy.values import Conditions


@pytest.fixture(scope="module")
def colour_model(tmp_path_factory) -> Path:
    """Logits are the mean of each colour: float [n, 3, h, w] -> [n, 3]."""
    graph = helper.make_graph(
        [helper.make_node("ReduceMean", ["image", "axes"], ["logits"], keepdims=0)],
        "colour",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["n", 3, "h", "w"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(np.array([2, 3], np.int64), "axes")],
    )
    path = tmp_path_factory.mktemp("models") / "colour.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def test_predictions_and_labels_are_in_order_of_position(colour_model):
    colours = np.array([2, 0, 1, 1, 0])
    images = np.zeros((5, 3, 4, 4), np.float32)
    images[np.arange(5), colours] = 1
    batches = [
        (images[[3, 0]], colours[[3, 0]], np.array([3, 0])),
        (images[[4, 2, 1]], colours[[4, 2, 1]], np.array([4, 2, 1])),
    ]
    predict = predictor(colour_model, "float", threads=1)
    labels, predictions = walk(batches, predictors={"file": predict, "none": lambda x: np.zeros(len(x), np.int64)})
    assert labels.tolist() == predictions["file"].tolist() == colours.tolist()
    assert predictions["none"].tolist() == [0] * 5
    assert predictions["file"].dtype == np.int64


def test_a_form_is_never_fed_the_other_forms_images(colour_model):
    with pytest.raises(AssertionError, match="the float form takes float32, got uint8"):
        predictor(colour_model, "float", threads=1)(np.zeros((1, 3, 2, 2), np.uint8))


def test_random_images_are_what_the_form_takes():
    whole = random_images("uint8", (5, 7, 3), batch=2, seed=1)
    assert (whole.dtype, whole.shape) == (np.uint8, (2, 5, 7, 3))
    ready = random_images("float", (3, 5, 5), batch=2, seed=1)
    assert (ready.dtype, ready.shape) == (np.float32, (2, 3, 5, 5))
    assert 0 <= ready.min() < ready.max() < 1
    assert np.array_equal(ready, random_images("float", (3, 5, 5), batch=2, seed=1))


def test_every_arm_is_measured_in_the_same_rounds(colour_model):
    subjects = {"dense": Subject(colour_model), "pruned": Subject(colour_model)}
    images = random_images("float", (3, 8, 8), batch=2, seed=0)
    timed = measure_latency(subjects, images, form="float", setting=Setting(batch=2), seconds=0.001)
    measured = timed.latencies
    assert list(measured) == ["dense", "pruned"]
    assert len(measured["dense"].samples_ms) == len(measured["pruned"].samples_ms) >= 20
    row = measured["dense"]
    assert row.conditions == Conditions("onnxruntime-cpu", "cpu", "fp32", "float", 1, 2)
    assert 0 < row.p50_ms <= row.p90_ms <= row.p95_ms <= row.p99_ms and row.images_per_second > 0
    assert timed.about == {**about_onnxruntime(), "device": "cpu", "threads": 1}


def test_threads_spin_no_longer_than_a_run(colour_model):
    options = ort_session(colour_model, threads=2).get_session_options()
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)
    assert about_onnxruntime()["spinning"] == "while a run lasts"


def test_a_missing_file_says_what_to_run(tmp_path):
    with pytest.raises(VpdeployError, match=r"pruned\.onnx: no such file.*run `vpdeploy export` first"):
        ort_session(tmp_path / "pruned.onnx", threads=1)


def test_a_damaged_file_says_what_to_run(tmp_path):
    path = tmp_path / "pruned.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(VpdeployError, match=r"pruned\.onnx: ONNX Runtime .* cannot open it.*`vpdeploy export` again"):
        ort_session(path, threads=1)


def test_the_memory_process_names_its_failure(tmp_path):
    with pytest.raises(VpdeployError, match=r"gone\.onnx: the process that measures memory ended with status 1"):
        measure_memory(tmp_path / "gone.onnx", form="float", image_shape=(3, 8, 8), batch=1, threads=1)


def test_peak_memory_is_the_childs_own(colour_model):
    if not memory.STATUS.is_file():
        pytest.skip("this machine has no /proc/self/status, from which VmHWM is read")
    ballast = np.ones(300 * 2**20, np.uint8)  # the parent's peak, which ru_maxrss would hand down
    measured = measure_memory(colour_model, form="float", image_shape=(3, 256, 256), batch=8, threads=1)
    assert measured is not None
    assert ballast.nbytes / 2**20 > measured.peak_rss_mib > measured.before_rss_mib > 5
    assert (measured.form, measured.batch, measured.threads) == ("float", 8, 1)
    assert measured.load_ms > 0 and measured.first_run_ms > 0


def test_without_proc_there_is_no_memory_figure(colour_model, monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "STATUS", tmp_path / "status")
    assert measure_memory(colour_model, form="float", image_shape=(3, 8, 8), batch=1, threads=1) is None


def test_what_was_measured_beside_another_gpu_or_torch_is_measured_again(tmp_path, monkeypatch):
    assert machine().keys() >= {"cpu", "cores", "torch", "onnxruntime", "openvino"}
    for number, model in enumerate(("NVIDIA A10", "NVIDIA L4")):
        (folder := tmp_path / f"0000:0{number}:00.0").mkdir()
        (folder / "information").write_text(f"Model: \t\t {model}\nIRQ:   \t\t 35\n")
    monkeypatch.setattr(environment_module, "DRIVER", tmp_path)
    assert machine()["gpu"] == "NVIDIA A10, NVIDIA L4"


def test_the_environment_is_plain_names_no_one_and_imports_no_torch():
    code = (
        "import json, sys; from vpdeploy.measure.environment import environment; read = environment();"
        "print(json.dumps([read, 'torch' in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    read, torch_imported = json.loads(done.stdout)
    assert not torch_imported
    assert read["packages"]["torch"][0].isdigit()
    assert read["machine"]["cores_logical"] >= 1
    assert read.keys() == environment().keys()
    assert str(Path.home()) not in done.stdout
