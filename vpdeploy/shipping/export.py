"""From tuned networks to exported files."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import torch
from torch import nn

from vpdeploy import run_folder
from vpdeploy.data.raw import some_images
from vpdeploy.data.resize import resize
from vpdeploy.deploy.bake import Deployable, bake
from vpdeploy.deploy.onnx_file import Core, count_zeros, to_onnx
from vpdeploy.deploy.package import write_package
from vpdeploy.deploy.parity import check_parity
from vpdeploy.deploy.session import describe
from vpdeploy.deploy.vectors import Vectors
from vpdeploy.errors import BudgetError, ParityError
from vpdeploy.recipe.tables import Recipe
from vpdeploy.stages import Stage, arm_file, onnx_file
from vpdeploy.surgery.masked_weights import weight_shapes
from vpdeploy.values import Certificate, Parities, Parity
from vpdeploy.workbench import Workbench, read_tuned

PARITY_IMAGES = 32
VECTOR_BYTES = 16 * 2**20  # of test vectors in one export folder


def baked(work: Workbench, arm: str, form: str, *, folded: bool = True) -> Deployable:
    """What ships; with ``folded`` false, what it has to agree with."""
    return bake(read_tuned(work, arm), recipe=work.recipe, classifier=work.built.classifier, form=form, folded=folded)


def export_arms(work: Workbench) -> None:
    """Every arm in every form: bake, export, parity; then the package around them."""
    package = Stage("export")
    work.require([Stage("tune", arm) for arm in work.recipe.arms], command=f"vpdeploy prune RECIPE -o {work.run}")
    if work.is_done(package):
        return
    vectors: dict[str, Vectors] = {}
    with work.doing(package):
        for arm in work.recipe.arms:
            vectors |= _export_arm(work, arm)
        _keep_pictures(work)
        write_package(
            work.run / "export",
            vectors=vectors,
            classes=work.source.classes,
            recipe=work.recipe,
            version=version("vpdeploy"),
        )


def _export_arm(work: Workbench, arm: str) -> dict[str, Vectors]:
    """Write one arm's files and their parity; file name -> test vectors."""
    recipe = work.recipe
    images = some_images(work.source.val, PARITY_IMAGES, max_bad=recipe.data.on_bad_image)
    share = VECTOR_BYTES // (len(recipe.arms) * len(recipe.export.forms))
    vectors: dict[str, Vectors] = {}
    parities: list[Parity] = []
    core: Core | None = None
    for form in recipe.export.forms:
        path, deployable = onnx_file(work.run, arm, form), baked(work, arm, form)
        about = describe(recipe, arm=arm, form=form, classes=work.source.classes, version=version("vpdeploy"))
        if arm.startswith("pruned"):
            about["certificate"] = _certificate(work, arm)
        core = to_onnx(deployable, path, opset=recipe.export.opset, metadata=about, core=core)
        if arm.startswith("pruned"):
            _check_size(path, recipe)
            _check_zeros(path, deployable.backbone, recipe)
        # With what was tuned: folds are proved here too.
        trained = baked(work, arm, form, folded=False) if deployable.folds else deployable
        parity, vectors[path.name] = check_parity(trained, path, images=images, vector_bytes=share)
        parities.append(parity)
        work.display.say(f"{path.name}: torch and ONNX Runtime agree to {parity.relative_error:.1e}")
    run_folder.write_value(arm_file(work.run, "parity.json", arm), Parities(tuple(parities)))
    return vectors


def _check_size(path: Path, recipe: Recipe) -> None:
    """Raises: BudgetError for a file that is larger than its budget: the widths were chosen by a formula."""
    budget = recipe.budget
    asked = budget.requested if budget.kind == "file_mib" else budget.limits.file_mib
    size = path.stat().st_size / 2**20
    if asked is not None and size > asked:
        raise BudgetError(
            f"{path}: has {size:.4f} MiB, more than file_mib = {asked:g}: it holds what the formula does not know; set a smaller "
            "file_mib, and please report the network"
        )


def _check_zeros(path: Path, backbone: nn.Module, recipe: Recipe) -> None:
    """Raises: ParityError when weights that were set to 0 are not 0 in the file."""
    if recipe.search.granularity == "channel":
        return
    weights = dict(backbone.named_parameters())
    expected = sum(int((weights[name] == 0).sum()) for name in weight_shapes(backbone))
    found = count_zeros(path)
    if found < expected:
        raise ParityError(
            f"{path}: has {found} zeros, and the network's weights {expected}; expected as many: the exporter changed weights; "
            "please report the network"
        )


def _certificate(work: Workbench, arm: str) -> str:
    """What was proved of the arm's cut, as JSON for the file's own metadata."""
    return run_folder.dump_line(run_folder.read_value(arm_file(work.run, "certificate.json", arm), Certificate))


def _keep_pictures(work: Workbench) -> None:
    """For the report: the pruned arm's prompt, [3, C, C], and the first validation image under it, uint8 [C, C, 3]."""
    deployable = baked(work, "pruned", "float")
    canvas = deployable.canvas
    if canvas.prompt is None:
        (work.run / "prompt.npz").unlink(missing_ok=True)
        return
    (pixels,) = some_images(work.source.val, 1, max_bad=work.recipe.data.on_bad_image)
    image = torch.from_numpy(pixels)[None]
    with torch.inference_mode():
        placed = canvas.place(resize(image, work.recipe.input.image_size, how=work.recipe.input.resize))[0]
        shown = (placed * 255).round().to(torch.uint8).permute(1, 2, 0)
        arrays = {"prompt": canvas.prompt().numpy(), "canvas": shown.numpy()}
    run_folder.write_arrays(work.run / "prompt.npz", arrays)
