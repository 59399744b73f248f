"""From a recipe's [model] table to a network ready for stage 0."""

from __future__ import annotations

import inspect
import random
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from vpdeploy.errors import ModelError, VpdeployError
from vpdeploy.models import timm_networks, torchvision_networks
from vpdeploy.models.architecture import Architecture
from vpdeploy.models.attention.replace import replace_attention
from vpdeploy.models.cifar_resnet import cifar_resnet
from vpdeploy.models.classifier import class_count, find_classifier, replace_classifier
from vpdeploy.models.copies import copied, on_meta
from vpdeploy.models.names import CIFAR_RESNETS, unknown_network
from vpdeploy.models.outputs import not_logits
from vpdeploy.models.plain import plain
from vpdeploy.models.user_factory import user_architecture
from vpdeploy.models.weights import fit_names, load_weights, read_tensors
from vpdeploy.recipe.problems import weights_of_no_file
from vpdeploy.recipe.tables import CHECKPOINT_SUFFIXES, ModelTable

Head = Literal["keep", "replace", "flm", "ilm"]

BUILT_IN = {name: partial(cifar_resnet, depth) for name, depth in CIFAR_RESNETS.items()}


@dataclass(frozen=True)
class Built:
    """A network in eval mode, float32, on the CPU, every parameter trainable.

    ``head`` is what the recipe's "auto" came to, ``classifier`` the name of the last layer, ``source_classes`` how many
    classes it had before a replacement. ``replacements``: the attention modules in whose places equal ones stand, of which
    whole heads can be removed: module name -> kind.
    """

    backbone: nn.Module
    head: Head
    classifier: str
    source_classes: int
    replacements: Mapping[str, str] = field(default_factory=dict)


def build(
    table: ModelTable, *, classes: int, seed: int, with_weights: bool = True, source_classes: int | None = None
) -> Built:
    """The network of ``table`` for data of ``classes`` classes; the same for the same ``seed``, whatever ran before.

    ``with_weights=False`` gives the same architecture without reading the weights, for a network whose tensors come
    from a run folder; ``table.head`` is then resolved and ``source_classes`` says how many classes a kept head has.

    Raises: ModelError for names, code, checkpoints and class counts that do not fit.
    """
    with seeded(seed):
        published = _published_name(table)
        architecture = architecture_of(table)
        # Published weights know their own class count; a file's is compared when it is read.
        count = source_classes if source_classes is not None else None if published else classes
        backbone = made(architecture, count)
        if with_weights and table.weights is not None:
            backbone = _filled(backbone, table, architecture, published)
    classifier, *others = classifiers_of(backbone, table, architecture)
    count = class_count(backbone, classifier)
    head = _head(table.head, count=count, classes=classes, classifier=classifier)
    if others and head != "keep":
        raise ModelError(
            f"model.head: {table.name!r} has {1 + len(others)} classifiers ({', '.join([classifier, *others])}) of {count} "
            f"classes, and the data {classes}; expected one that can be exchanged or mapped (head {head!r}): train it from "
            "scratch (without model.weights), or choose another network"
        )
    if head == "replace":
        generator = torch.Generator().manual_seed(seed)
        backbone = replace_classifier(backbone, classifier, classes, generator=generator)
    return Built(backbone, head, classifier, count)


def with_separate_heads(built: Built, *, canvas_size: int) -> Built:
    """``built`` with attention replaced by equal attention of which whole heads can be removed, where that is the same."""
    found = replace_attention(built.backbone, torch.zeros(1, 3, canvas_size, canvas_size), share=True)
    return replace(built, backbone=found.network, replacements=found.replaced)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Every global random stream that a network's code may draw from starts at ``seed``, and is put back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed: it would reseed the GPUs, too
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def made(architecture: Architecture, classes: int | None) -> nn.Module:
    """The network with ``classes`` classes, where it takes a count; plain, float32, on the CPU, in eval mode, trainable."""
    backbone = plain(architecture.make(classes if architecture.takes_classes else None))
    backbone = backbone.to("cpu").float().to(memory_format=torch.contiguous_format).eval()
    for tensor in backbone.parameters():
        tensor.requires_grad_(tensor.is_floating_point())
    return backbone


def _filled(backbone: nn.Module, table: ModelTable, architecture: Architecture, published: str | None) -> nn.Module:
    """The network with the classifier that its weights have, filled with them."""
    name, where = table.name.partition(":")[2], f"model.weights {published or table.weights}"
    if published is None:
        tensors = read_tensors(Path(table.weights or ""))
    elif table.name.startswith("timm:"):
        tensors = timm_networks.published_tensors(name, published, args=table.args)
    else:
        tensors = torchvision_networks.published_tensors(name, published)
    named = architecture.adapt(fit_names(backbone, tensors))
    classifier = classifiers_of(backbone, table, architecture)[0]
    in_file = _classes_in(named, classifier)
    if architecture.takes_classes and in_file not in (None, class_count(backbone, classifier)):
        backbone = made(architecture, in_file)
    load_weights(backbone, named, where=where)
    return backbone


def classifiers_of(backbone: nn.Module, table: ModelTable, architecture: Architecture) -> list[str]:
    """The names of the last layers: the recipe's, the publisher's, or the last one there is. Never none."""
    if table.classifier is not None or not architecture.classifiers:
        return [find_classifier(backbone, table.classifier)]
    return [find_classifier(backbone, name) for name in architecture.classifiers]


def _published_name(table: ModelTable) -> str | None:
    """The name of published weights, None for a file or for none at all."""
    if (problem := weights_of_no_file(table)) is not None:
        raise ModelError(problem)
    return None if table.weights is None or table.weights.endswith(CHECKPOINT_SUFFIXES) else table.weights


