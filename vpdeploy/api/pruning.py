"""Groups, one-shot pruning under a budget, and plans: made, kept as JSON, acted on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vpdeploy import run_folder
from vpdeploy.api.context import undisturbed
from vpdeploy.api.scores import Scores, check_scores, is_number, listed, scores_of
from vpdeploy.errors import BudgetError, ModelError, SurgeryError
from vpdeploy.models.attention.replace import replace_attention
from vpdeploy.models.plain import plain
from vpdeploy.recipe.tables import COUNTED
from vpdeploy.scoring.select import Selector, build_selector, select
from vpdeploy.surgery import groups as finder
from vpdeploy.surgery.certificate import certify
from vpdeploy.surgery.cost import build_cost_model
from vpdeploy.surgery.cut import cut as cut_network
from vpdeploy.surgery.cut import with_replacements
from vpdeploy.surgery.exactness import probe
from vpdeploy.surgery.limit import Limit
from vpdeploy.surgery.paths import first_change
from vpdeploy.surgery.plan import plan as plan_cuts
from vpdeploy.surgery.plan_check import check_plan
from vpdeploy.surgery.trace import told, twin_of
from vpdeploy.values import Certificate, ChannelGroups, PrunePlan


@dataclass(frozen=True)
class Budget:
    """What may remain: ``ratio`` of the dense ``kind`` ("macs_ratio", "params_ratio" or "channel_ratio"), at most 1.

    Layers keep multiples of ``round_to`` channels; no group loses more than ``max_removal`` of its own.

    Raises: BudgetError listing what is out of range.
    """

    ratio: float = 0.5
    kind: str = "macs_ratio"
    round_to: int = 8
    max_removal: float = 0.9

    def __post_init__(self) -> None:
        problems = []
        if not (is_number(self.ratio) and 0 < self.ratio <= 1):
            problems.append(f"ratio: got {self.ratio!r}; expected what may remain, above 0 and at most 1")
        if self.kind not in COUNTED:
            problems.append(f"kind: got {self.kind!r}; expected one of {', '.join(COUNTED)}")
        if not (is_number(self.round_to) and isinstance(self.round_to, Integral) and self.round_to >= 1):
            problems.append(f"round_to: got {self.round_to!r}; expected a whole number from 1")
        if not (is_number(self.max_removal) and 0 < self.max_removal < 1):
            problems.append(f"max_removal: got {self.max_removal!r}; expected a share between 0 and 1")
        if problems:
            raise BudgetError(f"budget: {'; '.join(problems)}")


@dataclass(frozen=True)
class PruneResult:
    """``model``: the smaller network, its weights selected from the given one's and not tuned yet."""

    model: nn.Module
    plan: PrunePlan
    certificate: Certificate


@undisturbed()
def prepare(model: nn.Module, example: Tensor) -> tuple[nn.Module, dict[str, str]]:
    """``model`` out of its wrappers and with equal attention of which whole heads can be removed, and what was replaced.

    example: [n, c, h, w], of which one image is looked at.

    Raises: ModelError for what would be cut without effect: compiled or scripted parts, weights computed by hooks.
    """
    network = network_of(model)
    if next(network.parameters(), None) is None:
        raise ModelError(
            f"model: {type(network).__name__} has no parameters; expected a network with weights to remove"
        )
    found = replace_attention(network, example[:1])
    return found.network, found.replaced


