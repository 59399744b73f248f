"""vpdeploy for people with a training loop of their own: groups, one-shot pruning, learned scores, cuts and export.

Nothing here trains, reads data or writes folders. A model that is given is never changed; what comes back has its dtype,
device, memory layout and training mode.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from vpdeploy import run_folder
from vpdeploy.deploy.bake import ConstantPrompt, Deployable
from vpdeploy.deploy.onnx_file import to_onnx
from vpdeploy.deploy.parity import check_parity
from vpdeploy.deploy.session import describe_input
from vpdeploy.errors import SurgeryError
from vpdeploy.models.attention.replace import replace_attention
from vpdeploy.models.plain import plain
from vpdeploy.prompts.canvas import Canvas
from vpdeploy.recipe.tables import IMAGENET_MEAN, IMAGENET_STD
from vpdeploy.scoring.criteria.magnitude import magnitude
from vpdeploy.scoring.select import Selector, build_selector, select
from vpdeploy.scoring.straight_through import StraightThrough, hard_mask
from vpdeploy.surgery import groups as finder
from vpdeploy.surgery.certificate import certify
from vpdeploy.surgery.cost import build_cost_model
from vpdeploy.surgery.cut import cut as cut_network
from vpdeploy.surgery.exactness import probe
from vpdeploy.surgery.gates import Gated
from vpdeploy.surgery.limit import Limit
from vpdeploy.surgery.plan import plan as plan_cuts
from vpdeploy.surgery.trace import told, twin_of
from vpdeploy.values import Certificate, ChannelGroups, Parity, PrunePlan, Selection

Scores = Literal["magnitude", "random"] | Mapping[str, Tensor]


@dataclass(frozen=True)
class Budget:
    """What may remain: ``ratio`` of the dense ``kind`` ("macs_ratio", "params_ratio" or "channel_ratio"), at most 1.

    Layers keep multiples of ``round_to`` channels; no group loses more than ``max_removal`` of its own.
    """

    ratio: float = 0.5
    kind: str = "macs_ratio"
    round_to: int = 8
    max_removal: float = 0.9


@dataclass(frozen=True)
class PruneResult:
    """``model``: the smaller network, its weights selected from the given one's and not tuned yet."""

    model: nn.Module
    plan: PrunePlan
    certificate: Certificate


def prepare(model: nn.Module) -> tuple[nn.Module, dict[str, str]]:
    """``model`` out of its wrappers and with equal attention of which whole heads can be removed, and what was replaced.

    Raises: ModelError for what would be cut without effect: compiled or scripted parts, weights computed by hooks.
    """
    return replace_attention(plain(model, where="model"))


def find_groups(
    model: nn.Module, example: Tensor, *, allow_approximate: bool = False, limit: Limit | None = None
) -> ChannelGroups:
    """Every channel group of ``model`` with its status: exact, approximate or excluded, each with the reason.

    example: [n, c, h, w], of which one image is looked at. Names are those of the network that ``prepare`` gives.

    Raises: ModelError, SurgeryError for what cannot be analysed; LimitError past ``limit``.
    """
    network, _ = prepare(model)
    return _groups(network, example, allow_approximate=allow_approximate, limit=limit)


def _groups(network: nn.Module, example: Tensor, *, allow_approximate: bool, limit: Limit | None) -> ChannelGroups:
    one, limit = example[:1].detach().to("cpu", torch.float32), limit or Limit()
    found = finder.find_groups(network, one, limit=limit)
    return probe(network, found, example=one, allow_approximate=allow_approximate, limit=limit)


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
) -> PruneResult:
    """Remove the channels with the lowest scores until ``macs_ratio`` of the multiply-accumulates remain; nothing is trained.

    example: [n, c, h, w], images if you have them: the certificate compares masked and pruned on them. scores: "magnitude"
    (group norms), "random" (by ``seed``), or group root -> [width], higher stays.

    Raises: BudgetError with the best reachable ratio; ModelError, SurgeryError for what cannot be pruned or proved.
    """
    network, replacements = prepare(model)
    groups = _groups(network, example, allow_approximate=allow_approximate, limit=None)
    budget = Budget(macs_ratio, round_to=round_to, max_removal=max_removal)
    selector = _selector(network, groups, budget, shape=tuple(example.shape[1:]))
    selection = select(selector, _as_arrays(scores, network, groups, seed=seed))
    plan = plan_cuts(network, groups.prunable, selection.mask, replacements=replacements)
    pruned = cut_network(network, plan)
    certificate = certify(network, pruned, groups, selection, canvas=example)
    return PruneResult(pruned, plan, replace(certificate, replacements=replacements))


