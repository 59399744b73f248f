"""Which rule follows which operation. One without a rule holds every channel that it touches: excluded by name, never guessed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from operator import or_

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
    """What is known of the outputs of ``call``; joins, products and roles are noted along the way.

    What the rule holds is owed by the outputs. Where one is written in place, it is held at once: others may share memory.
    """
    outputs = [leaf for leaf in tree_leaves(call.output) if isinstance(leaf, Tensor)]
    constant = all(labelled.constant for labelled in call.known.values())
    debts = reduce(or_, (labelled.debts for labelled in call.known.values()), 0)
    labelled: Sequence[Labelled] = []
    if call.name in products.RULES or any(known.fields for known in call.known.values()):
        rule = RULES.get(call.name.removesuffix("_")) or (
            elementwise.pointwise if torch.Tag.pointwise in call.func.tags else elementwise.unknown
        )
        with call.book.deferred() as owed:
            given = rule(call)
            debts |= owed()
        labelled = [given] if isinstance(given, Labelled) else given
    if not outputs or any(id(tensor) in call.known for tensor in outputs):
        call.book.pay(debts)
    found = []
    for number, tensor in enumerate(outputs):
        fields = labelled[number].fields if number < len(labelled) else ()
        found.append((tensor, Labelled(tuple(tensor.shape), fields, constant, debts)))
    return found
