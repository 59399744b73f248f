"""Networks of any widths as files that can be timed, before anything is trained: random weights run as long as trained ones."""

from __future__ import annotations

import copy
import hashlib
import itertools
import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import nn

from vpdeploy import run_folder
from vpdeploy.deploy.bake import ConstantPrompt, Deployable
from vpdeploy.deploy.graph_cut import CannotCut, Graph, read_graph
from vpdeploy.deploy.onnx_file import to_onnx
from vpdeploy.deploy.session import describe
from vpdeploy.errors import BudgetError, VpdeployError
from vpdeploy.measure.engines import Setting, Subject, open_session
from vpdeploy.measure.inputs import random_images
from vpdeploy.models.classifier import take_rows
from vpdeploy.models.tokens.blocks import blocks_of
from vpdeploy.models.tokens.cross import grows_with_fewer
from vpdeploy.models.tokens.fold import fold, with_constants
from vpdeploy.models.tokens.prompt import new_tokens, put_tokens
from vpdeploy.prompts.canvas import Canvas
from vpdeploy.recipe.tables import Recipe
from vpdeploy.scoring.condense import count_kept
from vpdeploy.surgery.cost import Array
from vpdeploy.surgery.cut import cut
from vpdeploy.surgery.plan import plan, tensor_shapes, tensors
from vpdeploy.surgery.shapes import Shapes
from vpdeploy.values import Certificate, ChannelGroups, ChannelMask, GroupRecord, PrunePlan, Term
from vpdeploy.workbench import Workbench

MIB = 2**20
AGREES = 1e-3  # relative, in float32: a graph cut in a wrong place is off by tenths