def _selector(network: nn.Module, groups: ChannelGroups, budget: Budget, *, shape: tuple[int, ...]) -> Selector:
    return build_selector(
        groups.prunable,
        build_cost_model(network, groups.prunable, example=torch.zeros(1, *shape)),
        budget=budget.kind,
        ratio=budget.ratio,
        round_to=budget.round_to,
        max_removal=budget.max_removal,
    )


def _as_arrays(scores: Scores, network: nn.Module, groups: ChannelGroups, *, seed: int) -> dict[str, np.ndarray]:
    """One score for every channel of every prunable group."""
    if isinstance(scores, str):
        if scores not in ("magnitude", "random"):
            raise SurgeryError(
                f"scores: got {scores!r}; expected 'magnitude', 'random' or a mapping of group root to tensor"
            )
        if scores == "magnitude":
            scores = magnitude(network, groups.prunable)
        else:
            generator = torch.Generator().manual_seed(seed)
            scores = {group.root: torch.rand(group.width, generator=generator) for group in groups.prunable}
    problems = []
    for group in groups.prunable:
        given = scores.get(group.root)
        if given is None:
            problems.append(f"{group.root} is missing")
        elif tuple(given.shape) != (group.width,):
            problems.append(f"{group.root} is {tuple(given.shape)}, expected ({group.width},)")
        elif not bool(given.isfinite().all()):
            problems.append(f"{group.root} is not finite")
    unknown = sorted(set(scores) - {group.root for group in groups.prunable})
    problems += [f"{root} is no group that can be pruned" for root in unknown]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise SurgeryError(
            f"scores: {'; '.join(problems[:5])}{more}; expected one finite score for each channel of each prunable group: "
            "find_groups(model, example).prunable has their roots and widths"
        )
    return {group.root: scores[group.root].detach().double().cpu().numpy() for group in groups.prunable}


class Scored(nn.Module):
    """A copy of a network, frozen, with one learnable score per channel: what ``gated`` gives.

    Calling it applies, straight through, the best mask that the scores and the budget allow, recomputed every time; a loss
    that is backpropagated reaches ``scores`` [channels of all groups] (arXiv:1308.3432). ``open=True`` keeps every channel.
    """

    def __init__(
        self,
        network: nn.Module,
        groups: ChannelGroups,
        selector: Selector,
        scores: Tensor,
        replacements: Mapping[str, str],
    ):
        super().__init__()
        self.network = Gated(network, groups.prunable)
        self.scores = nn.Parameter(scores)
        self._groups, self._selector, self._replacements = groups, selector, dict(replacements)

    def forward(self, x: Tensor, *, open: bool = False) -> Tensor:
        ones = torch.ones_like(self.scores)
        gates = ones if open else StraightThrough.apply(self.scores, hard_mask(self._selector, self.scores))
        return self.network(x, gates)

    def selection(self) -> Selection:
        """The mask of the scores as they are, and how near it comes to the budget."""
        row = self.scores.detach().cpu().split([group.width for group in self._groups.prunable])
        return select(
            self._selector, {g.root: part.double().numpy() for g, part in zip(self._groups.prunable, row, strict=True)}
        )

    def plan(self) -> PrunePlan:
        """The cuts of that mask, for ``cut`` on the model that ``gated`` was given."""
        mask = self.selection().mask
        return plan_cuts(self.network.backbone, self._groups.prunable, mask, replacements=self._replacements)


def gated(
    model: nn.Module,
    groups: ChannelGroups,
    scores: Scores = "magnitude",
    budget: Budget | float = 0.5,
    *,
    seed: int = 0,
) -> Scored:
    """``model`` with learnable scores on ``groups`` (from ``find_groups`` on it) under ``budget`` (a number: of the MACs).

    Raises: BudgetError with the best reachable ratio; SurgeryError for scores that do not fit.
    """
    network, replacements = prepare(model)
    budget = budget if isinstance(budget, Budget) else Budget(budget)
    selector = _selector(network, groups, budget, shape=groups.shape)
    arrays = _as_arrays(scores, network, groups, seed=seed)
    row = np.concatenate([arrays[group.root] for group in groups.prunable])
    frozen = copy.deepcopy(network).requires_grad_(False)
    like = next(network.parameters())
    return Scored(frozen, groups, selector, torch.tensor(row, dtype=torch.float32, device=like.device), replacements)


