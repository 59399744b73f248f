"""From a [model] table to a network: names, factories, weights, heads, determinism, and every way it can fail."""

from __future__ import annotations

import copy
import random
import sys
import textwrap
import urllib.error
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from vpdeploy.errors import ModelError
from vpdeploy.models import torchvision_networks
from vpdeploy.models.build import BUILT_IN, build, check_forward
from vpdeploy.models.cifar_resnet import CifarResNet, cifar_resnet
from vpdeploy.recipe.tables import ModelTable

FACTORIES = """
    import torch
    from torch import nn
    from beside_factories import SIDE

    class Net(nn.Module):
        def __init__(self, num_classes=6, width=4):
            super().__init__()
            self.body, self.fc = nn.Conv2d(SIDE, width, 3), nn.Linear(width, num_classes)
        def forward(self, x):
            return self.fc(self.body(x).mean((2, 3)))

    def fixed(): return Net(6)
    def needs(classes): return Net(classes)
    def late():
        from beside_factories import LATE
        return Net(LATE)
    def half(): return Net(3).half().train().requires_grad_(False).to(memory_format=torch.channels_last)
    def parallel(): return nn.DataParallel(Net(3))
    def scripted():
        import warnings
        warnings.simplefilter("ignore")
        return torch.jit.trace(Net(3), torch.rand(1, 3, 8, 8))
    def lazy(): return nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
    def nothing(): return {"net": Net(3)}
    def broken(): return Net(3).nope
    def quits(): raise SystemExit("usage: train.py")
    ready = Net()
    number = 3
"""


@pytest.fixture
def factories(tmp_path: Path) -> Path:
    (tmp_path / "beside_factories.py").write_text("SIDE = 3\nLATE = 5\n")
    (tmp_path / "nets.py").write_text(textwrap.dedent(FACTORIES))
    return tmp_path / "nets.py"


def table(name: Any, **keys: Any) -> ModelTable:
    return ModelTable(name=str(name), **keys)


def same(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def message(given: ModelTable, *, classes: int = 4) -> str:
    with pytest.raises(ModelError) as e:
        build(given, classes=classes, seed=0)
    return str(e.value)


def saved(net: nn.Module, path: Path) -> str:
    torch.save(net.state_dict(), path)
    return str(path)


# --- without weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_networks_take_the_class_count(name):
    built = build(table(name), classes=4, seed=0)
    assert (built.head, built.classifier, built.source_classes) == ("keep", "linear", 4)
    assert isinstance(built.backbone, CifarResNet) and not built.backbone.training


@pytest.mark.parametrize("name", ["cifar_resnet8", "FILE:Net", "torchvision:squeezenet1_0"])
def test_construction_follows_the_seed_alone_and_leaves_global_streams_alone(name, factories):
    name = name.replace("FILE", str(factories))
    states = torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)["state"]["key"].tolist()
    first = build(table(name), classes=4, seed=5).backbone
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1] and np.random.get_state(legacy=False)["state"]["key"].tolist() == states[2]
    torch.rand(3)
    random.random()
    assert same(first, build(table(name), classes=4, seed=5).backbone)
    assert not same(first, build(table(name), classes=4, seed=6).backbone)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("name", "classifier"), [
    ("resnet18", "fc"), ("squeezenet1_0", "classifier.1"), ("mobilenet_v3_small", "classifier.3"), ("googlenet", "fc"),
])  # fmt: skip
def test_torchvision_networks_are_built_with_the_class_count(name, classifier):
    built = build(table(f"torchvision:{name}"), classes=7, seed=0)
    assert (built.head, built.classifier, built.source_classes) == ("keep", classifier, 7)
    check_forward(built.backbone, canvas_size=64, classes=7)
    assert isinstance(copy.deepcopy(built.backbone).train()(torch.rand(2, 3, 64, 64)), torch.Tensor)


