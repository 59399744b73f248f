"""The benchmark of condensed prompts: what its table says of the runs."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
from benchmarked import loaded

from vpdeploy.run_folder import write_value
from vpdeploy.values import Condensation, CondensedPoint, Conditions, TokenCost

for beside in ("side_by_side", "small_vit"):
    loaded(beside)
benchmark = loaded("vit_prompts")

COST = TokenCost("as shipped", 10, 10, 10, 1.0, 1.0, (1.0, 1.0))
AT = Conditions("onnxruntime-cpu", "cpu", "fp32", "float", 1, 1)


def point(score: str, keep: float, top1: float) -> CondensedPoint:
    run = f"{score}-{keep:g}" if score else "all"
    return CondensedPoint(
        score=score,
        keep=keep,
        tokens=round(20 * keep),
        run=run,
        command="",
        accuracy_top1=top1,
        accuracy_top1_interval=(0.0, 1.0),
        n=100,
        difference=None,
        published=COST,
        shipped=COST,
        conditions=AT,
    )


@pytest.fixture
def out(tmp_path: Path) -> Path:
    tops = {0: (0.80, 0.78, 0.75, 0.77), 1: (0.82, 0.80, 0.76, 0.81)}
    for seed, (whole, *others) in tops.items():
        points = [point("", 1.0, whole)]
        points += [
            point(score, 0.5, top1) for score, top1 in zip(("gradient", "random", "scratch"), others, strict=True)
        ]
        (tmp_path / f"seed-{seed}" / "all").mkdir(parents=True)
        dense = {"arms": {"dense": {"accuracy_top1": 0.5}}}
        (tmp_path / f"seed-{seed}" / "all" / "report.json").write_text(json.dumps(dense))
        write_value(tmp_path / f"seed-{seed}" / "condensation.json", Condensation("t", tuple(points), {}))
    return tmp_path


def test_means_deviations_and_differences_paired_by_seed(out: Path) -> None:
    _, _, head, whole, gradient, random, scratch = benchmark.lines(benchmark.figures_of(out))
    assert head.startswith("| no tokens, the head alone | 0 % | 0 | 50.00 ± 0.00 | 50.00, 50.00 | -31.00 ± 1.41 |")
    assert whole == "| all tokens | 100 % | 20 | 81.00 ± 1.41 | 80.00, 82.00 | – | – | – |"
    assert (
        gradient
        == "| gradient | 50 % | 10 | 79.00 ± 1.41 | 78.00, 80.00 | -2.00 ± 0.00 | +3.50 ± 0.71 | +0.00 ± 1.41 |"
    )
    assert random.endswith("| -5.50 ± 0.71 | – | -3.50 ± 2.12 |") and scratch.endswith(
        "| -2.00 ± 1.41 | +3.50 ± 2.12 | – |"
    )


def test_the_page_holds_every_run(out: Path, tmp_path: Path) -> None:
    benchmark.write_page(benchmark.figures_of(out), tmp_path / "page")
    rows = (tmp_path / "page" / "results.csv").read_text().splitlines()
    assert rows[0] == "score,keep,tokens,seed,top1_test" and len(rows) == 1 + 2 * 5
    assert "<svg" in (tmp_path / "page" / "curve.svg").read_text()


def test_classes_are_parted_and_no_image_is_lost(tmp_path: Path) -> None:
    from PIL import Image

    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for number, name in enumerate(("cat", "dog", "horse")):
            for split in ("train", "test"):
                path = tmp_path / "one.png"
                Image.new("RGB", (32, 32), (number, 0, 255)).save(path)
                archive.write(path, f"{split}/{name}/0.png")
    benchmark.part_classes(tmp_path / "images.zip", tmp_path)
    pixels, labels = benchmark.pictures(tmp_path / "first.zip", "train")
    assert labels.tolist() == [0, 1] and pixels[:, 0, 0, 0].tolist() == [0, 2] and pixels.shape == (2, 3, 32, 32)
    pixels, labels = benchmark.pictures(tmp_path / "others.zip", "test")
    assert labels.tolist() == [0] and pixels[0, :, 5, 5].tolist() == [1, 0, 255]
