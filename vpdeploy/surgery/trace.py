"""One forward, watched: the labels of all channels pushed through its operations, and the products that it makes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from vpdeploy.errors import SurgeryError
from vpdeploy.models.copies import Convert, copied
from vpdeploy.models.gather import ChannelGather
from vpdeploy.models.plain import plain
from vpdeploy.models.watch import Watch, unfused_attention
from vpdeploy.surgery.labels import Components, Ints, LabelBook, Labelled, along, hold_all, merge
from vpdeploy.surgery.limit import Limit, LimitError
from vpdeploy.surgery.rules.call import Call, Product, Role
from vpdeploy.surgery.rules.table import follow

THROWS = 4  # forwards in training mode that leave parameters out


@dataclass(frozen=True)
class Trace:
    """What one forward showed.

    ``labels[tensor][axis]``: of every parameter and buffer, [size] each; ``roles``: labels that a product reads or writes,
    and the module that does; ``products``: of one image; ``path``: a hash of the operations and the modules that called them;
    ``shape``: of the image, [c, h, w]; ``choices``: modules that read a number that depends on the image.
    """

    labels: dict[str, tuple[Ints, ...]]
    components: Components
    roles: tuple[Role, ...]
    products: tuple[Product, ...]
    path: str
    shape: tuple[int, ...]
    choices: tuple[str, ...]


def look(backbone: nn.Module, example: Tensor, *, limit: Limit | None = None) -> Trace:
    """Watch one forward of ``backbone`` on ``example`` [n, 3, h, w], in eval mode, in float32 on the CPU wherever it is.

    Where it leaves parameters out, one in training mode follows: auxiliary classifiers lose what they read, too.
    ``backbone`` is unchanged.

    Raises: SurgeryError when the forward fails, with the module that it fails in, when it gives something else than one
    tensor, and when values of the image decide what runs.
    """
    twin = twin_of(backbone, _shared)
    with modules_followed(twin, limit) as where:
        watch = _Watch(twin, where)
        try:
            outputs = _watched(twin, watch, where, example)
        finally:
            watch.undo()
    for tensor in tree_leaves(outputs):
        if isinstance(tensor, Tensor):
            watch.book.pay(watch.known(tensor).debts)
            hold_all(watch.book, watch.known(tensor), "its channels are the network's outputs")
    if watch.choices and watch.unseen:
        unseen, *more = watch.unseen.values()
        raise SurgeryError(
            f"network {type(twin).__name__}: {watch.choices[0] or 'its forward'} reads a value that depends on the image, "
            f"and {unseen}{f' and {len(more)} more' if more else ''} took no part: for other images it may, and what removal "
            "does there is not known; expected a forward that takes the same layers for all images: remove the others"
        )
    products = tuple(p if p.constant else replace(p, rest=p.rest / len(example)) for p in watch.products)
    return Trace(
        watch.labels,
        watch.book.components(),
        tuple(watch.roles),
        products,
        watch.path.hexdigest(),
        tuple(example.shape[1:]),
        tuple(dict.fromkeys(watch.choices)),
    )


def _watched(twin: nn.Module, watch: _Watch, where: list[str], example: Tensor) -> Any:
    """Outputs in eval mode and, where parameters are left out, in training mode too."""
    places = {name: parameter.data_ptr() for name, parameter in twin.named_parameters()}
    try:
        with torch.no_grad(), plain_attention(), watch:
            watch.learn(example, Labelled(tuple(example.shape)))
            outputs = twin(example)
    except LimitError:
        raise
    except Exception as e:
        raise SurgeryError(
            f"network {type(twin).__name__}: its forward fails{in_module(where)}: {told(e)}; expected one that takes "
            f"images {list(example.shape)} and nothing else"
        ) from e
    if watch.foreign:
        raise SurgeryError(
            f"network {type(twin).__name__}: {watch.foreign} uses a parameter that the network does not hold, by a closure, "
            "a lambda or a hook: a pruned copy would go on using it, untuned; expected a module that holds it: "
            "write that function as an nn.Module"
        )
    for name, parameter in twin.named_parameters():
        if places[name] != parameter.data_ptr():  # as by weight.data = ...
            watch.hold_changed(name, "its forward")
    if not isinstance(outputs, Tensor):
        keys = f" with the keys {', '.join(map(repr, outputs))}" if isinstance(outputs, Mapping) else ""
        raise SurgeryError(
            f"network {type(twin).__name__}: its forward gives a {type(outputs).__name__}{keys}; expected one tensor, "
            "the logits: wrap it in a module that returns these alone"
        )
    return [outputs, _in_training(twin, watch, example)] if watch.unseen else outputs


def _in_training(twin: nn.Module, watch: _Watch, example: Tensor) -> Any:
    """Outputs in training mode, None where it does not run: then nothing that belongs to it is known. Again, with other
    random numbers, while parameters are left out: it may throw a die over them.
    """
    watch.training = True
    batch = example if len(example) > 1 else example.repeat(2, *(1,) * (example.ndim - 1))  # norms need two
    outputs: list[Any] = []
    for seed in range(THROWS):
        try:
            with torch.no_grad(), drawing(seed), plain_attention(), watch:
                watch.learn(batch, Labelled(tuple(batch.shape)))
                outputs.append(twin.train()(batch))
        except LimitError:
            raise
        except Exception:
            break
        if not watch.unseen:
            break
    return outputs


@contextmanager
def drawing(seed: int) -> Iterator[None]:
    """Random numbers from ``seed``; the caller's go on afterwards as if nothing had been."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not a GPU's, which stays as it is
        yield


