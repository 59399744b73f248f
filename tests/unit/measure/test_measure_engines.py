"""Every engine computes what torch does, says what it used, and refuses by name what it cannot do here."""

import importlib
import importlib.util
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn

from vpdeploy.errors import VpdeployError
from vpdeploy.measure.engines import (
    ENGINES,
    EngineError,
    Setting,
    Subject,
    check_engine,
    onnxruntime_engine,
    open_session,
    settings_kept,
)
from vpdeploy.measure.engines.onnxruntime_engine import profile, refuse_heavy_fall_back
from vpdeploy.measure.latency import Pace, measure_latency

SAME = 1e-4  # float32, other orders of summation: 1e-6 seen
HERE = ["onnxruntime-cpu", "openvino-cpu", "torch-eager", "torch-compile"]
CUDA = ["onnxruntime-cuda", "onnxruntime-tensorrt", "torch-cudagraphs"]


class Small(nn.Module):
    form = "float"

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten())
        self.head = nn.Linear(4 * 4 * 4, 5)

    def forward(self, x):
        return self.head(self.layers(x))


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Subject:
    path = tmp_path_factory.mktemp("engines") / "small.onnx"
    torch.onnx.export(
        Small().eval(), (torch.zeros(2, 3, 8, 8),), path, dynamo=True, opset_version=18, external_data=False, verbose=False,
        dynamic_shapes=({0: torch.export.Dim("n", min=1, max=64)},), input_names=["image"], output_names=["logits"],
    )  # fmt: skip
    return Subject(path, lambda: Small())


def images(batch: int = 3) -> np.ndarray:
    return np.random.default_rng(0).random((batch, 3, 8, 8), np.float32)


@pytest.fixture(autouse=True)
def threads_put_back():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def needs(engine: str) -> None:
    if engine == "openvino-cpu" and importlib.util.find_spec("openvino") is None:
        pytest.skip("OpenVINO is not installed")


@pytest.mark.filterwarnings("ignore")  # of compilers, who warn of themselves
@pytest.mark.parametrize("engine", HERE)
def test_every_engine_computes_what_torch_does_and_says_what_it_used(engine, small):
    needs(engine)
    session = open_session(small, Setting(engine, threads=1))
    with torch.no_grad():
        expected = Small().eval()(torch.from_numpy(images())).numpy()
    logits = session(images())
    assert logits.dtype == np.float32 and np.abs(logits - expected).max() <= SAME * np.abs(expected).max()
    assert (session.about["engine"], session.about["device"], session.about["threads"]) == (engine, "cpu", 1)
    library = engine.partition("-")[0]
    assert session.about[library] == importlib.import_module(library).__version__


@pytest.mark.parametrize("engine", CUDA)
def test_what_is_not_here_is_refused_before_anything_is_opened(engine, small):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    for ask in (check_engine, lambda setting: open_session(small, setting)):
        with pytest.raises(EngineError, match=f"engine {engine}: (this ONNX Runtime .* has no|torch .* sees 0 GPUs)"):
            ask(Setting(engine))


