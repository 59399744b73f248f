"""The road, from top to bottom: a recipe goes in, a run folder with verified ONNX files and a report comes out.

    groups -> price -> fit -> search -> condense -> cut -> tune -> export -> bench -> report

A stage takes values and leaves one on disk before the next begins; a stage that is done is read back. The arms dense and
dense+prompt skip search and cut; everything else they share.
"""

from __future__ import annotations

import copy
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vpdeploy import run_folder
from vpdeploy.errors import RunFolderError, SurgeryError
from vpdeploy.measure.latency import told_unsteady
from vpdeploy.measure.macs import count_macs
from vpdeploy.models.tokens.fold import as_shipped
from vpdeploy.models.tokens.prompt import put_tokens, split_prompt
from vpdeploy.pricing.candidates import target_text
from vpdeploy.pricing.price import check_reachable, elsewhere, price, selector_for
from vpdeploy.pricing.settle import settle
from vpdeploy.progress import Display
from vpdeploy.recipe.reading import bench_table
from vpdeploy.recipe.tables import Recipe
from vpdeploy.reporting import write_report
from vpdeploy.scoring.select import Selector
from vpdeploy.scoring.select_weights import WeightSelector, weight_selector
from vpdeploy.shipping.bench import measure_arms, measure_more, unsteady
from vpdeploy.shipping.export import export_arms
from vpdeploy.stages import FIT_ELSEWHERE, Stage, arm_file, environment_file, read_recipe, training_stages
from vpdeploy.surgery.certificate import certify, certify_weights, enough_images
from vpdeploy.surgery.cut import cut
from vpdeploy.surgery.exactness import probe
from vpdeploy.surgery.groups import example_input, find_groups
from vpdeploy.surgery.limit import Limit
from vpdeploy.surgery.masked_weights import parts_of, set_to_zero, weight_shapes
from vpdeploy.surgery.plan import plan
from vpdeploy.training.compute import find_device
from vpdeploy.training.condense import condense
from vpdeploy.training.fit import fit
from vpdeploy.training.methods.registry import search
from vpdeploy.training.methods.task import SearchTask, scores_as_arrays, with_tensors
from vpdeploy.training.network import show
from vpdeploy.training.tune import tune
from vpdeploy.transfer import searching
from vpdeploy.values import ChannelGroups, ChannelMask, Dense, Found, Latency, Price, PrunePlan, Report
from vpdeploy.workbench import (
    Workbench,
    note_environment,
    open_workbench,
    read_dense,
    read_mask,
    write_dense,
    write_tuned,
)

CERTIFICATE_IMAGES = 32


def run(recipe: Recipe, folder: Path, *, redo: str | None = None, command: str, display: Display) -> Report:
    """The whole road. Interrupted anywhere, the same call goes on where it stopped."""
    with run_folder.locked(folder):
        _prune(recipe, folder, redo=redo, command=command, display=display)
        export_arms(_reopened(folder, display))
        work = _reopened(folder, display)
        measures = not work.is_done(Stage("bench"))
        measure_arms(work)
        if measures and (shaky := unsteady(folder, recipe)):
            display.say(f"warning: {told_unsteady(shaky)}")
        return write_report(folder)


def prune(recipe: Recipe, folder: Path, *, redo: str | None = None, command: str, display: Display) -> None:
    """From a recipe to the tuned network of every arm."""
    with run_folder.locked(folder):
        _prune(recipe, folder, redo=redo, command=command, display=display)


def search_only(recipe: Recipe, folder: Path, *, points: Sequence[Recipe], command: str, display: Display) -> None:
    """From a recipe to the scores of every pruned arm, and the tuned dense arms: what runs at other budgets share.

    points: the recipes of these. Raises: BudgetError for one that cannot be reached, before anything is trained where a formula
    tells; what has to be measured is told when its own run begins.
    """
    with run_folder.locked(folder):
        _prune(recipe, folder, redo=None, command=command, display=display, points=points)


def export(folder: Path, *, display: Display) -> None:
    """Bake and write every arm's ONNX files, check parity, and package them with vectors for ``verify``."""
    read_recipe(folder)  # a folder that is no run gets no lock file
    with run_folder.locked(folder):
        export_arms(_asked_for(Stage("export"), folder, display))


def bench(folder: Path, *, display: Display) -> list[Latency]:
    """Measure the exported files. The only stage that opens the test split. Gives the latencies that were not steady."""
    recipe = read_recipe(folder)
    with run_folder.locked(folder):
        measure_arms(_asked_for(Stage("bench"), folder, display))
        return unsteady(folder, recipe)