def test_torchvision_arguments():
    built = build(table("torchvision:resnet18", args={"num_classes": 9, "width_per_group": 64}), classes=4, seed=0)
    assert (built.head, built.source_classes) == ("replace", 9)
    assert built.backbone.get_submodule("fc").out_features == 4


# --- factories ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("factory", "args", "head", "count"), [
    ("Net", {}, "keep", 4), ("Net", {"num_classes": 5}, "replace", 5), ("Net", {"width": 2}, "keep", 4),
    ("needs", {}, "keep", 4), ("fixed", {}, "replace", 6), ("late", {}, "replace", 5), ("parallel", {}, "replace", 3),
])  # fmt: skip
def test_factories(factories, factory, args, head, count):
    path = list(sys.path)
    built = build(table(f"{factories}:{factory}", args=args), classes=4, seed=0)
    assert (built.head, built.classifier, built.source_classes) == (head, "fc", count)
    assert sys.path == path
    check_forward(built.backbone, canvas_size=8, classes=4)


def test_module_in_the_current_folder(factories, monkeypatch):
    monkeypatch.chdir(factories.parent)
    monkeypatch.setitem(sys.modules, "nets", None)
    del sys.modules["nets"]
    assert build(table("nets:Net"), classes=4, seed=0).head == "keep"


def test_network_comes_out_plain(factories):
    net = build(table(f"{factories}:half"), classes=3, seed=0).backbone
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert all(p.requires_grad and p.is_contiguous() for p in net.parameters()) and not net.training


@pytest.mark.parametrize(("factory", "expected"), [
    ("nothing", "FILE:nothing' gave a dict; expected an nn.Module: name a class or function that returns the network"),
    ("broken", "FILE:broken' called with no arguments failed: AttributeError: 'Net' object has no attribute 'nope'"),
    ("quits", "FILE:quits' called with no arguments failed: SystemExit: usage: train.py (FILE, line "),
    ("scripted", "got a TorchScript module; expected the nn.Module before scripting or tracing: return that"),
    ("lazy", "'1.weight' of Sequential has no shape yet (a lazy module); expected a network with all its parameters"),
    ("ready", "FILE:ready', where 'ready' is of type Net; expected a class or function that returns an nn.Module; "
              "it is a network already: name a function that makes one"),
    ("number", "FILE:number', where 'number' is of type int; expected a class or function that returns an nn.Module"),
    ("fixedd", "FILE:fixedd', where 'fixedd' is nothing of that name; expected a class or function that returns an "
               "nn.Module; it has fixed"),
])  # fmt: skip
def test_factory_errors(factories, factory, expected):
    text = message(table(f"{factories}:{factory}"))
    assert text.startswith("model.name: ") and expected.replace("FILE", str(factories)) in text


def test_wrong_arguments_of_a_factory(factories):
    text = message(table(f"{factories}:Net", args={"depth": 3}))
    assert "Net' called with depth=3, num_classes=4 failed: TypeError: " in text
    assert "unexpected keyword argument 'depth'" in text and text.endswith(
        "mend it, or its arguments (a recipe's model.args)"
    )


@pytest.mark.parametrize(("code", "expected"), [
    ("x = 1\n1 / 0\n", "failed: ZeroDivisionError: division by zero (FILE, line 2); expected code that runs"),
    ("def f(:\n", "failed: SyntaxError: "),
    ("import not_installed_anywhere\n", "failed: ModuleNotFoundError: No module named 'not_installed_anywhere' ("),
    ("raise SystemExit(2)\n", "failed: SystemExit: 2"),
])  # fmt: skip
def test_code_that_cannot_be_imported(tmp_path, code, expected):
    file = tmp_path / "bad_import.py"
    file.write_text(code)
    text = message(table(f"{file}:Net"))
    assert (
        text.startswith(f"model.name: importing {str(file)!r} failed: ") and expected.replace("FILE", str(file)) in text
    )
    assert "vpdeploy_user_bad_import" not in sys.modules