def test_an_unknown_engine_is_told_those_that_there_are():
    with pytest.raises(EngineError, match="engine: got 'tvm'; expected one of onnxruntime-cpu, .*torch-cudagraphs"):
        check_engine(Setting("tvm"))
    assert set(HERE) | set(CUDA) == set(ENGINES)


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_falls_back_is_an_error(small, monkeypatch):
    """What ONNX Runtime does where the provider is built in and its libraries are missing: another one, and a log line."""
    monkeypatch.setattr(onnxruntime_engine.ort, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    if "CUDAExecutionProvider" in ort.capi._pybind_state.get_available_providers():
        pytest.skip("this ONNX Runtime has the provider")
    with pytest.raises(
        EngineError, match="fell back to CPUExecutionProvider for small.onnx; expected CUDAExecutionProvider"
    ):
        open_session(small, Setting("onnxruntime-cuda"))


def test_nodes_that_run_elsewhere_are_an_error_where_they_take_time(small):
    nodes = profile(small.path, images(), setting=Setting(), runs=5)
    assert {node["provider"] for node in nodes} == {"CPUExecutionProvider"} and all(node["ms"] >= 0 for node in nodes)
    refuse_heavy_fall_back(nodes, Setting())
    with pytest.raises(
        EngineError, match=r"engine onnxruntime-cuda: ran .*\d x .*Conv.* on the CPU; expected all on the GPU"
    ):
        refuse_heavy_fall_back(nodes, Setting("onnxruntime-cuda"))
    refuse_heavy_fall_back([{"op": "Shape", "provider": "CPUExecutionProvider"}], Setting("onnxruntime-cuda"))


@pytest.mark.parametrize("setting", [
    Setting("onnxruntime-cpu", precision="fp16"), Setting("onnxruntime-cpu", device="cuda:0"),
    Setting("torch-eager", precision="fp16"), Setting("torch-eager", device="tpu"), Setting("torch-cudagraphs", device="cpu"),
    Setting("onnxruntime-cuda", device="cpu"), Setting("openvino-cpu", device="cuda:0"),
])  # fmt: skip
def test_what_an_engine_cannot_do_is_refused_with_what_it_can(setting):
    with pytest.raises(EngineError, match=rf"engine {setting.engine}: (got|fp16) .*expected"):
        check_engine(setting)


def test_an_engine_that_is_not_installed_says_what_to_install(small, monkeypatch):
    true_import = importlib.import_module

    def without(name, *args):
        if name == "openvino":
            raise ImportError(name)
        return true_import(name, *args)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(
        EngineError, match=r"OpenVINO is not installed; install vpdeploy\[openvino\], or choose another"
    ):
        check_engine(Setting("openvino-cpu"))


def test_a_file_alone_has_no_module_and_a_module_alone_no_file(small):
    with pytest.raises(EngineError, match="engine torch-eager: runs torch modules, and a file of itself holds none"):
        open_session(Subject(small.path), Setting("torch-eager"))
    with pytest.raises(EngineError, match="engine onnxruntime-cpu: runs ONNX files; expected an exported one"):
        open_session(Subject(None, small.module), Setting())
    with pytest.raises(VpdeployError, match=r"gone.onnx: no such file"):
        open_session(Subject(Path("gone.onnx")), Setting())


def test_a_file_that_openvino_cannot_read_is_told(tmp_path):
    needs("openvino-cpu")
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(VpdeployError, match=r"broken.onnx: OpenVINO .* cannot open it: .*; expected a whole ONNX file"):
        open_session(Subject(path), Setting("openvino-cpu"))


class Placed(nn.Module):
    """What ships: something in float32 in front of a backbone."""

    form = "uint8"

    def __init__(self):
        super().__init__()
        self.backbone = Small()

    def forward(self, image):
        return self.backbone(image.permute(0, 3, 1, 2).float() / 255)


def test_a_lower_precision_is_the_backbones():
    photos = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    expected = open_session(Subject(None, Placed), Setting("torch-eager"))(photos)
    found = open_session(Subject(None, Placed), Setting("torch-eager", precision="bf16"))(photos)
    assert 1e-6 < np.abs(found - expected).max() <= 0.03 * np.abs(expected).max()  # bf16 has 8 bits


def test_what_comes_after_a_measurement_has_its_own_threads_and_limits():
    torch.set_num_threads(2)
    limit = torch._dynamo.config.recompile_limit
    with settings_kept(Setting("torch-compile")):  # more than this of one class ran uncompiled, in silence
        assert torch._dynamo.config.recompile_limit > limit and torch._dynamo.config.fail_on_recompile_limit_hit
    assert torch._dynamo.config.recompile_limit == limit and not torch._dynamo.config.fail_on_recompile_limit_hit
    subjects = {"one": Subject(None, Small)}
    pace = Pace(rounds=1, window=0.001, runs=1)
    measure_latency(subjects, images(), form="float", setting=Setting("torch-eager", threads=1), seconds=0.0, pace=pace)
    assert torch.get_num_threads() == 2