def network_of(model: nn.Module) -> nn.Module:
    """``model`` out of its wrappers, otherwise as it came.

    Raises: ModelError for what is no module, or would be cut without effect.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"model: got a {type(model).__name__}; expected a torch.nn.Module")
    return plain(model, where="model")


@undisturbed()
def find_groups(
    model: nn.Module, example: Tensor, *, allow_approximate: bool = False, limit: Limit | None = None
) -> ChannelGroups:
    """Every channel group of ``model`` with its status: exact, approximate or excluded, each with the reason.

    example: [n, c, h, w], of which one image is looked at. Names are those of the network that ``prepare`` gives.

    Raises: ModelError, SurgeryError for what cannot be analysed; LimitError past ``limit``.
    """
    x, limit = _images(example), _limit(limit)
    network, _ = prepare(model, x)
    return _groups(network, x, allow_approximate=allow_approximate, limit=limit)


def _groups(network: nn.Module, example: Tensor, *, allow_approximate: bool, limit: Limit) -> ChannelGroups:
    one = example[:1].to("cpu", torch.float32)
    with limit.enforced() as now:
        found = finder.find_groups(network, one, limit=now)
        return probe(network, found, example=one, allow_approximate=allow_approximate, limit=now)


def _images(example: Any) -> Tensor:
    """A copy of ``example``, which a forward may write, seen to be a batch of images."""
    if not isinstance(example, Tensor):
        got = f"a {type(example).__name__}"
    elif example.is_meta:
        got = "a tensor without values (on the meta device)"
    elif example.layout != torch.strided:
        got = f"a {str(example.layout).removeprefix('torch.')} tensor"
    elif example.ndim != 4 or example.numel() == 0 or not example.is_floating_point():
        got = f"{list(example.shape)} of {str(example.dtype).removeprefix('torch.')}"
    elif not bool(example.isfinite().all()):
        got = "values that are not finite"
    else:
        return example.detach().clone()
    raise ModelError(f"example: got {got}; expected images as the model takes them: a float tensor [n, c, h, w]")


def _limit(limit: Limit | None) -> Limit:
    if limit is not None and not isinstance(limit, Limit):
        raise SurgeryError(f"limit: got {limit!r}; expected vpdeploy.Limit(seconds=..., gib=...)")
    return limit or Limit()


@undisturbed()
def prune_once(
    model: nn.Module,
    example: Tensor,
    *,
    macs_ratio: float = 0.5,
    scores: Scores = "magnitude",
    round_to: int = 8,
    seed: int = 0,
    max_removal: float = 0.9,
    allow_approximate: bool = False,
    limit: Limit | None = None,
) -> PruneResult:
    """Remove the channels with the lowest scores until ``macs_ratio`` of the multiply-accumulates remain; nothing is trained.

    example: [n, c, h, w], images if you have them: the certificate compares masked and pruned on them. scores: "magnitude"
    (group norms), "random" (by ``seed``), or group root -> [width], higher stays.

    Raises: BudgetError with the best reachable ratio; ModelError, SurgeryError for what cannot be pruned or proved;
    LimitError past ``limit``.
    """
    budget = Budget(macs_ratio, round_to=round_to, max_removal=max_removal)
    if macs_ratio == 1:
        raise BudgetError("budget: macs_ratio: got 1; expected below 1, as nothing would be removed")
    x, limit = _images(example), _limit(limit)
    check_scores(scores, seed)
    network, replacements = prepare(model, x)
    groups = _groups(network, x, allow_approximate=allow_approximate, limit=limit)
    selector = selector_of(network, groups, budget)
    selection = select(selector, scores_of(scores, network, groups, seed=seed))
    plan = plan_cuts(network, groups.prunable, selection.mask, replacements=replacements)
    pruned = cut_network(network, plan)
    certificate = certify(network, pruned, groups, selection, canvas=x)
    return PruneResult(pruned, plan, replace(certificate, replacements=replacements))


def selector_of(network: nn.Module, groups: ChannelGroups, budget: Budget) -> Selector:
    """Selection among the prunable ``groups`` of ``network`` under ``budget``.

    Raises: BudgetError with the best reachable ratio, or with why there is no group to prune.
    """
    if not groups.prunable:
        reasons = [f"{group.root}: {group.reason}" for group in groups.groups]
        raise BudgetError(
            f"budget.{budget.kind}: got {budget.ratio:g}, but nothing can be removed from {type(network).__name__}: "
            f"{listed(reasons) or 'no layer writes channels that another reads'}"
        )
    return build_selector(
        groups.prunable,
        build_cost_model(network, groups.prunable, example=torch.zeros(1, *groups.shape)),
        budget=budget.kind,
        requested=budget.ratio,
        round_to=budget.round_to,
        max_removal=budget.max_removal,
    )


@undisturbed()
def cut(model: nn.Module, plan: PrunePlan, example: Tensor) -> nn.Module:
    """``model`` with only what ``plan`` keeps, run once on ``example`` [n, c, h, w] to see that it does.

    Raises: ModelError, SurgeryError when the plan was made for another network or says what none does, or the smaller one
    does not run, or does something else than ``model`` because its forward looks at widths.
    """
    _check_is_plan(plan)
    x, network = _images(example), with_replacements(network_of(model), plan)
    check_plan(network, plan)
    pruned = cut_network(network, plan)
    like = next(pruned.parameters())
    x = x.to(like.device, like.dtype)
    try:
        with torch.no_grad():
            twin_of(pruned)(x)
    except Exception as e:
        raise SurgeryError(f"the network that the plan leaves does not run on {list(example.shape)}: {told(e)}") from e
    if (change := first_change(network, pruned, x)) is not None:
        raise SurgeryError(
            f"plan: at its widths the forward of {type(network).__name__} does something else: {change}; expected one that does "
            "the same at any width: write it so, or ask for another budget"
        )
    return pruned


def _check_is_plan(plan: Any) -> None:
    if not isinstance(plan, PrunePlan):
        raise SurgeryError(
            f"plan: got a {type(plan).__name__}; expected a PrunePlan: that of prune_once, of gated, or load_plan(path)"
        )


def save_plan(plan: PrunePlan, path: Path | str) -> None:
    """Write ``plan`` as JSON."""
    _check_is_plan(plan)
    run_folder.write_value(Path(path), plan)


def load_plan(path: Path | str) -> PrunePlan:
    """Raises: RunFolderError when the file is missing, damaged or no plan. ``cut`` sees whether it is one for its model."""
    again = "write it again by save_plan(plan, path)"
    return run_folder.load(PrunePlan, run_folder.read_bytes(Path(path), again=again), where=str(path), again=again)
