"""What deep prompt tokens cost ViT-B/16: none, in the sequence as published, folded to keys and values, and as it ships.

    uv run python benchmarks/token_cost.py [--tokens 10,50,100,200] [--threads 2] [--seconds 20]

Weights and tokens are random (the classifier is not zero, and the tokens are large enough to matter): time and products do not
depend on them. Files are timed by ONNX Runtime on the CPU, all of them in the same rounds, and their logits compared.

Products are counted, and held against the formulas: with B blocks of width d, L tokens of image and class, and N of the prompt
in each block, the sequence costs B (12 N d^2 + (4 L N + 2 N^2) d) more, and constant keys and values B 2 L N d. As it ships, the
last block computes the class token alone: of its 12 L d^2 + 2 L (L + N) d products, 2 L d^2 + 10 d^2 + 2 (L + N) d are left.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from side_by_side import print_machine
from torch import nn
from torchvision.models import vit_b_16

from vpdeploy.benching import bench_files
from vpdeploy.deploy.bake import Deployable
from vpdeploy.deploy.onnx_file import to_onnx
from vpdeploy.deploy.session import describe_input
from vpdeploy.measure.engines import Setting, Subject, open_session
from vpdeploy.measure.macs import count_macs
from vpdeploy.models.attention.replace import replace_attention
from vpdeploy.models.tokens.fold import fold, fold_readout, fold_tokens
from vpdeploy.models.tokens.prompt import as_published, new_tokens, put_tokens
from vpdeploy.prompts.canvas import Canvas
from vpdeploy.recipe.tables import BenchTable, TokensTable

SIDE, BLOCKS, WIDTH, LENGTH = 224, 12, 768, 197
LARGER = 5.0  # than VPT draws them


def network() -> nn.Module:
    torch.manual_seed(0)
    plain = vit_b_16(weights=None).eval()
    nn.init.normal_(plain.get_submodule("heads.head").get_parameter("weight"), std=WIDTH**-0.5)
    return replace_attention(plain, torch.zeros(1, 3, SIDE, SIDE)).network


def variants(count: int) -> dict[str, nn.Module]:
    """Equal networks: the prompts in the sequence, folded, and with what is read of the last block alone."""
    if not count:
        plain, shipped = network(), network()
        fold_readout(shipped, canvas_size=SIDE)
        return {"no prompt": plain, "no prompt, as shipped": shipped}
    table = TokensTable(kind="vpt-deep", count=count)
    naive, folded, shipped = network(), network(), network()
    drawn = new_tokens(folded, table, generator=torch.Generator().manual_seed(1))
    tokens = {name: LARGER * rows for name, rows in drawn.items()}
    for one in (naive, folded, shipped):
        put_tokens(one, tokens, table)
    as_published(naive)
    fold_tokens(folded, canvas_size=SIDE)
    fold(shipped, canvas_size=SIDE)
    return {f"N = {count}, in the sequence": naive, f"N = {count}, folded": folded, f"N = {count}, as shipped": shipped}


def expected_macs(name: str, dense: int) -> int:
    """As the formulas have it; ``dense``: without a prompt."""
    first, _, form = name.partition(", ")
    n = 0 if first == "no prompt" else int(first.rpartition(" ")[2])
    if form == "in the sequence":
        return dense + BLOCKS * (12 * n * WIDTH**2 + (4 * LENGTH * n + 2 * n**2) * WIDTH)
    folded = dense + BLOCKS * 2 * LENGTH * n * WIDTH
    if form != "as shipped":
        return folded
    block = 12 * LENGTH * WIDTH**2 + 2 * LENGTH * (LENGTH + n) * WIDTH
    return folded - block + 2 * LENGTH * WIDTH**2 + 10 * WIDTH**2 + 2 * (LENGTH + n) * WIDTH


def write(backbone: nn.Module, path: Path) -> None:
    canvas = Canvas(SIDE, SIDE, mean=(0.5,) * 3, std=(0.5,) * 3, prompt=None)
    deployable = Deployable(backbone, canvas, form="float", image_size=SIDE, resize_how="stretch").eval()
    classes = [str(k) for k in range(1000)]
    about = describe_input(
        form="float", classes=classes, image_size=SIDE, canvas_size=SIDE, resize="stretch", mean=(0.5,) * 3, std=(0.5,) * 3,
        version=version("vpdeploy"),
    )  # fmt: skip
    to_onnx(deployable.requires_grad_(False), path, opset=18, metadata=about)


def compared(files: Mapping[str, Path]) -> dict[str, np.ndarray]:
    """The logits of two random images, by ONNX Runtime."""
    images = np.random.default_rng(0).random((2, 3, SIDE, SIDE), np.float32)
    return {name: open_session(Subject(path), Setting(threads=2))(images) for name, path in files.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=lambda text: [int(n) for n in text.split(",")], default=[10, 50, 100, 200])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0)
    args = parser.parse_args()
    print_machine()
    with tempfile.TemporaryDirectory() as folder:
        files, macs = {}, {}
        for count in (0, *args.tokens):
            for name, made in variants(count).items():
                files[name] = Path(folder) / f"{len(files)}.onnx"
                macs[name] = count_macs(made, canvas_size=SIDE).macs
                write(made, files[name])
        logits = compared(files)
        table = BenchTable(batches=(1,), threads=(args.threads,), seconds=args.seconds)
        found = bench_files(list(files.values()), table=table, image_size=None).files
    dense, plain = macs["no prompt"], logits["no prompt"]
    print(
        "\n| file | GMACs | formula | MiB | p50, ms | times no prompt (95 %) | logits from no prompt | from the first form |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, path in files.items():
        figures, prompt = found[str(path)], name.partition(", ")[0]
        other = next(kind for kind in files if kind.partition(", ")[0] == prompt)
        times = ", ".join(
            f"{1 / f.factor:.3f} ({1 / f.interval[1]:.3f} to {1 / f.interval[0]:.3f})" for f in figures.factors
        )
        scale = np.abs(plain).max()
        off = macs[name] / expected_macs(name, dense) - 1
        print(
            f"| {name} | {macs[name] / 1e9:.2f} | {off:+.2%} | {figures.file_bytes / 2**20:.1f} | "
            f"{figures.latency[0].p50_ms:.0f} | {times or '–'} | {np.abs(logits[name] - plain).max() / scale:.2f} | "
            f"{np.abs(logits[name] - logits[other]).max() / scale:.1e} |"
        )


if __name__ == "__main__":
    main()