def test_missing_file_and_module(tmp_path):
    file = tmp_path / "none.py"
    assert message(table(f"{file}:Net")) == (
        f"model.name: got '{file}:Net'; no such file {file}; expected path/to/file.py:factory"
    )
    assert message(table("no_such_package.nets:Net")).startswith(
        "model.name: got 'no_such_package.nets:Net'; no module named 'no_such_package' in this environment or the "
        "current folder; expected 'torchvision:NAME', 'timm:NAME', 'path/to/file.py:factory' or 'package.module:factory': "
        "install it"
    )


def test_cause_is_chained(factories):
    with pytest.raises(ModelError) as e:
        build(table(f"{factories}:broken"), classes=4, seed=0)
    assert isinstance(e.value.__cause__, AttributeError)


# --- names ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "hint"), [
    ("cifar_resnet21", "did you mean 'cifar_resnet"),
    ("resnet18", "did you mean 'torchvision:resnet18'?"),
    ("zzz", "built in: cifar_resnet8, cifar_resnet14, "),
    ("nets.py", "did you mean 'nets.py:factory', with the name of a class or function in that file?"),
    ("nets.py:", "expected a built-in network, "),
])  # fmt: skip
def test_unknown_names(name, hint):
    text = message(table(name))
    assert (
        text.startswith(f"model.name: got {name!r}; expected a built-in network, 'torchvision:NAME', ") and hint in text
    )


def test_unknown_torchvision_names():
    text = message(table("torchvision:resnet19"))
    assert text.startswith("model.name: got 'torchvision:resnet19'; torchvision has no such classifier; did you mean ")
    assert "'torchvision:resnet18'" in text
    assert "known: alexnet, " in message(table("torchvision:qqqqqqq"))


def test_wrong_torchvision_arguments():
    text = message(table("torchvision:resnet18", args={"depth": 3}))
    assert text.startswith("model.args: torchvision's resnet18 failed with depth=3: TypeError: ")
    assert text.endswith("expected arguments that it takes")


# --- weights and heads ----------------------------------------------------------------------------------------------


@pytest.fixture
def ten(tmp_path: Path) -> str:
    """A checkpoint of ten classes."""
    return saved(cifar_resnet(8, 10), tmp_path / "ten.pt")


@pytest.mark.parametrize(("head", "classes", "expected", "rows"), [
    ("auto", 10, "keep", 10), ("auto", 4, "replace", 4), ("auto", 12, "replace", 12), ("keep", 10, "keep", 10),
    ("replace", 10, "replace", 10), ("flm", 4, "flm", 10), ("ilm", 10, "ilm", 10),
])  # fmt: skip
def test_heads(ten, head, classes, expected, rows):
    built = build(table("cifar_resnet8", weights=ten, head=head), classes=classes, seed=1)
    source = torch.load(ten, weights_only=True)
    assert (built.head, built.source_classes) == (expected, 10)
    state = built.backbone.state_dict()
    assert state["linear.weight"].shape == (rows, 64)
    assert torch.equal(state["linear.weight"], source["linear.weight"]) == (expected != "replace")
    assert all(torch.equal(t, source[name]) for name, t in state.items() if not name.startswith("linear"))

    again = table("cifar_resnet8", weights="gone.pt", head=expected)
    rebuilt = build(
        again, classes=classes, seed=1, with_weights=False, source_classes=10 if expected != "replace" else None
    )
    assert (rebuilt.head, rebuilt.classifier) == (built.head, built.classifier)
    assert {k: t.shape for k, t in rebuilt.backbone.state_dict().items()} == {k: t.shape for k, t in state.items()}


