"""Networks as they come: what is unwrapped, and what is refused by name because a cut of it would do nothing, or wrong."""

from __future__ import annotations

import copy
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune, remove_spectral_norm, remove_weight_norm, spectral_norm, weight_norm

from vpdeploy.errors import ModelError
from vpdeploy.models.build import check_forward
from vpdeploy.models.plain import plain

# What torch itself says of old ways to compile, quantize and normalise.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(x).mean((2, 3)))


def message(network: nn.Module, **keys: Any) -> str:
    with pytest.raises(ModelError) as e:
        plain(network, **keys)
    return str(e.value)


def with_body(change: Callable[[nn.Module], nn.Module]) -> Net:
    net = Net().eval()
    net.body = change(net.body)  # type: ignore[assignment]
    return net


def with_convolution(change: Callable[[nn.Module], Any]) -> Net:
    net = Net().eval()
    change(net.body[0])
    return net


# --- what is unwrapped ----------------------------------------------------------------------------------------------


@pytest.fixture
def processes() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled(network: nn.Module) -> nn.Module:
    return torch.compile(network)  # type: ignore[return-value]


@pytest.mark.parametrize("wrap", [
    nn.DataParallel, compiled, nn.parallel.DistributedDataParallel, lambda net: nn.DataParallel(compiled(net)),
    lambda net: compiled(nn.DataParallel(net)), lambda net: compiled(nn.parallel.DistributedDataParallel(net)),
])  # fmt: skip
def test_wrappers_at_the_top(processes, wrap):
    net = Net()
    assert plain(wrap(net)) is net


