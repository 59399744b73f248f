"""What comes later never takes what an earlier stage left of another network, and bad images are named wherever they lie."""

from __future__ import annotations

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from integration.stand_ins import write_images
from safetensors.torch import save_file
from torch import nn

from vpdeploy import pipeline, run_folder, stages
from vpdeploy.errors import DataError, ModelError, RecipeError, RunFolderError, SurgeryError, VpdeployError
from vpdeploy.progress import Display
from vpdeploy.recipe.reading import parse_recipe
from vpdeploy.recipe.tables import Recipe
from vpdeploy.recipe.writing import with_values
from vpdeploy.report.compare import check_consistency
from vpdeploy.reporting import read_report
from vpdeploy.shipping.bench import measure_more
from vpdeploy.stages import Stage, measurement_file
from vpdeploy.values import Measurement

QUIET = Display(quiet=True)
CLASSES, EACH, TEST_EACH = ("a", "b"), 16, 4


def recipe_for(images: Path, *, epochs: int = 1, ratio: float = 0.6) -> Recipe:
    raw = {
        "model": {"name": "cifar_resnet8"},
        "data": {"name": "imagefolder", "root": str(images), "val_fraction": 0.25, "on_bad_image": "skip"},
        "input": {"image_size": 8},
        "prompt": {"pixels": {"size": 1}},
        "fit": {"epochs": 1},
        "search": {"epochs": 1},
        "budget": {"macs_ratio": ratio},
        "tune": {"epochs": epochs},
        "compute": {"precision": "fp32", "channels_last": "no", "device": "cpu"},
        "compare": {"arms": ["dense", "pruned"]},
        "export": {"forms": ["uint8"]},
        "bench": {"batches": [1], "threads": [1], "seconds": 0.001, "image_size": [9, 9]},
    }
    return parse_recipe(raw, where="order", folder=images.parent)