def _shared(tensor: Tensor) -> Tensor:
    """On the CPU in float32, where it is that already the same numbers: a large network is in memory once less. What a forward
    writes into them is put back.
    """
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    # Those of inference mode have no views outside of it.
    return tensor.to("cpu", dtype, copy=tensor.is_inference()).detach()


def twin_of(network: nn.Module, convert: Convert = lambda tensor: tensor) -> nn.Module:
    """``models.copies.copied`` in eval mode, with a sentence where that fails.

    Raises: ModelError for what ``models.plain`` refuses, SurgeryError for others that cannot be copied.
    """
    try:
        return copied(network, convert).eval()
    except Exception as e:
        plain(network, where="network")  # most often a hook computes a weight, and this says which and how to fold it
        raise SurgeryError(
            f"network {type(network).__name__} cannot be copied: {told(e)}; expected plain modules, parameters and buffers"
        ) from e


@contextmanager
def plain_attention() -> Iterator[None]:
    """Attention as plain products: the fused forms hide them, and torch 2.11 has no formula for the CPU's own."""
    with unfused_attention(), sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def modules_followed(network: nn.Module, limit: Limit | None = None) -> Iterator[list[str]]:
    """The names of the modules being called, the innermost last; after a failure, those that it happened in.

    Raises: LimitError when a module is called past ``limit``.
    """
    where: list[str] = []

    def enter(name: str) -> None:
        where.append(name)
        if limit is not None:
            limit.check(name)

    def leave(*_: Any) -> None:
        where.pop()

    handles = []
    for name, module in network.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: enter(name)))
        handles.append(module.register_forward_hook(leave))
    try:
        yield where
    finally:
        for handle in handles:
            handle.remove()


def in_module(where: list[str]) -> str:
    return f" in {where[-1]}" if where and where[-1] else ""


