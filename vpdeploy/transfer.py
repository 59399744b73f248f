"""Searching on other images than those that the network is tuned on: channels and prompts that transfer."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from vpdeploy.errors import ModelError
from vpdeploy.models.build import build, with_separate_heads
from vpdeploy.recipe.writing import with_values
from vpdeploy.workbench import Workbench, prepared


def searching(work: Workbench) -> Workbench:
    """``work`` itself; with search.data another one, as if its recipe's [data] were that: the images, and the recipe's network
    with a classifier for their classes. Run folder, ledger and compute are those of ``work``.

    Raises: ModelError where single weights are searched, and the two classifiers have not the same.
    """
    source, table = work.search_source, work.recipe.search.data_needed
    if source is None or table is None:
        return work
    settled = work.recipe.model
    # "keep" and "replace" were found for other classes.
    head = settled.head if settled.head in ("flm", "ilm") else "auto"
    model = settled.model_copy(update={"head": head})
    built = build(model, classes=len(source.classes), seed=work.recipe.seed)
    built = with_separate_heads(built, canvas_size=work.recipe.input.canvas)
    here, there = (one.backbone.get_parameter(f"{one.classifier}.weight").shape for one in (work.built, built))
    if work.recipe.search.granularity != "channel" and here != there:
        raise ModelError(
            f"search.data: its network's classifier has weights of {list(there)}, that of [data] of {list(here)}; expected the "
            f"same, as search.granularity = {work.recipe.search.granularity!r} scores them one by one: take data of as many "
            "classes, or search.granularity = 'channel'"
        )
    what = work.recipe.fit.what if work.recipe.fit.what == "all" else "head" if built.head == "replace" else "none"
    recipe = with_values(work.recipe, {"data": table.model_dump(), "model.head": built.head, "fit.what": what})
    return replace(
        work,
        recipe=recipe,
        source=source,
        built=built,
        training_data=cache(lambda: prepared(source, recipe, run=work.run, splits="search", display=work.display)),
    )