def bench_more(folder: Path, given: Mapping[str, Any], *, display: Display) -> tuple[Report, list[Latency]]:
    """Latencies of a run's files under further conditions, added to its report, and those of them that were not steady.

    given: key of [bench] -> value.
    """
    table = bench_table(given, base=read_recipe(folder).bench)
    with run_folder.locked(folder):
        shaky = measure_more(_reopened(folder, display), table)
        return write_report(folder), shaky


def report(folder: Path) -> Report:
    """Compare what was measured: report.json, report.md, report.html."""
    read_recipe(folder)
    with run_folder.locked(folder):
        return write_report(folder)


def _asked_for(stage: Stage, folder: Path, display: Display) -> Workbench:
    """The run, opened. Who asks for one stage expects new files and numbers: say so where nothing will be done."""
    work = _reopened(folder, display)
    if work.is_done(stage):
        again = shlex.join(["vpdeploy", "run", f"{folder / 'recipe.toml'}", "-o", f"{folder}", "--redo", stage.name])
        display.say(f"{stage.name}: done before, and nothing that it reads has changed; to do it again: {again}")
    return work


def _reopened(folder: Path, display: Display) -> Workbench:
    return open_workbench(read_recipe(folder), folder, redo=None, display=display)


def _prune(
    recipe: Recipe,
    folder: Path,
    *,
    redo: str | None,
    command: str,
    display: Display,
    points: Sequence[Recipe] | None = None,
) -> None:
    """``points``: the recipes of runs that go on from here; nothing is cut then."""
    work = open_workbench(recipe, folder, redo=redo, display=display)
    trains = not all(work.is_done(stage) for stage in training_stages(work.recipe))
    if trains:
        find_device(work.recipe.compute.device)
    if trains or not environment_file(folder).exists():
        note_environment(folder, command)  # of what trained, not of whoever looks again
    groups = grouped(work)
    # A network that cannot be exported and an unreachable budget end here, before any training.
    selector = _selector(work, groups, points or ())
    dense = fitted(work)
    for arm in work.recipe.arms:
        if arm.startswith("pruned"):
            found = searched(work, arm, dense, groups, selector)
            if points is not None:
                continue
            found = condensed(work, arm, dense, groups, selector, found)
            cut_plan = planned(work, arm, dense, groups, selector, found)
            mask = read_mask(work, arm)
            smaller = set_to_zero(cut(with_tensors(dense, found), cut_plan), mask)
            tuned(work, arm, Dense(smaller, found.label_map), prompt=found.prompt, dense=dense, mask=mask)
        else:
            tuned(work, arm, dense, prompt={}, dense=dense, mask={})


def _selector(work: Workbench, groups: ChannelGroups, points: Sequence[Recipe]) -> Selector | WeightSelector:
    """What masks the recipe's budget allows. Raises: BudgetError when it, or that of one of ``points``, allows none."""
    recipe = work.recipe
    if recipe.search.granularity != "channel":
        shapes = weight_shapes(work.built.backbone)
        return weight_selector(shapes, ratio=recipe.budget.requested, granularity=recipe.search.granularity)
    found_price = priced(work, groups)
    selector = selector_for(work, groups, found_price)
    for point in points:
        check_reachable(work, groups, found_price, point.budget)
    return selector


# --- the stages of prune ------------------------------------------------------------------------------------------------


def grouped(work: Workbench) -> ChannelGroups:
    """Which channels go together, and which of them can be removed exactly."""
    stage, path = Stage("groups"), work.run / "groups.json"
    if not work.is_done(stage):
        with work.doing(stage):
            canvas_size, allow = work.recipe.input.canvas, work.recipe.budget.allow_approximate
            backbone, example = work.built.backbone, example_input(canvas_size, batch=1)
            with Limit().enforced() as limit:
                found = find_groups(backbone, example, limit=limit)
                probed = probe(backbone, found, example=example, allow_approximate=allow, limit=limit)
            run_folder.write_value(path, probed)
    return run_folder.read_value(path, ChannelGroups)


def priced(work: Workbench, groups: ChannelGroups) -> Price:
    """What widths cost on the target. Measured once: training that has begun goes on under the limits that it began with."""
    stage, path = Stage("price"), work.run / "price.json"
    if not work.is_done(stage):
        with work.doing(stage):
            run_folder.write_value(path, price(work, groups))
    found = run_folder.read_value(path, Price)
    other = elsewhere(found)
    if other is not None and work.recipe.budget.reads_target:
        work.display.say(
            f"warning: the budget was measured on another machine ({other}): what is reached here may differ; to measure it "
            "here and search again: --redo price"
        )
    return found


def fitted(work: Workbench) -> Dense:
    """Stage 0: the dense network that every arm starts from."""
    return _fitted(work, Stage("fit"), work)


