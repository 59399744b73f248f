"""Errors that a user can mend. The command line prints their message and exits with 1; every other exception is a bug
and keeps its traceback.

A message says where, what came, what was expected and what to do.
"""

from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


class VpdeployError(Exception):
    """Something outside vpdeploy's control is wrong: a recipe, a file, a model, the disk."""


class RecipeError(VpdeployError):
    """A recipe is wrong. ``problems`` holds every problem found, one line each, in the recipe's order."""

    def __init__(self, where: str, problems: list[str]):
        self.where = where
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__("\n".join([f"{where}: {count}", *(f"  {problem}" for problem in problems)]))


class DataError(VpdeployError):
    """A data set or an image cannot be used."""


class ModelError(VpdeployError):
    """A model or a checkpoint cannot be used."""


class SurgeryError(VpdeployError):
    """Channels cannot be removed, or removal would not be exact."""


class BudgetError(VpdeployError):
    """No allowed widths meet the budget. The message names the best reachable value."""


class ParityError(VpdeployError):
    """The exported file does not compute what the network computes, or the check would prove nothing."""


class RunFolderError(VpdeployError):
    """A run folder cannot be read, written or continued."""


def of_each(what: Iterable[T], read: Callable[[T], R]) -> list[R]:
    """What ``read`` makes of each. Raises: VpdeployError with what is wrong with all of them, not with the first alone."""
    found: list[R] = []
    wrong: list[VpdeployError] = []
    for one in what:
        try:
            found.append(read(one))
        except VpdeployError as e:
            wrong.append(e)
    if len(wrong) == 1:
        raise wrong[0]
    if wrong:
        raise VpdeployError("\n".join(map(str, wrong)))
    return found
