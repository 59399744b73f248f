"""What a prompt of tokens costs in the file that ships, and what it is to the network."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from vpdeploy.data.raw import some_images
from vpdeploy.data.resize import resize
from vpdeploy.deploy.bake import Deployable, bake
from vpdeploy.deploy.onnx_file import to_onnx
from vpdeploy.deploy.session import describe
from vpdeploy.measure.arms import image_shape
from vpdeploy.measure.engines import Setting, Subject
from vpdeploy.measure.factors import latency_factor
from vpdeploy.measure.inputs import random_images
from vpdeploy.measure.latency import measure_latency
from vpdeploy.measure.macs import count_macs
from vpdeploy.models.tokens.blocks import blocks_of
from vpdeploy.models.tokens.prompt import as_published, split_prompt
from vpdeploy.models.tokens.share import attention_shares
from vpdeploy.values import BlockTokens, TokenCost, Tokens
from vpdeploy.workbench import Workbench, read_tuned

IMAGES = 32
WITHOUT, PUBLISHED, SHIPPED = "without tokens", "as published", "as shipped"


def measure_tokens(work: Workbench, arm: str) -> Tokens | None:
    """Of the float form, with one image and the fewest threads: the arm's network without its tokens, as their authors have it,
    and folded, timed in the same rounds. None for an arm that ships no tokens.
    """
    recipe, tuned = work.recipe, read_tuned(work, arm)
    pixels, tokens = split_prompt(tuned.prompt)
    if not tokens:
        return None

    def made(*, of: bool, folded: bool) -> Deployable:
        prompt = tuned.prompt if of else pixels
        classifier = work.built.classifier
        return bake(replace(tuned, prompt=prompt), recipe=recipe, classifier=classifier, form="float", folded=folded)

    trained = made(of=True, folded=False)
    shares = attention_shares(trained.backbone, _canvases(work, trained))
    as_published(trained.backbone)
    networks = {WITHOUT: made(of=False, folded=True), PUBLISHED: trained, SHIPPED: made(of=True, folded=True)}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{number}.onnx" for number, name in enumerate(networks)}
        about = describe(recipe, arm=arm, form="float", classes=work.source.classes, version=version("vpdeploy"))
        for name, network in networks.items():
            to_onnx(network, files[name], opset=recipe.export.opset, metadata=about)
        timed = measure_latency(
            {name: Subject(path) for name, path in files.items()},
            random_images("float", image_shape("float", recipe), batch=1, seed=recipe.seed),
            form="float",
            setting=Setting(threads=min(recipe.bench.threads)),
            seconds=recipe.bench.seconds,
        ).latencies
        sizes = {name: path.stat().st_size for name, path in files.items()}

    def cost(name: str) -> TokenCost:
        faster = latency_factor(timed[WITHOUT], timed[name], seed=recipe.seed)
        network = networks[name].backbone
        return TokenCost(
            form=name,
            macs=count_macs(network, canvas_size=recipe.input.canvas).macs,
            params=sum(p.numel() for p in network.parameters()),
            file_bytes=sizes[name],
            p50_ms=timed[name].p50_ms,
            times=1 / faster.factor,
            interval=(1 / faster.interval[1], 1 / faster.interval[0]),
        )

    table = recipe.prompt.tokens
    names = [block.name for block in blocks_of(networks[WITHOUT].backbone)]
    blocks = (BlockTokens(name, len(tokens.get(name, ())), shares.get(name)) for name in names)
    return Tokens(table.kind, table.count, tuple(blocks), tuple(map(cost, networks)), timed[WITHOUT].conditions)


def _canvases(work: Workbench, deployable: Deployable) -> torch.Tensor:
    """Validation images as the backbone sees them: [n, 3, C, C]."""
    recipe = work.recipe
    images = some_images(work.source.val, IMAGES, max_bad=recipe.data.on_bad_image)
    size, how = recipe.input.image_size, recipe.input.resize
    with torch.inference_mode():
        placed = torch.cat([resize(torch.from_numpy(image)[None], size, how=how) for image in images])
        return deployable.canvas(placed)