class Candidates:
    """Files of the recipe's network at given widths of the prunable groups, in ``folder``.

    One export, cut in its graph; where the graph holds widths that cannot be followed (shuffles), each is cut in torch and
    exported. ``prompted``: with a prompt as large as the recipe's; where condensation may leave any number of tokens to a block,
    each has all of them.
    """

    def __init__(self, work: Workbench, groups: ChannelGroups, folder: Path, *, form: str, prompted: bool):
        self.recipe, self.folder, self.form, self.prompted = work.recipe, folder, form, prompted
        self._certificate = run_folder.dump_line(_long_certificate(groups, work))
        self._plain = _shaken(work.built.backbone)
        self.backbone = _with_tokens(self._plain, work.recipe) if prompted else copy.deepcopy(self._plain)
        for network in (self._plain, self.backbone):
            fold(network, canvas_size=work.recipe.input.canvas)
        _check_bytes_known(self.backbone, work.recipe)
        self.groups = with_constants(groups.prunable, self.backbone)
        self.classes = work.source.classes
        self._classifier = work.built.classifier if work.built.head in ("flm", "ilm") else None
        self.whole = folder / f"dense.{form}.onnx"
        self.export(self.backbone, self.whole)
        self._read = read_graph(self.whole, _arrays(self._rows_taken(self.backbone)))
        self._followed = True

    @property
    def graph(self) -> Graph | None:
        """What is cut; None where a cut in torch is something else."""
        return self._read if self._followed else None

    def dense_without_prompt(self) -> Path:
        """The dense arm's file."""
        if not self.prompted:
            return self.whole
        path = self.folder / f"unprompted.{self.form}.onnx"
        pixels_alone = None if self.recipe.prompt.tokens.learned_in("tune") else self.graph
        if not path.exists() and (pixels_alone is None or not pixels_alone.write_without_prompt(path)):
            self.export(self._plain, path, prompted=False)
        return path

    def dense_mib(self) -> float:
        """Of the dense arm's file, which holds neither prompt nor certificate."""
        return (self.dense_without_prompt().stat().st_size - len(self._certificate.encode())) / MIB

    def dense_module(self) -> nn.Module:
        return self.deployable(self._plain, prompted=False)

    def byte_terms(self, shapes: Shapes, narrowest: Array) -> list[Term]:
        """The bytes of all constants of the file, as they follow the widths. Where the graph cannot be cut, scaled so that the
        file of ``narrowest`` widths is met too: near for others, and no more.
        """
        terms = [part for term in self._read.terms() for part in self._of_plain(term)]
        if self._followed:
            return terms
        cost = shapes.sum_of(terms)
        told = cost.at(shapes.dense_widths) - cost.at(narrowest)
        with suppress(VpdeployError):  # a narrower one that cannot be exported is told where it is needed
            removed = self.whole.stat().st_size - self.file(narrowest).stat().st_size
            terms = [replace(term, amount=term.amount * removed / max(1.0, told)) for term in terms]
        return terms

    def _of_plain(self, term: Term) -> Iterator[Term]:
        """The same, of axes that the network has without tokens too."""
        plain, own = tensor_shapes(self._plain), tensor_shapes(self.backbone)
        places = {(m.tensor, m.axis): (group, m) for group in self.groups for m in group.members}

        def parts(tensor: str, axis: int) -> list[tuple[float, tuple[tuple[str, int], ...]]]:
            length = own[tensor][axis]
            if tensor in plain:
                further = length - plain[tensor][axis]  # units that an MLP was widened by
                return [(1.0, ((tensor, axis),)), *([(float(further), ())] if further else [])]
            if (tensor, axis) not in places:
                return [(float(length), ())]
            group, member = places[tensor, axis]
            other = next(m for m in group.members if m.tensor in plain)
            return [(len(member.indices) / len(other.indices), ((other.tensor, other.axis),))]

        for chosen in itertools.product(*(parts(*place) for place in term.axes)):
            amount = term.amount * math.prod(share for share, _ in chosen)
            yield replace(term, amount=amount, axes=tuple(place for _, axes in chosen for place in axes))

    @property
    def spare(self) -> int:
        """Bytes by which an export may be larger than these say."""
        return self._read.spare if self._followed else 0

    def subject(self, widths: Array) -> Subject:
        """What runs at ``widths`` [groups]: a file, and the module that it is of."""
        cuts, path = self._written(widths)
        return Subject(path, partial(self._module, cuts))

    def file(self, widths: Array) -> Path:
        """Of ``subject``."""
        return self._written(widths)[1]

    def _written(self, widths: Array) -> tuple[PrunePlan, Path]:
        cuts = plan(self.backbone, self.groups, self.mask(widths))
        name = hashlib.sha256(np.asarray(widths, np.int64).tobytes()).hexdigest()[:16]
        path = self.folder / f"{name}.{self.form}.onnx" if cuts.kept else self.whole
        if not path.exists():
            self._write(cuts, path)
        return cuts, path

    def mask(self, widths: Array) -> ChannelMask:
        """The first channels of each group, as many as ``widths`` say."""
        pairs = zip(self.groups, np.asarray(widths, int).tolist(), strict=True)
        return ChannelMask({g.root: tuple(i < width for i in range(g.width)) for g, width in pairs})

    def check(self, widths: Array) -> None:
        """See on the candidate of ``widths``, and on one whose widths are drawn between these and the dense ones, whether a cut
        in the graph is what a cut in torch is; otherwise do without. The narrowest tells nothing of how a width is split where
        one part of it is 1.
        """
        drawn, dense = np.random.default_rng(0), [group.width for group in self.groups]
        between = [drawn.integers(int(low), high, endpoint=True) for low, high in zip(widths, dense, strict=True)]
        self._followed = self._followed and self._follows(widths) and self._follows(np.array(between, float))

    def _follows(self, widths: Array) -> bool:
        cuts, path = plan(self.backbone, self.groups, self.mask(widths)), self.folder / f"check.{self.form}.onnx"
        with suppress(CannotCut, VpdeployError):
            self._read.write_cut(cuts, path, lambda: _arrays(cut(self.backbone, cuts)))
            return self._agrees(path, self._module(cuts))
        return False

    def _agrees(self, path: Path, network: nn.Module) -> bool:
        shape = (3, self.recipe.input.image_size, self.recipe.input.image_size)
        images = random_images(self.form, shape if self.form == "float" else (*shape[1:], 3), batch=2, seed=0)
        try:
            found = open_session(Subject(path), Setting(threads=1))(images)
        except Exception:  # a shape that is a constant of the graph: the runtime's errors share no base class but this
            return False
        with torch.inference_mode():
            expected = network(torch.from_numpy(images)).numpy()
        return bool(np.abs(found - expected).max() <= AGREES * np.abs(expected).max())

    def _write(self, cuts: PrunePlan, path: Path) -> None:
        if self.graph is not None:
            self.graph.write_cut(cuts, path, lambda: _arrays(cut(self.backbone, cuts)))
        else:
            self.export(cut(self.backbone, cuts), path)

    def _module(self, cuts: PrunePlan) -> nn.Module:
        return self.deployable(cut(self.backbone, cuts), prompted=self.prompted)

    def _rows_taken(self, backbone: nn.Module) -> nn.Module:
        """As a label map leaves it."""
        return backbone if self._classifier is None else take_rows(backbone, self._classifier, range(len(self.classes)))

    def deployable(self, backbone: nn.Module, *, prompted: bool) -> Deployable:
        """``backbone`` as it would ship."""
        table = self.recipe.input
        noise = torch.rand(3, table.canvas, table.canvas, generator=torch.Generator().manual_seed(0)) * 0.1
        canvas = Canvas(
            table.image_size,
            table.canvas,
            mean=table.mean,
            std=table.std,
            prompt=ConstantPrompt(noise) if prompted and self.recipe.prompt.pixels.learned_in("tune") else None,
        )
        deployable = Deployable(
            self._rows_taken(backbone),
            canvas,
            form="uint8" if self.form == "uint8" else "float",
            image_size=table.image_size,
            resize_how=table.resize,
        )
        return deployable.eval().requires_grad_(False)

    def export(self, backbone: nn.Module, path: Path, *, prompted: bool | None = None) -> None:
        """Raises: ModelError for a network that cannot be exported."""
        deployable = self.deployable(backbone, prompted=self.prompted if prompted is None else prompted)
        about = describe(self.recipe, arm="pruned", form=self.form, classes=self.classes, version=version("vpdeploy"))
        about["certificate"] = self._certificate
        to_onnx(deployable, path, opset=self.recipe.export.opset, metadata=about)