def spoiled(good: Path, path: Path, names: set[str]) -> Path:
    """A copy of the archive in which ``names`` are cut off in the middle."""
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            target.writestr(name, content[: len(content) // 2] if name in names else content)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("order") / "images.zip"
    write_images(path, classes=CLASSES, each=EACH, sizes=((9, 9), (12, 10)), test_each=TEST_EACH)
    return path


@pytest.fixture(scope="module")
def finished(images) -> Path:
    run = images.parent / "run"
    pipeline.run(recipe_for(images), run, command="a test", display=QUIET)
    return run


def test_bad_images_of_every_split_are_left_out_and_named(images, tmp_path):
    bad = {f"train/a/{i}.jpg" for i in range(0, EACH, 2)} | {"test/b/1.jpg"}
    made = pipeline.run(
        recipe_for(spoiled(images, tmp_path / "bad.zip", bad)), tmp_path / "run", command="a test", display=QUIET
    )
    assert {line.partition(":")[0] for line in made.skipped_images} == bad
    assert made.arms["pruned"].n == len(CLASSES) * TEST_EACH - 1
    assert "less the skipped images" in (tmp_path / "run" / "report.md").read_text()


def test_a_test_split_without_one_good_image_is_an_error(images, finished, tmp_path):
    bad = {f"test/{label}/{i}.jpg" for label in CLASSES for i in range(TEST_EACH)}
    with pytest.raises(DataError, match="^test images: all 8 images are bad, the first: test/a/0.jpg: "):
        pipeline.run(
            recipe_for(spoiled(images, tmp_path / "bad.zip", bad)), tmp_path / "run", command="a test", display=QUIET
        )


def test_nothing_is_exported_measured_or_reported_of_a_half_trained_run(images, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    entries = json.loads((run / "stages.json").read_text())
    for name in ("tune:pruned", "export", "bench"):  # as `prune --redo tune` leaves them when it is killed in an arm
        del entries[name]
    (run / "stages.json").write_text(json.dumps(entries))
    with pytest.raises(
        RunFolderError, match=r"not done yet, or changed since: tune:pruned; run `vpdeploy prune RECIPE -o .*` first$"
    ):
        pipeline.export(run, display=QUIET)
    with pytest.raises(
        RunFolderError, match=r"not done yet, or changed since: export; run `vpdeploy export .*` first$"
    ):
        pipeline.bench(run, display=QUIET)
    with pytest.raises(
        RunFolderError, match=r"not measured yet; run `vpdeploy export .*` and `vpdeploy bench .*` first$"
    ):
        pipeline.report(run)


def test_a_report_follows_the_budget_that_was_cut_last(images, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    pipeline.prune(recipe_for(images, ratio=0.4), run, redo="search", command="a test", display=QUIET)
    with pytest.raises(RunFolderError, match="not measured yet"):
        pipeline.report(run)
    made = pipeline.run(recipe_for(images, ratio=0.4), run, command="a test", display=QUIET)
    check_consistency(made)
    certificate, arms = made.certificates["pruned"], made.arms
    assert arms["pruned"].macs / arms["dense"].macs == pytest.approx(certificate.reached, rel=1e-12)
    assert certificate.reached <= 0.4


def test_a_run_goes_on_without_the_checkpoint_that_it_began_with(images, finished, tmp_path):
    recipe, run, weights = recipe_for(images), tmp_path / "run", tmp_path / "weights.safetensors"
    state, _, _ = run_folder.read_network(finished / "dense.safetensors")
    save_file(state, weights)
    recipe = with_values(recipe, {"model.weights": str(weights), "fit.what": "none"})
    pipeline.prune(recipe, run, command="a test", display=QUIET)
    weights.unlink()
    pipeline.export(run, display=QUIET)
    pipeline.bench(run, display=QUIET)
    assert pipeline.report(run).arms["pruned"].n == len(CLASSES) * TEST_EACH


@pytest.mark.parametrize("command", [pipeline.export, pipeline.bench])
def test_a_folder_that_is_no_run_stays_as_it_is(command, tmp_path):
    with pytest.raises(RunFolderError, match="got nothing there; expected a run folder"):
        command(tmp_path / "typo", display=QUIET)
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize("environment", ["{", "[]", "{}"])
def test_a_damaged_note_of_the_environment_is_a_message(environment, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "environment.json").write_text(environment)
    with pytest.raises(
        RunFolderError, match=r"environment.json: damaged: .*; remove it and run the same `vpdeploy run` again"
    ):
        pipeline.report(run)


def test_a_report_tells_where_its_numbers_were_measured_and_where_else_was_trained(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    here = pipeline.report(run).environment
    assert (
        here["engines"]["onnxruntime-cpu"]["onnxruntime"] == here["packages"]["onnxruntime"] and "training" not in here
    )
    noted = json.loads((run / "environment.json").read_text())
    noted["environment"]["machine"]["cpu"] = "another"
    (run / "environment.json").write_text(json.dumps(noted))
    there = pipeline.report(run).environment
    assert {key: value for key, value in there.items() if key != "training"} == here
    assert there["training"] == {"machine": noted["environment"]["machine"]}
    (run / "measured" / "environment.json").unlink()
    with pytest.raises(RunFolderError, match="not measured yet"):
        pipeline.report(run)


def test_who_asks_again_hears_that_nothing_was_done(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for stage, again in (("export", pipeline.export), ("bench", pipeline.bench)):
        again(run, display=Display())
        told = " ".join(capsys.readouterr().err.split())
        assert f"{stage}: done before, and nothing that it reads has changed; to do it again: vpdeploy run" in told
        assert f"--redo {stage}" in told


@pytest.mark.parametrize("damage", [lambda content: content[:100], lambda content: content[:-1] + b"?"])
def test_a_damaged_file_is_never_measured_and_export_writes_it_again(damage, images, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    path, numbers = run / "export" / "pruned.onnx", (run / "measured" / "pruned.json").read_bytes()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    with pytest.raises(
        RunFolderError, match=r"not done yet, or changed since: export; run `vpdeploy export .*` first$"
    ):
        pipeline.bench(run, display=QUIET)
    pipeline.export(run, display=QUIET)
    assert path.read_bytes() == whole
    pipeline.bench(run, display=QUIET)
    assert (run / "measured" / "pruned.json").read_bytes() == numbers  # the same file: what was measured holds


@pytest.mark.parametrize("name", ["vectors.npz", "labels.txt", "manifest.json"])
def test_export_writes_again_whatever_verify_would_refuse(name, images, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    path = run / "export" / name
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"pruned.onnx", b"other.onnx") if name == "manifest.json" else b"damaged")
    with pytest.raises(RunFolderError, match=r"not done yet, or changed since: export"):
        pipeline.bench(run, display=QUIET)
    pipeline.export(run, display=QUIET)
    assert path.read_bytes() == whole


def test_a_report_of_fewer_arms_shows_no_epoch_of_the_others(images, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    of_another = (run / "history.jsonl").read_text().replace("tune:pruned", "tune:pruned-prompt")
    with (run / "history.jsonl").open("a") as file:
        file.write(of_another)
    report = pipeline.report(run)
    assert {record.stage for record in report.history} == {"fit", "search:pruned", "tune:dense", "tune:pruned"}


def test_what_is_exported_anew_is_measured_anew(images, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    manifest = run / "export" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"vpdeploy_version": "', '"vpdeploy_version": "9.'))
    with pytest.raises(RunFolderError, match="not measured yet"):
        pipeline.report(run)
    numbers = (run / "measured" / "pruned.json").read_bytes()
    pipeline.bench(run, display=QUIET)
    assert (run / "measured" / "pruned.json").read_bytes() != numbers


def test_a_run_that_trains_nothing_leaves_the_note_of_who_trained(images, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = (run / "environment.json").read_bytes()
    pipeline.run(recipe_for(images), run, redo="bench", command="another", display=QUIET)
    assert (run / "environment.json").read_bytes() == before
    pipeline.run(recipe_for(images), run, redo="tune", command="another", display=QUIET)
    assert json.loads((run / "environment.json").read_text())["command"] == "another"


def test_a_run_is_exported_and_measured_where_its_device_is_not(images, finished, tmp_path):
    """Trained on a GPU, measured on a target without one: only training needs the device."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for name in ("recipe.toml", "stages.json"):
        text = (run / name).read_text()
        device = "cuda:99"
        moved = text.replace('device = "cpu"', f'device = "{device}"').replace(
            '"compute.device": "cpu"', f'"compute.device": "{device}"'
        )
        assert moved != text
        (run / name).write_text(moved)
    (run / "export" / "pruned.onnx").unlink()
    pipeline.export(run, display=QUIET)
    pipeline.bench(run, display=QUIET)
    pipeline.run(stages.read_recipe(run), run, command="a test", display=QUIET)


def test_a_device_that_is_not_here_binds_no_later_run(images, tmp_path, monkeypatch):
    """The next run must not take the settled recipe's device for one that "auto" had chosen."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    recipe = recipe_for(images)
    for _ in range(2):
        with pytest.raises(VpdeployError, match=r"compute.device: got 'cuda:99', which is not usable here"):
            pipeline.prune(
                with_values(recipe, {"compute.device": "cuda:99"}), tmp_path, command="a test", display=QUIET
            )
    pipeline.prune(with_values(recipe, {"compute.device": "auto"}), tmp_path, command="a test", display=QUIET)
    assert stages.read_recipe(tmp_path).compute.device == "cpu"


FORKED = """
import torch
from torch import nn
class Forked(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 2)
    def forward(self, x):
        bright = x.mean() > 0
        x = self.second(self.first(x).relu())
        x = x.relu() if bright else x
        return self.last(x.mean((2, 3)))
"""


def test_a_network_that_cannot_be_exported_is_refused_before_any_training(images, tmp_path):
    (tmp_path / "forked.py").write_text(FORKED)
    recipe = with_values(recipe_for(images), {"model.name": f"{tmp_path / 'forked.py'}:Forked"})
    with pytest.raises(ModelError, match=r"dense\.\w+\.onnx: torch .* cannot export this network to ONNX"):
        pipeline.prune(recipe, tmp_path / "run", command="a test", display=QUIET)
    assert not (tmp_path / "run" / "history.jsonl").exists()


LINEAR = """
import torch
from torch import nn
def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
"""


def test_a_network_without_groups_goes_the_road_at_ratio_1(images, tmp_path):
    (tmp_path / "linear.py").write_text(LINEAR)
    recipe = with_values(
        recipe_for(images),
        {"model.name": f"{tmp_path / 'linear.py'}:make", "budget.macs_ratio": 1.0},
    )
    report = pipeline.run(recipe, tmp_path / "run", command="a test", display=QUIET)
    assert report.arms["pruned"].macs == report.arms["dense"].macs == 192 * 2


def test_a_cut_that_breaks_the_budget_is_an_error(images):
    networks = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 8, 1)
    for module in networks:
        module.eval()
    smaller, dense = (nn.Sequential(network, nn.Flatten()) for network in networks)
    pipeline._check_budget(smaller, dense, recipe=recipe_for(images, ratio=0.625))
    with pytest.raises(
        SurgeryError, match=r"^budget.macs_ratio: the cut network keeps 0.6250, expected at most 0.62: "
    ):
        pipeline._check_budget(smaller, dense, recipe=recipe_for(images, ratio=0.62))


def test_latencies_under_other_conditions_are_added_to_the_report(finished, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = pipeline.report(run)
    threads = torch.get_num_threads()
    try:
        made, _ = pipeline.bench_more(
            run, {"engines": ("torch-eager", "onnxruntime-cpu"), "batches": (1, 2)}, display=QUIET
        )
    finally:
        torch.set_num_threads(threads)
    at = [(row.engine, row.batch) for row in made.arms["pruned"].latency]
    # What stands there under the same conditions is new, and in its place.
    assert at == [("onnxruntime-cpu", 1), ("torch-eager", 1), ("torch-eager", 2), ("onnxruntime-cpu", 2)]
    assert made.arms["pruned"].latency[0].samples_ms != before.arms["pruned"].latency[0].samples_ms
    assert [(row.engine, row.batch) for row in made.factors["pruned"].latency_p50] == at
    assert set(made.environment["engines"]) == {"onnxruntime-cpu", "torch-eager"}
    assert made.arms["pruned"].accuracy_top1 == before.arms["pruned"].accuracy_top1
    assert pipeline.report(run) == made == read_report(run)
    with pytest.raises(RecipeError, match="engines"):
        pipeline.bench_more(run, {"engines": ("tvm",)}, display=QUIET)


def test_what_a_latency_budget_was_measured_by_stays_when_more_is_measured(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    recipe = stages.read_recipe(run)
    timed = recipe.budget.model_copy(update={"macs_ratio": None, "latency_ratio": 0.5})
    work = replace(pipeline._reopened(run, QUIET), recipe=recipe.model_copy(update={"budget": timed}))
    work.ledger.finish(Stage("bench"), work.recipe)
    before = run_folder.read_value(measurement_file(run, "pruned"), Measurement).latency
    measure_more(work, recipe.bench.model_copy(update={"batches": (3,), "seconds": 0.01}))
    after = run_folder.read_value(measurement_file(run, "pruned"), Measurement).latency
    assert after[: len(before)] == before and [row.batch for row in after[len(before) :]] == [3]


def test_arms_that_were_written_half_way_are_measured_again_before_they_are_compared(finished, tmp_path, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    write = run_folder.write_value

    def stopped(path, value):
        if path == measurement_file(run, "pruned"):
            raise KeyboardInterrupt
        write(path, value)

    monkeypatch.setattr(run_folder, "write_value", stopped)
    with pytest.raises(KeyboardInterrupt):
        pipeline.bench_more(run, {"batches": (2,)}, display=QUIET)
    monkeypatch.undo()
    with pytest.raises(RunFolderError, match="not measured yet; run .*vpdeploy bench"):
        pipeline.report(run)


def test_runs_without_a_report_cannot_be_compared(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "report.json").unlink()
    with pytest.raises(RunFolderError, match=r"report.json: cannot be read: .*; run `vpdeploy report "):
        read_report(run)
