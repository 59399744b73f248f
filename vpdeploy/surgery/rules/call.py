"""One operation of a forward, as the rules see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from torch import Tensor
from torch.utils._pytree import tree_leaves

from vpdeploy.surgery.labels import Ints, LabelBook, Labelled


@dataclass(frozen=True)
class Product:
    """Multiply-accumulates of one operation of ``module``: ``rest`` times the lengths of ``axes``, each told by its labels.

    ``constant``: made once for all images.
    """

    axes: tuple[Ints, ...]
    rest: float
    constant: bool
    module: str


@dataclass(frozen=True)
class Role:
    """A product in ``module`` writes ("out") or reads ("in") along these labels of a weight."""

    labels: Ints
    side: Literal["out", "in"]
    module: str


@dataclass
class Call:
    """One operation: its arguments, what is known of each tensor among them, and what came out."""

    book: LabelBook
    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    module: str
    known: dict[int, Labelled] = field(default_factory=dict)
    output: Any = None
    products: list[Product] = field(default_factory=list)
    roles: list[Role] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.func._overloadpacket.__name__

    @property
    def place(self) -> str:
        """What a reader calls the operation, and where it is."""
        told = self.name.removeprefix("_unsafe").strip("_")
        return f"{told} in {self.module}" if self.module else told

    @cached_property
    def tensors(self) -> list[Tensor]:
        return [leaf for leaf in tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def arg(self, name: str) -> Any:
        """An argument by its name in the operation's schema, given or default; None where there is none of that name."""
        for place, argument in enumerate(self.func._schema.arguments):
            if argument.name == name:
                if place < len(self.args) and not argument.kwarg_only:
                    return self.args[place]
                return self.kwargs.get(name, argument.default_value)
        return None

    def at(self, tensor: Tensor) -> Labelled:
        return self.known[id(tensor)]

    @property
    def first(self) -> Labelled:
        return self.at(self.args[0] if isinstance(self.args[0], Tensor) else self.tensors[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the output, the first where there are many."""
        return tuple(self.output.shape if isinstance(self.output, Tensor) else self.output[0].shape)


Rule = Callable[[Call], "Labelled | Sequence[Labelled]"]
