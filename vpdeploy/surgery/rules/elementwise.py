"""Operations on values one by one, and those of which nothing is known."""

from __future__ import annotations

from vpdeploy.surgery.labels import Labelled, hold_all, merge
from vpdeploy.surgery.rules.call import Call, Rule


def unknown(call: Call) -> Labelled:
    for known in call.known.values():
        hold_all(call.book, known, f"its channels pass through {call.place}, for which there is no rule")
    return Labelled(call.shape)


def _made(call: Call) -> Labelled:
    """A new tensor, of whose argument only type and device are asked."""
    return Labelled(call.shape)


def _restrided(call: Call) -> Labelled:
    """The same elements in the same places, as where only strides of axes of length 1 change; anything else is not known."""
    before, after = call.args[0], call.output
    same = before.shape == after.shape and before.storage_offset() == after.storage_offset()
    same &= all(a == b or n == 1 for a, b, n in zip(before.stride(), after.stride(), after.shape, strict=False))
    return call.first if same else unknown(call)


def pointwise(call: Call) -> Labelled:
    why = f"{call.place} combines its channels with values that stay"
    merged = call.at(call.tensors[0])
    for tensor in call.tensors[1:]:
        merged = merge(call.book, merged, call.at(tensor), why)
    return merged if merged.shape == call.shape else unknown(call)


RULES: dict[str, Rule] = {
    # Elementwise, though not tagged as such.
    **dict.fromkeys(
        ["hardswish", "log_sigmoid_forward", "rrelu_with_noise", "copy", "fill", "zero", "_to_copy", "detach", "alias",
         "lift_fresh", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "native_dropout",
         "_prelu_kernel", "bernoulli", "hardtanh"],
        pointwise,
    ),
    **dict.fromkeys(["new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided"], _made),
    "as_strided": _restrided,
}  # fmt: skip