def told(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


CHOICES = ("_local_scalar_dense", "equal")  # what bool(x), x.item() and torch.equal come to


class _Watch(Watch):
    """Asks the rules of every operation what becomes of the labels. ``where``: the modules being called."""

    def __init__(self, network: nn.Module, where: list[str]) -> None:
        super().__init__()
        self.book = LabelBook()
        self.products: list[Product] = []
        self.roles: list[Role] = []
        self.path = hashlib.sha256()
        self.unseen = {id(tensor): name for name, tensor in network.named_parameters()}  # no operation took them yet
        self.choices: list[str] = []  # modules that read a number that depends on the image
        self.foreign = ""  # a module that uses a parameter of another network
        self._storages = {
            tensor.untyped_storage().data_ptr(): (name, tensor)
            for name, tensor in network.named_parameters()
            if tensor.numel()
        }
        self._written: dict[str, tuple[Tensor, Tensor]] = {}  # a parameter, and what it was
        self.training = False
        self._where = where
        self._gathering = False
        self._known: Any = WeakIdKeyDictionary()
        self.labels: dict[str, tuple[Ints, ...]] = {}
        for name, tensor in (*network.named_parameters(), *network.named_buffers()):
            axes = self.labels[name] = tuple(self.book.fresh(size) for size in tensor.shape)
            fields = (along(labels, axis, tensor.ndim) for axis, labels in enumerate(axes))
            self.learn(tensor, Labelled(tuple(tensor.shape), tuple(f for f in fields if f.covered), constant=True))
        for name, module in network.named_modules():
            if isinstance(module, ChannelGather):
                module.register_forward_pre_hook(self._enter_gather)
                module.register_forward_hook(partial(self._leave_gather, name))

    def known(self, tensor: Tensor) -> Labelled:
        """Tensors of unknown origin are constants that the forward made: no image reached them."""
        if (known := self._known.get(tensor)) is not None:
            return known
        if isinstance(tensor, nn.Parameter):
            self.foreign = self.foreign or f"{self._where[-1] if self._where and self._where[-1] else 'its forward'}"
        return Labelled(tuple(tensor.shape), constant=True)

    def learn(self, tensor: Tensor, labelled: Labelled) -> None:
        self._known[tensor] = labelled

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        call = Call(self.book, func, args, kwargs or {}, self._where[-1] if self._where else "")
        call.known = {id(tensor): self.known(tensor) for tensor in call.tensors}
        for key in call.known:
            self.unseen.pop(key, None)
        if call.name in CHOICES and not self.training and not all(known.constant for known in call.known.values()):
            self.choices.append(call.module)
        if func._schema.is_mutable:
            self._note_writes(call)
        call.output = func(*args, **(kwargs or {}))
        if not self._gathering:
            for tensor, labelled in follow(call):
                self.learn(tensor, labelled)
            self.roles += call.roles
        if not self._gathering and not self.training:
            self.products += call.products
            self.path.update(f"{func} {call.module}\n".encode())
        return call.output

    def _note_writes(self, call: Call) -> None:
        """Weights that a forward changes are others for each image: what holds of the frozen ones is not known of them."""
        for argument, value in zip(call.func._schema.arguments, call.args, strict=False):
            if argument.is_write and isinstance(value, Tensor):
                name, parameter = self._storages.get(value.untyped_storage().data_ptr(), ("", value))
                if not name:
                    continue
                if name not in self._written:
                    self._written[name] = parameter, parameter.detach().clone()
                if not self.training:
                    self.hold_changed(name, call.place)

    def undo(self) -> None:
        """Parameters as they were before the forward: the network that was copied holds them, too."""
        for parameter, before in self._written.values():
            parameter.data.copy_(before)

    def hold_changed(self, name: str, place: str) -> None:
        for labels in self.labels[name]:
            self.book.hold(labels, f"{place} changes {name} whenever it runs")

    def _enter_gather(self, module: ChannelGather, args: tuple[Tensor, ...]) -> None:
        self._gathering = True

    def _leave_gather(self, name: str, module: ChannelGather, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Its two sides can lose channels apart: it is the reader of one group and the writer of another."""
        self._gathering = False
        source, target = (self.labels[f"{name}.{side}".lstrip(".")][0] for side in ("source", "target"))
        merge(
            self.book,
            self.known(args[0]),
            Labelled((1, len(source), 1, 1), (along(source, 1, 4),)),
            f"{name} reads values that stay",
        )
        debts = self.known(args[0]).debts
        self.learn(output, Labelled(tuple(output.shape), (along(target, 1, 4),), debts=debts))
        self.roles += [Role(source, "in", name), Role(target, "out", name)]