def _fitted(work: Workbench, stage: Stage, place: Workbench) -> Dense:
    """place: with the images and the network that ``stage`` is about."""
    if not work.is_done(stage):
        with work.doing(stage):
            dense = fit(
                place.built.backbone,
                place.training_data(),
                recipe=place.recipe,
                classifier=place.built.classifier,
                compute=work.compute(),
                journal=work.journal(stage),
                display=work.display,
            )
            write_dense(place, dense, arm=stage.arm)
    return read_dense(place, arm=stage.arm)


def searched(
    work: Workbench, arm: str, dense: Dense, groups: ChannelGroups, selector: Selector | WeightSelector
) -> Found:
    """Stage 1: scores, prompt, label map, and the tensors that the search changed. With search.data of a network that is fitted
    to that: scores and prompt are taken from there, and nothing else.
    """
    stage, path = Stage("search", arm), arm_file(work.run, "found.safetensors", arm)
    if not work.is_done(stage):
        place = searching(work)
        start = dense if place is work else _fitted(work, Stage("fit", FIT_ELSEWHERE), place)
        with work.doing(stage):
            learns = work.recipe.prompt.learned_in("search") and work.recipe.search.method != "hydra"
            prompted = arm == "pruned" and learns
            task = SearchTask(start, groups.prunable, selector, prompted)
            found = _found_before(work, arm, task) or search(
                task,
                place.training_data(),
                recipe=place.recipe,
                compute=work.compute(),
                journal=work.journal(stage),
                display=work.display,
            )
            if place is not work:
                found = replace(found, tensors={}, label_map=dense.label_map)
            run_folder.write_found(path, found)
    return run_folder.read_found(path)


def _found_before(work: Workbench, arm: str, task: SearchTask) -> Found | None:
    """What search.found holds for ``arm``; None where the recipe names none.

    Raises: RunFolderError when there is no such file, or it is of another network.
    """
    if work.recipe.search.found is None:
        return None
    given = Path(work.recipe.search.found)
    path = arm_file(given.parent, given.name, arm)
    if not path.is_file():
        raise RunFolderError(
            f"search.found: no such file {path}; expected what the search of arm {arm!r} left in a run folder"
        )
    found = run_folder.read_found(path)
    fits = {name: tuple(shape) for name, shape in task.units.items()}
    statistics = {name: tensor.shape for name, tensor in task.dense.backbone.state_dict().items()}
    if {root: tuple(scores.shape) for root, scores in found.scores.items()} != fits or any(
        statistics.get(name) != tensor.shape for name, tensor in found.tensors.items()
    ):
        raise RunFolderError(
            f"search.found: {path} is of another network; expected scores of {', '.join(list(fits)[:3])}, ..."
        )
    table, (pixels, tokens) = work.recipe.prompt, split_prompt(found.prompt)
    for kind, holds, part in (("pixels", bool(pixels), table.pixels), ("tokens", bool(tokens), table.tokens)):
        learns = task.prompted and part.learned_in("search")
        if holds != learns:
            raise RunFolderError(
                f"search.found: {path} holds {'' if holds else 'no '}{kind}; expected "
                + (
                    f"some, as the recipe has prompt.{kind}"
                    if learns
                    else f"none, as the recipe learns no {kind} in the search"
                )
            )
    if tokens:
        put_tokens(copy.deepcopy(task.dense.backbone), tokens, table.tokens)  # raises where they are of another kind
    return found


def condensed(
    work: Workbench, arm: str, dense: Dense, groups: ChannelGroups, selector: Selector | WeightSelector, found: Found
) -> Found:
    """What was found, with fewer tokens; itself where the recipe keeps all, or the arm has none."""
    stage, path = Stage("condense", arm), arm_file(work.run, "condensed.safetensors", arm)
    if work.recipe.condense.keep == 1 or not split_prompt(found.prompt)[1]:
        return found
    if not work.is_done(stage):
        with work.doing(stage):
            task = SearchTask(dense, groups.prunable, selector, prompted=True)
            fewer = condense(task, found, work.training_data(), recipe=work.recipe, compute=work.compute())
            run_folder.write_found(path, fewer)
    return run_folder.read_found(path)