def is_prompted(recipe: Recipe, arm: str = "pruned") -> bool:
    """Whether the file of a pruned arm ships with a prompt."""
    return arm == "pruned" and recipe.prompt.learned_in("tune")


def _arrays(network: nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in tensors(network).items()}


def _shaken(backbone: nn.Module) -> nn.Module:
    """A copy on the CPU in which no tensor is constant: the exporter leaves out biases and norms that do nothing, and those of a
    network that is not trained yet do nothing.
    """
    network = copy.deepcopy(backbone).to("cpu", torch.float32).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for tensor in [*network.parameters(), *network.buffers()]:
        if tensor.is_floating_point() and tensor.numel() and bool((tensor == tensor.flatten()[0]).all()):
            tensor.add_(torch.rand(tensor.shape, generator=generator) * 0.1)
    return network


def _with_tokens(backbone: nn.Module, recipe: Recipe) -> nn.Module:
    """A copy with as many tokens as may ship."""
    network, table, condense = copy.deepcopy(backbone), recipe.prompt.tokens, recipe.condense
    if table.learned_in("tune"):
        share = condense.keep if condense.scope == "layer" else 1.0
        fewer = table.model_copy(update={"count": count_kept(share, table.count), "width": None})
        tokens = new_tokens(network, fewer, generator=torch.Generator().manual_seed(0))
        put_tokens(network, tokens, table)
    return network


def _check_bytes_known(folded: nn.Module, recipe: Recipe) -> None:
    """Raises: BudgetError when a budget counts bytes and a block that keeps fewer tokens than ``folded`` has would have more."""
    condense, budget = recipe.condense, recipe.budget
    bounded = {"file_mib", "memory_mib"} & {budget.kind, *budget.limits.given}
    if not bounded or condense.keep == 1 or condense.scope == "layer":
        return
    grows = [
        block.name
        for block in blocks_of(folded)
        if grows_with_fewer(getattr(block.module, "cross", None), block.attention)
    ]
    if grows:
        raise BudgetError(
            f"budget.{min(bounded)}: got a bound of bytes with condense.scope = 'global', which may leave any number of tokens "
            f"to {grows[0]}: fewer than {recipe.prompt.tokens.count} of cvpt may take more bytes; expected condense.scope = "
            "'layer', fewer tokens, or another bound"
        )


def _long_certificate(groups: ChannelGroups, work: Workbench) -> Certificate:
    """What is known, and numbers as long as they get: a file that ships is not larger for its own, and hardly smaller."""
    long, budget = -1.2345678901234567e-100, work.recipe.budget
    records = tuple(GroupRecord(g.root, g.width, g.width, g.status, g.reason, g.difference) for g in groups.groups)
    return Certificate(
        masked_vs_pruned=long,
        images=10**3,
        masked_vs_pruned_random=long,
        but_for_norms=long,
        mask_effect=long,
        budget=budget.kind,
        requested=budget.requested,
        reached=long,
        groups=records,
        replacements=work.built.replacements,
        limits={name: (asked, long) for name, asked in budget.limits.given.items()},
        measured_on=target_text(work.recipe),
    )


def target_text(recipe: Recipe) -> str:
    """The target in words: what budgets were measured on."""
    target = recipe.target
    form = target.form or min(recipe.export.forms)
    device = f" on {target.device}" if target.device else ""
    precision = f", {target.precision}" if target.precision != "fp32" else ""
    threads = "thread" if target.threads == 1 else "threads"
    return f"{target.engine}{device}, {target.threads} {threads}, batch {target.batch}{precision}, {form} form"
