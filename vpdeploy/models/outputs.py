"""What a network gave, where logits were expected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor


def not_logits(output: Any, *, classes: int) -> str | None:
    """None for float logits [2, classes] of two images; otherwise what came, what was expected and what to do."""
    if _is_logits(output, classes):
        return None
    if isinstance(output, Tensor):
        fix = "set model.head = 'replace', or name the right layer as model.classifier"
    else:
        found = [access for access, value in _parts(output) if _is_logits(value, classes)]
        what = f"output{found[0]}" if found else "its logits"
        fix = f"wrap the network in a factory that returns {what} alone"
    return f"{_described(output)} for 2 images; expected its logits, a float tensor [2, {classes}]; {fix}"


def _is_logits(value: Any, classes: int) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.shape == (2, classes)


def _parts(output: Any) -> list[tuple[str, Any]]:
    """How each part of ``output`` is got at, and the part."""
    if isinstance(output, Mapping):  # Hugging Face's outputs, too
        return [(f"[{key!r}]", value) for key, value in output.items()]
    if isinstance(output, (tuple, list)):
        names = getattr(output, "_fields", None)  # of named tuples
        return [(f".{names[i]}" if names else f"[{i}]", value) for i, value in enumerate(output)]
    if is_dataclass(output) and not isinstance(output, type):
        return [(f".{field.name}", getattr(output, field.name)) for field in fields(output)]
    return []


def _described(output: Any) -> str:
    kind = type(output).__name__
    if isinstance(output, Tensor):
        return f"a tensor {list(output.shape)} of {str(output.dtype).removeprefix('torch.')}"
    if isinstance(output, Mapping):
        keys = ", ".join(repr(key) for key in output)
        return f"a {'dictionary' if type(output) is dict else kind} with the keys {keys}"
    if isinstance(output, (tuple, list)):
        parts = ", ".join(_described(item) for item in output[:4])
        return f"a {kind} of {len(output)} ({parts}{', ...' if len(output) > 4 else ''})"
    if is_dataclass(output):
        return f"a {kind} with the fields {', '.join(access[1:] for access, _ in _parts(output))}"
    return f"a {kind}"