def planned(
    work: Workbench,
    arm: str,
    dense: Dense,
    groups: ChannelGroups,
    selector: Selector | WeightSelector,
    found: Found,
) -> PrunePlan:
    """Scores -> mask -> plan, and the certificate that masking and removal are the same on the real network. Of single weights
    the plan is to cut nothing, and the mask stands beside it.
    """
    stage, path = Stage("cut", arm), arm_file(work.run, "plan.json", arm)
    if not work.is_done(stage):
        with work.doing(stage):
            if isinstance(selector, WeightSelector):
                _zeroed(work, arm, dense, groups, selector, found)
                return run_folder.read_value(path, PrunePlan)
            selection = settle(selector, dict(scores_as_arrays(found)), work, groups, arm=arm)
            source = with_tensors(dense, found)
            cut_plan = plan(source, groups.prunable, selection.mask, replacements=work.built.replacements)
            smaller = cut(source, cut_plan)
            _check_budget(smaller, source, recipe=work.recipe)
            macs = count_macs(source, canvas_size=work.recipe.input.canvas).macs
            count = enough_images(macs, at_most=CERTIFICATE_IMAGES)
            images = show(work.recipe, work.training_data().val, prompt=found.prompt, count=count)
            for network in (source, smaller):
                put_tokens(network, split_prompt(found.prompt)[1], work.recipe.prompt.tokens)
            certificate = certify(source, smaller, groups, selection, canvas=images)
            certificate = replace(
                certificate,
                replacements=work.built.replacements,
                limits=selection.limits,
                measured_on=target_text(work.recipe) if work.recipe.budget.measured else "",
            )
            run_folder.write_value(arm_file(work.run, "certificate.json", arm), certificate)
            run_folder.write_value(path, cut_plan)
    return run_folder.read_value(path, PrunePlan)


def _zeroed(
    work: Workbench, arm: str, dense: Dense, groups: ChannelGroups, selector: WeightSelector, found: Found
) -> None:
    """Write the mask of single weights, the certificate that the zeros do what it does, and a plan that cuts nothing."""
    source = with_tensors(dense, found)
    row = torch.cat([found.scores[name].flatten() for name in selector.shapes])
    kept = torch.from_numpy(selector.select_row(row.numpy()))
    mask = parts_of(kept, weight_shapes(source))
    zeroed = set_to_zero(copy.deepcopy(source), mask)
    count = enough_images(count_macs(source, canvas_size=work.recipe.input.canvas).macs, at_most=CERTIFICATE_IMAGES)
    images = show(work.recipe, work.training_data().val, prompt=found.prompt, count=count)
    nothing = plan(source, groups.prunable, ChannelMask({}), replacements=work.built.replacements)
    for network in (source, zeroed):
        put_tokens(network, split_prompt(found.prompt)[1], work.recipe.prompt.tokens)
    certificate = certify_weights(source, zeroed, groups, kept, requested=selector.ratio, canvas=images)
    certificate = replace(certificate, replacements=work.built.replacements)
    run_folder.write_tensors(arm_file(work.run, "mask.safetensors", arm), mask)
    run_folder.write_value(arm_file(work.run, "certificate.json", arm), certificate)
    run_folder.write_value(arm_file(work.run, "plan.json", arm), nothing)


def _check_budget(smaller: nn.Module, dense: nn.Module, *, recipe: Recipe) -> None:
    """Count what the selection only computed: the budget must hold of the network that was cut, as it ships.

    Raises: SurgeryError when it does not.
    """
    kind, canvas_size = recipe.budget.kind, recipe.input.canvas
    if kind == "macs_ratio":
        shipped = (as_shipped(network, canvas_size=canvas_size) for network in (smaller, dense))
        left, whole = (count_macs(network, canvas_size=canvas_size).macs for network in shipped)
    elif kind == "params_ratio":
        left, whole = (sum(p.numel() for p in network.parameters()) for network in (smaller, dense))
    else:
        return  # channels are what the mask itself says
    if left > whole * recipe.budget.requested * (1 + 1e-9):
        raise SurgeryError(
            f"budget.{kind}: the cut network keeps {left / whole:.4f}, expected at most {recipe.budget.requested:g}: it holds "
            "products or parameters that the cost model does not know; set a smaller ratio, and please report the network"
        )


def tuned(
    work: Workbench,
    arm: str,
    start: Dense,
    *,
    prompt: Mapping[str, Tensor],
    dense: Dense,
    mask: Mapping[str, Tensor],
) -> None:
    """Stage 2: weights and prompt of one arm, on the same schedule as every other arm."""
    stage, prompted = Stage("tune", arm), arm in ("pruned", "dense+prompt")
    if not work.is_done(stage):
        with work.doing(stage):
            result = tune(
                start.backbone,
                work.training_data(),
                prompt=prompt if prompted and work.recipe.prompt.learned_in("tune") else None,
                dense=dense,
                classifier=work.built.classifier,
                mask=mask,
                label_map=start.label_map,
                recipe=work.recipe,
                compute=work.compute(),
                journal=work.journal(stage),
                display=work.display,
            )
            write_tuned(work.run, arm, result)