def test_head_messages(ten):
    assert message(table("cifar_resnet8", weights=ten, head="keep")) == (
        "model.head: got 'keep', but the classifier 'linear' has 10 classes and the data 4; expected equal counts; "
        "use 'replace' (train a new classifier), 'flm' or 'ilm' (map its classes)"
    )
    assert message(table("cifar_resnet8", weights=ten, head="keep"), classes=12).endswith(
        "has 10 classes and the data 12; expected equal counts; use 'replace' (train a new classifier)"
    )
    assert message(table("cifar_resnet8", weights=ten, head="ilm"), classes=12) == (
        "model.head: got 'ilm', but the classifier 'linear' has 10 classes and the data 12; a label map needs a source "
        "class for every class; use 'replace' (train a new classifier)"
    )


@pytest.mark.parametrize("factory", ["Net", "needs"])
def test_factory_with_weights_takes_the_class_count_of_the_checkpoint(factories, factory, tmp_path):
    name = f"{factories}:{factory}"
    weights = saved(build(table(name), classes=9, seed=3).backbone, tmp_path / "nine.pt")
    built = build(table(name, weights=weights, head="flm"), classes=4, seed=0)
    assert built.source_classes == 9
    assert same(built.backbone, build(table(name), classes=9, seed=3).backbone)


def test_half_network_keeps_the_precision_of_its_checkpoint(factories, tmp_path):
    net = build(table(f"{factories}:Net"), classes=3, seed=3).backbone
    weights = saved(net, tmp_path / "a.pt")
    assert same(build(table(f"{factories}:half", weights=weights), classes=3, seed=0).backbone, net)


def test_torchvision_checkpoint_of_other_class_count_and_fuller_or_older_layout(tmp_path):
    from torchvision import models

    whole = models.googlenet(num_classes=5, aux_logits=True, init_weights=False)
    built = build(table("torchvision:googlenet", weights=saved(whole, tmp_path / "g.pth")), classes=5, seed=0)
    state = whole.state_dict()
    assert built.head == "keep" and not any(name.startswith("aux") for name in built.backbone.state_dict())
    assert all(torch.equal(t, state[name]) for name, t in built.backbone.state_dict().items())

    dense = models.densenet121(num_classes=5)
    old = {name.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): t for name, t in dense.state_dict().items()}
    torch.save(old, tmp_path / "d.pth")
    built = build(table("torchvision:densenet121", weights=str(tmp_path / "d.pth")), classes=5, seed=0)
    assert same(built.backbone, dense)

    mnas = models.mnasnet0_5(num_classes=5)
    assert same(
        build(table("torchvision:mnasnet0_5", weights=saved(mnas, tmp_path / "m.pth")), classes=5, seed=0).backbone,
        mnas,
    )


def test_checkpoint_of_another_network_and_names_without_torchvision(ten):
    text = message(table("cifar_resnet14", weights=ten))
    assert text.startswith(f"model.weights {ten}: its ") and " missing: layer1.1.conv1.weight, " in text
    assert message(table("cifar_resnet8", weights="IMAGENET1K_V1")) == (
        "model.weights: got 'IMAGENET1K_V1' for 'cifar_resnet8'; expected a file that ends in .pt, .pth, .th, "
        ".safetensors; only 'torchvision:...' and 'timm:...' networks have weights by name: rename the file"
    )
    assert message(table("torchvision:resnet18", weights="V9")) == (
        "model.weights: got 'V9'; torchvision's resnet18 has IMAGENET1K_V1, DEFAULT; use one of these, or a file "
        "that ends in .pt, .pth, .th or .safetensors"
    )


def published(monkeypatch, answer: Any, **meta: Any) -> None:
    entry = SimpleNamespace(url="scheme:weights.pth", meta=meta, get_state_dict=answer)
    found = SimpleNamespace(__members__={"DEFAULT": entry})
    monkeypatch.setattr(torchvision_networks.models, "get_model_weights", lambda name: found)


