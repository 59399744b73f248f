"""Networks as they come: out of their wrappers, or refused by the name of what would be cut without effect and without a
word.
"""

from __future__ import annotations

import copy
import types
from itertools import chain

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.fx import GraphModule
from torch.nn.parameter import is_lazy
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from vpdeploy.errors import ModelError

# By name, because importing these takes seconds and a network that is none of them does not need it.
COMPILED = "torch._dynamo.eval_frame.OptimizedModule"
SHARDED = "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel"
QUANTIZED = (
    "torch.ao.nn.quantized.", "torch.ao.nn.qat.", "torch.ao.nn.intrinsic.quantized.", "torch.ao.nn.intrinsic.qat.",
    "torch.ao.quantization.",
)  # fmt: skip
# Marks for a later quantization: they change nothing in a float network.
QUANTIZATION_MARKS = ("QuantStub", "DeQuantStub", "QuantWrapper", "FloatFunctional")


def plain(network: nn.Module, *, where: str = "model.name") -> nn.Module:
    """``network`` out of DataParallel, DistributedDataParallel and torch.compile, otherwise as it came: the same object with
    the same tensors, or a copy of one that was compiled in place.

    Raises: ModelError, which begins with ``where``, for what cannot be taken apart: the part's name, what it is, and what
    to do about it.
    """
    while _is_parallel(network) or _is_a(network, COMPILED):
        network = next(network.children())
    root = type(network).__name__
    for name, module in network.named_modules():
        found = _hidden(module, f"net.get_submodule({name!r})" if name else "net")
        if found is not None:
            what, expected = found
            place = f"{name!r} of {root} is" if name else "got"
            raise ModelError(f"{where}: {place} {what}; expected {expected}")
    for name, tensor in chain(network.named_parameters(), network.named_buffers()):
        if (problem := _unusable(tensor)) is not None:
            raise ModelError(f"{where}: {name!r} of {root} {problem}")
    if any(module._compiled_call_impl is not None for module in network.modules()):
        return copy.deepcopy(network)  # of which nothing is compiled
    return network


def _is_a(module: nn.Module, path: str) -> bool:
    return any(f"{kind.__module__}.{kind.__qualname__}" == path for kind in type(module).__mro__)


def _is_parallel(module: nn.Module) -> bool:
    return isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel))


def _hidden(module: nn.Module, code: str) -> tuple[str, str] | None:
    """(what ``module`` is, what was expected instead) where its computation or weights cannot be seen; ``code`` gives it."""
    if isinstance(module, torch.jit.ScriptModule):
        return "a TorchScript module", "the nn.Module before scripting or tracing: return that"
    if _is_a(module, COMPILED):
        return "a compiled module (torch.compile)", "the nn.Module before compiling: put its _orig_mod in its place"
    if _is_parallel(module):
        kind = type(module).__name__
        return f"wrapped in {kind}", "the nn.Module inside: put its .module in its place"
    if _is_a(module, SHARDED):
        return (
            "sharded (FullyShardedDataParallel)",
            "a whole network: gather its full state_dict into a network that is not",
        )
    if isinstance(module, GraphModule) and any(isinstance(node.target, OpOverload) for node in module.graph.nodes):
        return (
            "an exported graph (torch.export), whose shapes are fixed and whose layers are gone",
            "the nn.Module before export: return that",
        )
    if _is_quantized(module):
        kind = type(module).__name__
        return f"quantized, or prepared for it ({kind})", "the float network: prune it first, and quantize what ships"
    forward = vars(module).get("forward")
    if forward is not None and not (isinstance(forward, types.MethodType) and forward.__self__ is module):
        return (
            "a module whose forward was replaced on the object: a copy of it would go on using the original's weights",
            "a forward that its class defines: remove what was put in its place (torch.compile, an accelerator, a patch)",
        )
    return _computed(module, code)


def _is_quantized(module: nn.Module) -> bool:
    kinds = [kind for kind in type(module).__mro__ if kind.__module__.startswith("torch.")]
    marked = any(kind.__name__ in QUANTIZATION_MARKS for kind in kinds)
    return not marked and any(f"{kind.__module__}.".startswith(QUANTIZED) for kind in kinds)


def _computed(module: nn.Module, code: str) -> tuple[str, str] | None:
    """Weights that a hook computes before every forward: such a module cannot be copied once it has run."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            by, tensor, call = "torch.nn.utils.weight_norm", hook.name, "torch.nn.utils.remove_weight_norm"
        elif isinstance(hook, SpectralNorm):
            by, tensor, call = "torch.nn.utils.spectral_norm", hook.name, "torch.nn.utils.remove_spectral_norm"
        elif isinstance(hook, prune.BasePruningMethod):
            by, tensor, call = "torch.nn.utils.prune", hook._tensor_name, "torch.nn.utils.prune.remove"
        else:
            continue
        return (
            f"a {type(module).__name__} whose {tensor} is computed at every forward ({by})",
            f"a plain {tensor}: fold it in by {call}({code}, {tensor!r}) before the network is given",
        )
    return None


def _unusable(tensor: Tensor) -> str | None:
    if is_lazy(tensor):
        return (
            "has no shape yet (a lazy module); expected a network with all its parameters: run it once on an example "
            "before it is given"
        )
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_quantized:
        kind = "quantized tensor" if type(tensor) is Tensor else type(tensor).__name__
        return f"is a {kind}; expected a plain float tensor: give the network before quantizing or distributing it"
    if tensor.is_meta:
        return "has no values (on the meta device); expected a network with all its weights: load them first"
    return None