def test_nothing_else_is_touched():
    net = Net().half().train().requires_grad_(False).to(memory_format=torch.channels_last)
    assert plain(net) is net
    assert net.training and not any(p.requires_grad for p in net.parameters())
    assert {p.dtype for p in net.parameters()} == {torch.float16}
    assert net.body[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_what_was_compiled_in_place_comes_as_a_copy():
    net = Net()
    net.body.compile()
    came = plain(net)
    assert came is not net and net.body._compiled_call_impl is not None
    assert all(module._compiled_call_impl is None for module in came.modules())
    assert all(torch.equal(a, b) for a, b in zip(came.parameters(), net.parameters(), strict=True))


@pytest.mark.parametrize("network", [
    torch.fx.symbolic_trace(Net()), nn.Sequential(torch.ao.quantization.QuantStub(), Net()),
    nn.Sequential(Net(), torch.ao.nn.quantized.FloatFunctional()),
])  # fmt: skip
def test_what_only_looks_odd(network):
    assert plain(network) is network


def test_a_forward_bound_to_the_module_itself_follows_its_copy():
    net = Net()
    net.forward = net.forward  # type: ignore[method-assign]
    assert plain(net) is net
    doubled = copy.deepcopy(net)
    with torch.no_grad():
        doubled.fc.bias.add_(1)
    image = torch.rand(1, 3, 8, 8)
    assert torch.allclose(doubled.eval()(image), net.eval()(image) + 1, atol=1e-5)


# --- what is refused ------------------------------------------------------------------------------------------------

IMAGE = torch.rand(2, 3, 8, 8)
SCRIPTED = "a TorchScript module; expected the nn.Module before scripting or tracing: return that"
EXPORTED = (
    "an exported graph (torch.export), whose shapes are fixed and whose layers are gone; expected the nn.Module before "
    "export: return that"
)
REPLACED = (
    "a module whose forward was replaced on the object: a copy of it would go on using the original's weights; expected a "
    "forward that its class defines: remove what was put in its place (torch.compile, an accelerator, a patch)"
)


def quantized(network: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(network, {nn.Linear})


def prepared(network: nn.Module) -> nn.Module:
    network = copy.deepcopy(network).train()
    network.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")  # type: ignore[assignment]
    return torch.ao.quantization.prepare_qat(network)


def replaced(network: nn.Module) -> nn.Module:
    network.forward = partial(type(network).forward, network)  # type: ignore[method-assign]
    return network


@pytest.mark.parametrize(("change", "expected"), [
    (torch.jit.script, SCRIPTED), (partial(torch.jit.trace, example_inputs=IMAGE), SCRIPTED),
    (lambda net: torch.export.export(net, (IMAGE,)).module(), EXPORTED),
    (replaced, REPLACED),
])  # fmt: skip
def test_refused_at_the_top_and_inside(change, expected):
    assert message(change(Net().eval())) == f"model.name: got {expected}"
    assert message(with_body(change)) == f"model.name: 'body' of Net is {expected}"
    assert message(nn.DataParallel(with_body(change)), where="model") == f"model: 'body' of Net is {expected}"


@pytest.mark.parametrize(("change", "expected"), [
    (compiled, "a compiled module (torch.compile); expected the nn.Module before compiling: put its _orig_mod in its place"),
    (nn.DataParallel, "wrapped in DataParallel; expected the nn.Module inside: put its .module in its place"),
])  # fmt: skip
def test_wrappers_inside(change, expected):
    assert message(with_body(change)) == f"model.name: 'body' of Net is {expected}"


def test_sharded_networks():
    kind = type("FullyShardedDataParallel", (nn.Sequential,), {
        "__module__": "torch.distributed.fsdp.fully_sharded_data_parallel"
    })  # fmt: skip
    assert message(kind(Net())) == (
        "model.name: got sharded (FullyShardedDataParallel); expected a whole network: gather its full state_dict into a "
        "network that is not"
    )


@pytest.mark.parametrize(("change", "place", "kind"), [
    (quantized, "fc", "Linear"), (prepared, "body.0", "Conv2d"),
])  # fmt: skip
def test_quantized_networks(change, place, kind):
    assert message(change(Net().eval())) == (
        f"model.name: {place!r} of Net is quantized, or prepared for it ({kind}); expected the float network: prune it "
        "first, and quantize what ships"
    )


def pruned(module: nn.Module) -> None:
    prune.l1_unstructured(module, "weight", 0.3)
    prune.random_unstructured(module, "weight", 0.3)


@pytest.mark.parametrize(("change", "by", "call", "fold"), [
    (weight_norm, "torch.nn.utils.weight_norm", "remove_weight_norm", remove_weight_norm),
    (spectral_norm, "torch.nn.utils.spectral_norm", "remove_spectral_norm", remove_spectral_norm),
    (pruned, "torch.nn.utils.prune", "prune.remove", prune.remove),
    (partial(prune.random_unstructured, name="bias", amount=0.5), "torch.nn.utils.prune", "prune.remove", prune.remove),
])  # fmt: skip
def test_weights_that_a_hook_computes(change, by, call, fold):
    net = with_convolution(change)
    tensor = "bias" if isinstance(change, partial) else "weight"
    assert message(net) == (
        f"model.name: 'body.0' of Net is a Conv2d whose {tensor} is computed at every forward ({by}); expected a plain "
        f"{tensor}: fold it in by torch.nn.utils.{call}(net.get_submodule('body.0'), {tensor!r}) before the network is given"
    )
    fold(net.get_submodule("body.0"), tensor)  # what the message says
    assert plain(net) is net
    alone = weight_norm(nn.Linear(3, 4))
    assert "remove_weight_norm(net, 'weight') before" in message(alone)


class Marked(nn.Parameter):
    pass


@pytest.mark.parametrize(("tensor", "expected"), [
    (Marked(torch.rand(3)), "is a Marked; expected a plain float tensor: give the network before quantizing or distributing it"),
    (nn.Parameter(torch.rand(3, device="meta")),
     "has no values (on the meta device); expected a network with all its weights: load them first"),
    (nn.UninitializedParameter(), "has no shape yet (a lazy module); expected a network with all its parameters: run it once "
     "on an example before it is given"),
])  # fmt: skip
def test_tensors_that_cannot_be_cut(tensor, expected):
    net = Net()
    net.body.register_parameter("scale", tensor)
    assert message(net) == f"model.name: 'body.scale' of Net {expected}"


def test_quantized_tensors():
    net = Net()
    net.register_buffer("table", torch.quantize_per_tensor(torch.rand(3), 0.1, 0, torch.quint8))
    assert message(net).startswith("model.name: 'table' of Net is a quantized tensor; expected a plain float tensor")


# --- the forward ----------------------------------------------------------------------------------------------------


class Wants(Net):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x * mask)


class WantsByName(Net):
    def forward(self, x: Tensor, *, mask: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x * mask)


class WantsNothing(Net):
    def forward(self) -> Tensor:  # type: ignore[override]
        return super().forward(IMAGE)


class MayTake(Net):
    def forward(self, x: Tensor, mask: Tensor | None = None, **_: Any) -> Tensor:  # type: ignore[override]
        return super().forward(x)


@pytest.mark.parametrize(("network", "needed"), [
    (Wants, "x, mask"), (WantsByName, "x, mask"), (WantsNothing, "no input"),
])  # fmt: skip
def test_a_forward_of_another_number_of_inputs(network, needed):
    with pytest.raises(ModelError) as e:
        check_forward(network(), canvas_size=8, classes=3)
    assert str(e.value) == (
        f"model.name: the forward of {network.__name__} takes {needed}; expected one input, a batch of images: wrap the "
        "network in a factory that gives it the rest"
    )


def test_a_forward_with_more_inputs_that_it_can_do_without():
    check_forward(MayTake(), canvas_size=8, classes=3)


Outputs = namedtuple("Outputs", ["logits", "aux"])


@dataclass
class Answer:
    features: Tensor
    logits: Tensor


class ModelOutput(OrderedDict):
    """Hugging Face's outputs are such dictionaries."""


class Gives(Net):
    def __init__(self, pack: Callable[[Tensor], Any], *, in_training: bool):
        super().__init__()
        self.pack, self.in_training = pack, in_training

    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        return self.pack(logits) if self.training or not self.in_training else logits


@pytest.mark.parametrize("in_training", [False, True])
@pytest.mark.parametrize(("pack", "came", "at"), [
    (lambda y: {"features": y[:, :1], "logits": y}, "a dictionary with the keys 'features', 'logits'", "output['logits']"),
    (lambda y: ModelOutput(loss=None, logits=y), "a ModelOutput with the keys 'loss', 'logits'", "output['logits']"),
    (lambda y: Outputs(y, None), "a Outputs of 2 (a tensor [2, 3] of float32, a NoneType)", "output.logits"),
    (lambda y: (y[:, :1], y), "a tuple of 2 (a tensor [2, 1] of float32, a tensor [2, 3] of float32)", "output[1]"),
    (lambda y: Answer(y[:, :1], y), "a Answer with the fields features, logits", "output.logits"),
    (lambda y: {"features": y[:, :1]}, "a dictionary with the keys 'features'", "its logits"),
])  # fmt: skip
def test_outputs_that_hold_the_logits(in_training, pack, came, at):
    with pytest.raises(ModelError) as e:
        check_forward(Gives(pack, in_training=in_training), canvas_size=8, classes=3)
    how = "gave, in training mode," if in_training else "gave"
    assert str(e.value) == (
        f"model.name: Gives {how} {came} for 2 images; expected its logits, a float tensor [2, 3]; wrap the network in a "
        f"factory that returns {at} alone"
    )


def test_a_network_that_cannot_be_tried_without_values_is_left_to_training():
    class Reads(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * float(self.fc.bias.sum())

    net = Reads()
    check_forward(net, canvas_size=8, classes=3)
    assert not net.fc.bias.is_meta
