"""Which rule follows which operation. One without a rule holds every channel that it touches: excluded by name, never guessed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from vpdeploy.surgery.labels import Labelled
from vpdeploy.surgery.rules import elementwise, joining, mixing, norms, products, views
from vpdeploy.surgery.rules.call import Call, Rule

# By the name of an ATen operation without the underscore of its in-place form.
RULES: dict[str, Rule] = {
    **elementwise.RULES, **views.RULES, **joining.RULES, **mixing.RULES, **norms.RULES, **products.RULES
}  # fmt: skip


def follow(call: Call) -> list[tuple[Tensor, Labelled]]:
    """What is known of the outputs of ``call``; joins, products and roles are noted along the way."""
    outputs = [leaf for leaf in tree_leaves(call.output) if isinstance(leaf, Tensor)]
    constant = all(labelled.constant for labelled in call.known.values())
    labelled: Sequence[Labelled] = []
    if call.name in products.RULES or any(known.fields for known in call.known.values()):
        rule = RULES.get(call.name.removesuffix("_")) or (
            elementwise.pointwise if torch.Tag.pointwise in call.func.tags else elementwise.unknown
        )
        given = rule(call)
        labelled = [given] if isinstance(given, Labelled) else given
    found = []
    for number, tensor in enumerate(outputs):
        fields = labelled[number].fields if number < len(labelled) else ()
        found.append((tensor, Labelled(tuple(tensor.shape), fields, constant)))
    return found