def _classes_in(tensors: Mapping[str, Tensor], classifier: str) -> int | None:
    weight = tensors.get(f"{classifier}.weight")
    return None if weight is None or weight.ndim == 0 else weight.shape[0]


def architecture_of(table: ModelTable) -> Architecture:
    """The network that ``table`` names, not made yet.

    Raises: ModelError for names that nobody knows, and code that cannot be imported.
    """
    name, published = table.name, _published_name(table)
    if name in BUILT_IN:
        return Architecture(lambda classes: BUILT_IN[name](**({} if classes is None else {"classes": classes})), True)
    source, _, attribute = name.partition(":")
    if source == "torchvision":
        return torchvision_networks.torchvision_architecture(attribute, args=table.args, published=published)
    if source == "timm":
        return timm_networks.timm_architecture(attribute, args=table.args, published=published)
    source, _, attribute = name.rpartition(":")
    if source and attribute:
        return user_architecture(name, args=table.args)
    raise ModelError(unknown_network(name, torchvision=torchvision_networks.network_names()))


def _head(asked: Head | Literal["auto"], *, count: int, classes: int, classifier: str) -> Head:
    """What becomes of a classifier of ``count`` classes on data of ``classes``."""
    if asked == "auto":
        return "keep" if count == classes else "replace"
    if asked == "keep" and count != classes:
        more = ", 'flm' or 'ilm' (map its classes)" if count > classes else ""
        raise ModelError(
            f"model.head: got 'keep', but the classifier {classifier!r} has {count} classes and the data {classes}; "
            f"expected equal counts; use 'replace' (train a new classifier){more}"
        )
    if asked in ("flm", "ilm") and count < classes:
        raise ModelError(
            f"model.head: got {asked!r}, but the classifier {classifier!r} has {count} classes and the data {classes}; "
            "a label map needs a source class for every class; use 'replace' (train a new classifier)"
        )
    return asked


def check_forward(backbone: nn.Module, *, canvas_size: int, classes: int, by_name: bool = False) -> None:
    """Try a copy of ``backbone`` on [2, 3, C, C]; it must give float logits [2, classes], in training too.

    ``by_name``: there is no recipe to mend, and no data whose classes would have to be met. Without memory or arithmetic
    where meta tensors do: large networks take seconds otherwise.

    Raises: ModelError that says what came instead.
    """
    name, side = type(backbone).__name__, canvas_size
    fit_size = f"{'give by --size' if by_name else 'set input.canvas_size to'} what it needs"
    _takes_images(backbone)
    image = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    try:
        empty = copied(backbone, on_meta)
    except Exception as e:
        raise ModelError(
            f"model.name: {name} cannot be copied: {type(e).__name__}: {e}; expected a network of plain "
            "modules, parameters and buffers: keep other things out of it"
        ) from e
    try:
        with torch.no_grad(), seeded(0):
            logits = _on_meta_or_here(empty, backbone, image)
    except VpdeployError:  # a limit that is enforced
        raise
    except Exception as e:
        raise ModelError(
            f"model.name: {name} does not take 3x{side}x{side} input: {type(e).__name__}: {e}; "
            f"{_other_channels(e) or fit_size}"
        ) from e
    if isinstance(logits, Tensor) and logits.ndim and len(logits) != 2:
        raise ModelError(
            f"model.name: {name} gave a tensor {list(logits.shape)} for 2 images of 3x{side}x{side}; expected one row for "
            f"each: its code reshapes images of another size (view, reshape, flatten); {fit_size}"
        )
    if (problem := _unfit(logits, classes=classes, by_name=by_name)) is not None:
        raise ModelError(f"model.name: {name} gave {problem}")
    with torch.no_grad(), seeded(0), suppress(Exception):  # where meta tensors do not do, training has the last word
        logits = empty.train()(image.to("meta"))
    if (problem := _unfit(logits, classes=classes, by_name=by_name)) is not None:
        raise ModelError(f"model.name: {name} gave, in training mode, {problem}")


def _other_channels(error: Exception) -> str | None:
    """What to do about a network that fails on three colours, by what torch's convolutions say then."""
    found = re.search(r"to have (\d+) channels, but got 3 channels", str(error))
    if found is None:
        return None
    return f"images have 3 channels, and it takes {found[1]}: wrap it in a network for colour images"


def _unfit(output: object, *, classes: int, by_name: bool) -> str | None:
    """``not_logits``; by name a float tensor [2, k] of any k will do."""
    if not by_name or not isinstance(output, Tensor):
        return not_logits(output, classes=classes)
    if output.ndim == 2 and output.is_floating_point():
        return None
    kind = str(output.dtype).removeprefix("torch.")
    return (
        f"a tensor {list(output.shape)} of {kind} for 2 images; expected its logits, a float tensor [2, classes]: "
        "let its forward return these"
    )


def _on_meta_or_here(empty: nn.Module, backbone: nn.Module, image: Tensor) -> object:
    """What ``backbone`` gives in eval mode, in shape and type. ``empty``: its copy on the meta device."""
    try:
        return empty.eval()(image.to("meta"))
    except Exception:  # wrong, or in need of real numbers: these tell
        return copied(backbone).eval()(image)


def _takes_images(backbone: nn.Module) -> None:
    """Raises: ModelError when the forward needs another number of inputs than one."""
    try:
        signature = inspect.signature(backbone.forward)
    except (ValueError, TypeError):  # compiled callables may not tell
        return
    try:
        signature.bind(None)
    except TypeError as e:
        needed = [
            name
            for name, parameter in signature.parameters.items()
            if parameter.default is parameter.empty
            and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
        raise ModelError(
            f"model.name: the forward of {type(backbone).__name__} takes {', '.join(needed) or 'no input'}; expected one "
            "input, a batch of images: wrap the network in a factory that gives it the rest"
        ) from e
