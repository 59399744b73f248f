"""An interrupted stage goes on from its last finished epoch and ends bit-equal to an undisturbed one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from vpdeploy.progress import Display
from vpdeploy.recipe.tables import Recipe
from vpdeploy.run_folder import read_history
from vpdeploy.training import loop
from vpdeploy.training.fit import fit
from vpdeploy.training.methods.registry import search
from vpdeploy.training.network import to_pixels
from vpdeploy.training.tune import tune
from vpdeploy.values import Dense

EPOCHS, STEPS = 3, 4  # 28 images in batches of 8
Bits = dict[str, bytes]
Run = Callable[[Path, Recipe], Bits]


class PowerCut(BaseException):
    """As Ctrl-C: no ``except Exception`` may hold it up."""


def recipe(values: dict[str, Any]) -> Recipe:
    return tiny.recipe({"fit.epochs": EPOCHS, "search.epochs": EPOCHS, "tune.epochs": EPOCHS, **values})


def bits(*parts: dict[str, Any]) -> Bits:
    return {f"{i}/{k}": v.detach().numpy().tobytes() for i, part in enumerate(parts) for k, v in part.items()}


def backbone(settled: Recipe) -> nn.Module:
    return tiny.network(dropout=0.3, classes=6 if settled.model.head in ("flm", "ilm") else tiny.CLASSES)


def run_fit(folder: Path, settled: Recipe) -> Bits:
    dense = fit(
        backbone(settled), tiny.data(), recipe=settled, classifier="linear", compute=tiny.COMPUTE,
        journal=tiny.journal(folder), display=Display(quiet=True),
    )  # fmt: skip
    return bits(dense.backbone.state_dict())


def run_search(folder: Path, settled: Recipe) -> Bits:
    label_map = (3, 4, 5) if settled.model.head in ("flm", "ilm") else None
    task = tiny.task(backbone(settled), settled, label_map=label_map)
    found = search(
        task, tiny.data(), recipe=settled, compute=tiny.COMPUTE, journal=tiny.journal(folder),
        display=Display(quiet=True),
    )  # fmt: skip
    mapped = {} if found.label_map is None else {"label_map": torch.tensor(found.label_map)}
    return bits(dict(found.scores), dict(found.prompt), dict(found.tensors), mapped)


def run_tune(folder: Path, settled: Recipe) -> Bits:
    label_map = (3, 4, 5) if settled.model.head in ("flm", "ilm") else None
    tuned = tune(
        backbone(settled), tiny.data(), prompt={}, dense=Dense(backbone(settled), label_map), classifier="linear", mask={},
        label_map=label_map, recipe=settled, compute=tiny.COMPUTE,
        journal=tiny.journal(folder), display=Display(quiet=True),
    )  # fmt: skip
    return bits(tuned.backbone.state_dict(), dict(tuned.prompt))


CASES: dict[str, tuple[Run, dict[str, Any]]] = {
    "fit": (run_fit, {}),
    "fit, head alone": (run_fit, {"fit.what": "head"}),
    "search, frame": (run_search, {}),
    "search, moving square": (run_search, {"prompt.pixels.kind": "random", "prompt.pixels.size": 4}),
    "search, second step": (run_search, {"search.unprompted_step": True}),
    "search, from the loss": (run_search, {"search.score_init": "taylor"}),
    "search, no prompt": (run_search, {"prompt.pixels.kind": "none"}),
    "search, map once": (run_search, {"model.head": "flm", "model.weights": "source.th"}),
    "slim": (run_search, {"search.method": "slim"}),
    "group_sl": (run_search, {"search.method": "group_sl"}),
    "bip": (run_search, {"search.method": "bip"}),
    "omp, no prompt": (run_search, {"search.method": "omp", "prompt.pixels.kind": "none"}),
    "random, with a prompt": (run_search, {"search.method": "random"}),
    "search, map every epoch": (run_search, {"model.head": "ilm", "model.weights": "source.th"}),
    "tune, sgd": (run_tune, {}),
    "tune, distilled": (run_tune, {"tune.distill": 0.5}),
    "tune, adamw, moving square": (run_tune, {"tune.optimizer": "adamw", "prompt.pixels.kind": "random"}),
    "tune, mapped, smoothed": (
        run_tune, {"model.head": "flm", "model.weights": "source.th", "tune.label_smoothing": 0.1},
    ),
}  # fmt: skip


@contextmanager
def steps_counted(monkeypatch: pytest.MonkeyPatch, *, until: int | None) -> Iterator[list[int]]:
    """Count the steps; the power goes as step number ``until`` begins."""
    taken = [0]

    def counted(*args: Any) -> torch.Tensor:
        if taken[0] == until:
            raise PowerCut
        taken[0] += 1
        return to_pixels(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "to_pixels", counted)
        yield taken


def undisturbed_history(folder: Path) -> list[dict[str, Any]]:
    """What was written down, less the times."""
    records = [asdict(record) for record in read_history(tiny.journal(folder).history_file)]
    return [{k: v for k, v in record.items() if k not in ("seconds", "images_per_second")} for record in records]


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_stage_ends_as_an_undisturbed_one(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, values = CASES[case]
    settled = recipe(values)
    whole, cut_off = tmp_path / "whole", tmp_path / "cut-off"
    expected = run(whole, settled)
    # In the first epoch, at the start of the second, and in the middle of the third, one after the other.
    for until, done in ((2, 0), (STEPS, 1), (STEPS + 2, 2)):
        with steps_counted(monkeypatch, until=until), pytest.raises(PowerCut):
            run(cut_off, settled)
        state = tiny.journal(cut_off).resume()
        assert (0 if state is None else state["epoch"]) == done
    with torch.random.fork_rng():
        torch.manual_seed(99)  # another process: whatever its global streams hold
        with steps_counted(monkeypatch, until=None) as taken:
            assert run(cut_off, settled) == expected
    assert taken == [STEPS]  # the third epoch alone was left
    assert undisturbed_history(cut_off) == undisturbed_history(whole)
    assert [record["epoch"] for record in undisturbed_history(whole)] == [1, 2, 3]


@pytest.mark.parametrize("case", ["fit", "search, map every epoch", "tune, sgd"])
def test_a_stage_cut_off_after_its_last_epoch_trains_no_more(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, values = CASES[case]
    expected = run(tmp_path, recipe(values))  # its state is still there: the caller removes it
    with steps_counted(monkeypatch, until=0):
        assert run(tmp_path, recipe(values)) == expected


def test_the_cases_do_differ(tmp_path: Path) -> None:
    """Dropout, order and places are drawn: another seed gives other bits, so that equality says something."""
    for number, (run, values) in enumerate(CASES.values()):
        first = run(tmp_path / f"{number}", recipe(values))
        other = run(tmp_path / f"{number} other", recipe({**values, "seed": 8}))
        assert first != other