def cut(model: nn.Module, plan: PrunePlan, example: Tensor) -> nn.Module:
    """``model`` with only what ``plan`` keeps, run once on ``example`` to see that it does.

    Raises: SurgeryError when the plan was made for another network, or the smaller one does not run.
    """
    pruned = cut_network(plain(model, where="model"), plan)
    like = next(pruned.parameters())
    try:
        with torch.no_grad():
            twin_of(pruned)(example.to(like.device, like.dtype))
    except Exception as e:
        raise SurgeryError(f"the network that the plan leaves does not run on {list(example.shape)}: {told(e)}") from e
    return pruned


def save_plan(plan: PrunePlan, path: Path | str) -> None:
    """Write ``plan`` as JSON."""
    run_folder.write_value(Path(path), plan)


def load_plan(path: Path | str) -> PrunePlan:
    """Raises: RunFolderError when the file is missing, damaged or no plan."""
    return run_folder.read_value(Path(path), PrunePlan)


@dataclass(frozen=True)
class ExportSpec:
    """What surrounds the backbone in the exported file.

    ``form`` "uint8": images as they come, [n, h, w, 3], resized inside ("stretch" or "shorter-side-crop"); "float": resized
    by the caller, [n, 3, image_size, image_size] in [0, 1]. ``prompt``: [3, canvas_size, canvas_size], added on the canvas.
    ``metadata``: further text entries of the file.
    """

    classes: Sequence[str]
    image_size: int = 224
    canvas_size: int | None = None
    resize: str = "stretch"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    form: Literal["uint8", "float"] = "uint8"
    prompt: Tensor | None = None
    opset: int = 18
    metadata: Mapping[str, str] | None = None


def export_onnx(
    model: nn.Module, spec: ExportSpec, path: Path | str, *, images: Sequence[np.ndarray] | None = None
) -> Parity:
    """Write ``model`` behind its preprocessing as one ONNX file, and prove that ONNX Runtime computes what torch does.

    images: uint8 [h, w, 3] each, for the proof; None: 32 that are made up. They must not all get the same logits.

    Raises: ModelError when it cannot be exported; ParityError when the file disagrees, or the proof would prove nothing.
    """
    network = (
        copy.deepcopy(plain(model, where="model")).to("cpu", torch.float32).to(memory_format=torch.contiguous_format)
    )
    side = spec.canvas_size or spec.image_size
    prompt = None if spec.prompt is None else ConstantPrompt(spec.prompt.detach().to("cpu", torch.float32))
    canvas = Canvas(spec.image_size, side, mean=spec.mean, std=spec.std, prompt=prompt)
    deployable = Deployable(network, canvas, form=spec.form, image_size=spec.image_size, resize_how=spec.resize)
    deployable.eval().requires_grad_(False)
    about = describe_input(
        form=spec.form, classes=spec.classes, image_size=spec.image_size, canvas_size=side, resize=spec.resize,
        mean=spec.mean, std=spec.std, version=version("vpdeploy"),
    )  # fmt: skip
    to_onnx(deployable, Path(path), opset=spec.opset, metadata={**about, **(spec.metadata or {})})
    shown = made_up_pictures(spec.image_size) if images is None else list(images)
    parity, _ = check_parity(deployable, Path(path), images=shown, vector_bytes=0, at_least=len(shown))
    return parity


def made_up_pictures(side: int) -> list[np.ndarray]:
    """32 pictures of waves in many colours, directions and scales, so that logits differ: uint8 [side, side, 3]."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:side, 0:side] / side
    made = []
    for _ in range(32):
        waves = [np.sin(2 * np.pi * (a * x + b * y + c)) for a, b, c in rng.normal(scale=4, size=(3, 3))]
        picture = np.stack(waves, axis=-1) * rng.uniform(20, 120) + rng.uniform(40, 215, size=3)
        made.append(
            np.clip(picture + rng.normal(scale=rng.uniform(0, 30), size=picture.shape), 0, 255).astype(np.uint8)
        )
    return made
