"""timm's classifiers and their published weights: the only door to timm, which is an optional extra and slow to import."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from vpdeploy.errors import ModelError
from vpdeploy.models.architecture import Architecture
from vpdeploy.models.published import PublishedInput

# What timm.create_model takes beside the network's own arguments: weights come by model.weights alone.
NOT_ARGUMENTS = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")
LISTED = 12


def check_name(name: str) -> None:
    """Raises: ModelError when timm has no classifier ``name``, which is "NETWORK" or "NETWORK.TAG", or is not installed."""
    timm = _timm(name)
    network, _, tag = name.partition(".")
    known = timm.list_models()
    if network not in known:
        near = difflib.get_close_matches(network, known, n=3, cutoff=0.5)
        guess = f"did you mean {' or '.join(repr('timm:' + item) for item in near)}?"
        raise ModelError(
            f"model.name: got 'timm:{name}'; timm has no such network; "
            + (guess if near else "timm.list_models() gives all names")
        )
    if tag and name not in timm.models.get_arch_pretrained_cfgs(network):
        raise ModelError(
            f"model.name: got 'timm:{name}'; timm's {network} has the tags "
            f"{_shown(tag, _tags(network)) or 'none'}: use one of these, or 'timm:{network}'"
        )
    if _entry(name).classifier is None:
        raise ModelError(
            f"model.name: got 'timm:{name}', which has no classifier; expected a network that ends in one: choose another"
        )


def timm_architecture(name: str, *, args: Mapping[str, Any], published: str | None) -> Architecture:
    """timm's network ``name``, in the form that the weights ``published`` under that tag were trained in.

    A network whose weights bring no classifier (self-supervised ones) is made with one of a single class where no count
    is asked for: one that nobody keeps.

    Raises: ModelError for names that timm does not know and arguments that it does not take.
    """
    check_name(name)
    reserved = [key for key in NOT_ARGUMENTS if key in args]
    if reserved:
        raise ModelError(
            f"model.args: got {reserved[0]!r} for a timm network; weights are named by model.weights: remove it"
        )
    entry_name = name if published is None else _published(name, published)

    def make(classes: int | None) -> nn.Module:
        return _created(entry_name, args, classes=classes, pretrained=False)

    return Architecture(make, "num_classes" not in args, classifiers=_names(_entry(entry_name).classifier))


def published_tensors(name: str, weights: str, *, args: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of timm's published ``weights`` (a tag, or "DEFAULT") of network ``name``, fitted to ``args`` by timm.

    Raises: ModelError when there are none of that name, or they cannot be fetched.
    """
    entry_name = _published(name, weights)
    # As many classes as were published, whatever args say: who builds with another number hears of it when it loads.
    own = {key: value for key, value in args.items() if key != "num_classes"}
    try:
        return dict(_created(entry_name, own, classes=None, pretrained=True).state_dict())
    except Exception as e:  # whatever the clients of timm's stores raise
        raise ModelError(
            f"model.weights: {weights!r} of timm's {name} could not be fetched ({entry_name}): {e}; "
            "fetch that file by other means and give its path as model.weights"
        ) from e


def check_published(name: str, weights: str) -> None:
    """Raises: ModelError when timm's network ``name`` has no published ``weights``."""
    _published(name, weights)


def published_inputs(name: str, weights: str | None) -> list[PublishedInput]:
    """The inputs of network ``name``'s entries: first that of ``weights`` (None: of the name itself), then the others.

    Raises: ModelError for names that timm does not know.
    """
    check_name(name)
    first = _entry(name if weights is None else _published(name, weights))
    others = _timm(name).models.get_arch_pretrained_cfgs(name).values()
    return [PublishedInput(entry.input_size[-1], tuple(entry.mean), tuple(entry.std)) for entry in (first, *others)]


def _timm(name: str) -> ModuleType:
    try:
        import timm
    except ImportError as e:
        what = (
            "is not installed" if isinstance(e, ModuleNotFoundError) and e.name == "timm" else f"does not import: {e}"
        )
        raise ModelError(
            f"model.name: got 'timm:{name}', but timm {what}; expected it beside vpdeploy: "
            'pip install "vpdeploy[timm]"'
        ) from e
    return timm


def _entry(name: str) -> Any:
    """What timm publishes of ``name``: class count, input size, mean, std, the classifier's name. The default tag's."""
    return _timm(name).models.get_pretrained_cfg(name)


def _tags(network: str) -> list[str]:
    """The tags of ``network`` that have weights, the default one first."""
    models = _timm(network).models
    names = [name for name in models.get_arch_pretrained_cfgs(network) if models.is_model_pretrained(name)]
    first = f"{network}.{_entry(network).tag}"
    return [name.partition(".")[2] for name in sorted(names, key=lambda name: name != first)]


def _published(name: str, weights: str) -> str:
    """timm's name ("NETWORK.TAG") of the published ``weights``: a tag, with its network or without, or "DEFAULT"."""
    network, _, own = name.partition(".")
    tags = _tags(network)
    tag = (own or tags[0] if tags else "") if weights == "DEFAULT" else weights.removeprefix(f"{network}.")
    if tag not in tags:
        known = _shown(tag, tags)
        raise ModelError(
            f"model.weights: got {weights!r}; timm's {name} has {f'DEFAULT, {known}' if known else 'no published weights'}; "
            + ("use one of these, or " if known else "give ")
            + "a file that ends in .pt, .pth, .th or .safetensors"
        )
    return f"{network}.{tag}" if tag else network


def _created(entry_name: str, args: Mapping[str, Any], *, classes: int | None, pretrained: bool) -> nn.Module:
    arguments: dict[str, Any] = {} if classes is None else {"num_classes": classes}
    if classes is None and not _entry(entry_name).num_classes:
        arguments["num_classes"] = 1
    try:
        return _timm(entry_name).create_model(entry_name, pretrained=pretrained, **{**arguments, **args})
    except Exception as e:
        if pretrained:
            raise
        given = ", ".join(f"{key}={value!r}" for key, value in args.items()) or "none"
        raise ModelError(
            f"model.args: timm's {entry_name} failed with {given}: {type(e).__name__}: {e}; "
            "expected arguments that it takes"
        ) from e


def _names(classifier: str | tuple[str, ...]) -> tuple[str, ...]:
    return (classifier,) if isinstance(classifier, str) else tuple(classifier)


def _shown(asked: str, tags: list[str]) -> str:
    """The tags that are like ``asked``, or the first ones; empty when there are none."""
    near = difflib.get_close_matches(asked, tags, n=3, cutoff=0.5) or tags[:LISTED]
    rest = len(tags) - len(near)
    return ", ".join(near) + (f" and {rest} more" if rest else "")
