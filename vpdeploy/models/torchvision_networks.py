"""torchvision's classifiers and their published weights."""

from __future__ import annotations

import difflib
import pickle
import re
import sys
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torchvision import models

from vpdeploy.errors import ModelError
from vpdeploy.models.architecture import Architecture
from vpdeploy.models.published import PublishedInput

# Heads that only training uses; without them the training forward gives one tensor, like every other network's.
AUXILIARY = {"googlenet": ("aux1.", "aux2."), "inception_v3": ("AuxLogits.",)}
# DenseNet's published weights still carry the names of its first release: norm.1 for norm1.
DENSENET_NAMES = re.compile(r"^(.*denselayer\d+\.(?:norm|conv))\.([12]\..*)$")


def network_names() -> list[str]:
    """The names of torchvision's classifiers."""
    return models.list_models(module=models)


def check_name(name: str) -> None:
    """Raises: ModelError when torchvision has no classifier ``name``."""
    known = network_names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        guess = f"did you mean {' or '.join(repr('torchvision:' + item) for item in near)}?"
        hint = guess if near else f"known: {', '.join(known)}"
        raise ModelError(f"model.name: got 'torchvision:{name}'; torchvision has no such classifier; {hint}")


def torchvision_architecture(name: str, *, args: Mapping[str, Any], published: str | None) -> Architecture:
    """torchvision's network ``name``, in the form that the weights ``published`` under that name were trained in.

    Raises: ModelError for names that torchvision does not know and arguments that it does not take.
    """
    check_name(name)
    arguments = {**_arguments(name, published), **args}

    def make(classes: int | None) -> nn.Module:
        counted = arguments if classes is None else {"num_classes": classes, **arguments}
        try:
            return models.get_model(name, **counted)
        except Exception as e:
            given = ", ".join(f"{key}={value!r}" for key, value in args.items()) or "none"
            raise ModelError(
                f"model.args: torchvision's {name} failed with {given}: {type(e).__name__}: {e}; "
                "expected arguments that it takes"
            ) from e

    def adapt(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = {key: value for key, value in tensors.items() if not key.startswith(AUXILIARY.get(name, ()))}
        return {DENSENET_NAMES.sub(r"\1\2", key): value for key, value in kept.items()} if "densenet" in name else kept

    return Architecture(make, "num_classes" not in args, adapt)


def _arguments(name: str, published: str | None) -> dict[str, Any]:
    """What ``name`` must be built with so that published weights fit it and mean the same."""
    # Explicit init_weights: without it torchvision warns that its default will change.
    arguments: dict[str, Any] = {"aux_logits": False, "init_weights": True} if name in AUXILIARY else {}
    if published is None:
        return arguments
    meta = _published(name, published).meta
    if name in AUXILIARY:
        arguments["transform_input"] = True  # these weights were trained on inputs in [-1, 1]
    elif name.startswith("vit_"):
        arguments["image_size"] = meta["min_size"][0]
    elif name.startswith("maxvit_"):
        arguments["input_size"] = meta["min_size"]
    return arguments


def published_tensors(name: str, weights: str) -> dict[str, Tensor]:
    """The tensors of torchvision's published ``weights`` ("IMAGENET1K_V1", "DEFAULT") of network ``name``.

    Raises: ModelError when there are none of that name, or they cannot be fetched.
    """
    entry = _published(name, weights)
    try:
        return dict(
            entry.get_state_dict(progress=sys.stderr.isatty(), check_hash=True, map_location="cpu", weights_only=True)
        )
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as e:
        raise ModelError(
            f"model.weights: {weights!r} of torchvision's {name} could not be fetched from {entry.url}: {e}; "
            "fetch that file by other means and give its path as model.weights"
        ) from e


def check_published(name: str, weights: str) -> None:
    """Raises: ModelError when torchvision's network ``name`` has no published ``weights``."""
    _published(name, weights)


def published_inputs(name: str, weights: str | None) -> list[PublishedInput]:
    """The inputs of network ``name``'s published weights: first those of ``weights`` (None: the default ones), then the others.

    Raises: ModelError for names that torchvision does not know.
    """
    check_name(name)
    first = _published(name, weights or "DEFAULT")
    others = [entry for entry in models.get_model_weights(name) if entry is not first]
    presets = [entry.transforms() for entry in (first, *others)]
    return [PublishedInput(preset.crop_size[0], tuple(preset.mean), tuple(preset.std)) for preset in presets]


def _published(name: str, weights: str) -> Any:
    entries = models.get_model_weights(name).__members__
    entry = entries.get(weights.rpartition(".")[2])  # "ResNet18_Weights.IMAGENET1K_V1" is what torchvision's pages show
    if entry is None:
        raise ModelError(
            f"model.weights: got {weights!r}; torchvision's {name} has {', '.join(entries)}; "
            "use one of these, or a file that ends in .pt, .pth, .th or .safetensors"
        )
    return entry
