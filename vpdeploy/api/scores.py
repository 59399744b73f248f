"""One score for each channel: by name, or given."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from vpdeploy.errors import SurgeryError
from vpdeploy.scoring.criteria.magnitude import magnitude
from vpdeploy.values import ChannelGroups

Scores = Literal["magnitude", "random"] | Mapping[str, Tensor]
SHOWN = 5  # problems of one kind in a message


def check_scores(scores: Any, seed: Any) -> None:
    """Raises: SurgeryError when they are none, whatever the network; its analysis takes a while."""
    named = isinstance(scores, str) and scores in ("magnitude", "random")
    if not named and not isinstance(scores, Mapping):
        got = repr(scores) if scores is None or isinstance(scores, str) else f"a {type(scores).__name__}"
        raise SurgeryError(f"scores: got {got}; expected 'magnitude', 'random' or a mapping of group root to tensor")
    if not (is_number(seed) and isinstance(seed, Integral) and 0 <= int(seed) < 2**63):
        raise SurgeryError(f"seed: got {seed!r}; expected a whole number from 0, below 2**63")


def scores_of(scores: Scores, network: nn.Module, groups: ChannelGroups, *, seed: int) -> dict[str, np.ndarray]:
    """One score for every channel of every prunable group: root -> [width] float64.

    Raises: SurgeryError listing what does not fit.
    """
    if scores == "magnitude":
        scores = magnitude(network, groups.prunable)
    elif scores == "random":
        generator = torch.Generator().manual_seed(int(seed))
        scores = {group.root: torch.rand(group.width, generator=generator) for group in groups.prunable}
    assert not isinstance(scores, str), "check_scores has seen it"
    read = {root: _numbers(given) for root, given in scores.items()}
    problems = []
    for group in groups.prunable:
        given = read.get(group.root)
        if group.root not in read:
            problems.append(f"{group.root} is missing")
        elif given is None:
            problems.append(f"{group.root} holds no numbers")
        elif tuple(given.shape) != (group.width,):
            problems.append(f"{group.root} is {list(given.shape)}, expected [{group.width}]")
        elif not bool(given.isfinite().all()):
            problems.append(f"{group.root} is not finite")
    unknown = sorted(map(str, set(read) - {group.root for group in groups.prunable}))
    problems += [f"{root} is no group that can be pruned" for root in unknown]
    if problems:
        raise SurgeryError(
            f"scores: {listed(problems)}; expected one finite score for each channel of each prunable group: "
            "find_groups(model, example).prunable has their roots and widths"
        )
    return {group.root: cast(Tensor, read[group.root]).numpy() for group in groups.prunable}


def _numbers(given: Any) -> Tensor | None:
    """``given`` in float64 on the CPU; None for what is no array of real numbers."""
    try:
        tensor = torch.as_tensor(given).detach()
        return None if tensor.is_complex() else tensor.to("cpu", torch.float64).to_dense()
    except (TypeError, ValueError, RuntimeError, NotImplementedError):  # text, ragged lists, no values (meta)
        return None


def listed(problems: list[str]) -> str:
    more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return f"{'; '.join(problems[:SHOWN])}{more}"


def is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