def test_published_weights(monkeypatch):
    from torchvision import models

    net = models.googlenet(num_classes=1000, aux_logits=True, init_weights=False)

    def answer(**asked: Any):
        assert asked["weights_only"] is True and asked["check_hash"] is True and asked["map_location"] == "cpu"
        return net.state_dict()

    published(monkeypatch, answer)
    given = table("torchvision:googlenet", weights="GoogLeNet_Weights.DEFAULT")
    built = build(given, classes=4, seed=0)
    assert (built.head, built.source_classes) == ("replace", 1000)
    assert built.backbone.transform_input  # what the published weights were trained on
    state = net.state_dict()
    assert all(torch.equal(t, state[name]) for name, t in built.backbone.state_dict().items() if name[:3] != "fc.")

    rebuilt = build(table(given.name, weights="DEFAULT", head="replace"), classes=4, seed=0, with_weights=False)
    assert rebuilt.backbone.transform_input
    assert rebuilt.backbone.get_submodule("fc").out_features == 4


@pytest.mark.parametrize(
    "error", [urllib.error.URLError("no route to host"), RuntimeError("invalid hash value"), TimeoutError()]
)
def test_published_weights_that_cannot_be_fetched(monkeypatch, error):
    def answer(**asked: Any):
        raise error

    published(monkeypatch, answer)
    text = message(table("torchvision:squeezenet1_0", weights="DEFAULT"))
    assert text == (
        f"model.weights: 'DEFAULT' of torchvision's squeezenet1_0 could not be fetched from scheme:weights.pth: "
        f"{error}; fetch that file by other means and give its path as model.weights"
    )


# --- the forward ----------------------------------------------------------------------------------------------------


class Gives(nn.Module):
    def __init__(self, answer: Any):
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.answer = answer

    def forward(self, x: torch.Tensor) -> Any:
        return self.answer(self.norm(x))


def test_forward_leaves_the_network_unchanged():
    net = Gives(lambda x: torch.rand(2, 4)).train()
    before, stream = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    check_forward(net, canvas_size=8, classes=4)
    assert net.training and torch.equal(torch.get_rng_state(), stream)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


@pytest.mark.parametrize(("answer", "came", "fix"), [
    (lambda x: {"out": x, "aux": x}, "a dictionary with the keys 'out', 'aux'", "wrap the network in a factory"),
    (lambda x: (x.mean((2, 3)), None), "a tuple of 2 (a tensor [2, 3] of float32, a NoneType)", "wrap the network"),
    (lambda x: x, "a tensor [2, 3, 8, 8] of float32", "set model.head = 'replace'"),
    (lambda x: x.mean((2, 3)), "a tensor [2, 3] of float32", "set model.head = 'replace'"),
    (lambda x: torch.ones(2, 4, dtype=torch.int64), "a tensor [2, 4] of int64", "set model.head = 'replace'"),
    (lambda x: SimpleNamespace(logits=x), "a SimpleNamespace", "wrap the network in a factory"),
])  # fmt: skip
def test_forward_that_gives_something_else(answer, came, fix):
    with pytest.raises(ModelError) as e:
        check_forward(Gives(answer), canvas_size=8, classes=4)
    text = str(e.value)
    assert text.startswith(
        f"model.name: Gives gave {came} for 2 images; expected its logits, a float tensor [2, 4]; {fix}"
    )


def test_forward_that_fails_names_the_canvas():
    with pytest.raises(ModelError) as e:
        check_forward(nn.Sequential(nn.Flatten(), nn.Linear(48, 4)), canvas_size=8, classes=4)
    text = str(e.value)
    assert text.startswith("model.name: Sequential does not take 3x8x8 input: RuntimeError: ")
    assert text.endswith("; set input.canvas_size to what it needs")


def test_network_that_cannot_be_copied():
    with pytest.raises(ModelError, match=r"Gives cannot be copied: TypeError: .*; expected a network of plain modules"):
        check_forward(Gives(i for i in [1]), canvas_size=8, classes=4)
