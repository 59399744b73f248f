"""Transformers with tokens of unlike counts and half of their MACs removed: masked, cut, folded, in one ONNX file.

    uv run python benchmarks/token_parity.py [--count 50]

Random weights (no head is zero), tokens so large that they matter. Heads and hidden units go by random scores, in groups that
were proved to be exact; the tokens are put in behind, as on the road. Each step is compared with the one before: mask and removal
in float64, folding in float32, the file by ONNX Runtime at batch 1, 3 and 8; all relative to the largest logit.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from side_by_side import print_machine
from token_cost import SIDE, write
from torch import Tensor, nn
from torchvision.models import swin_t, vit_b_16

from vpdeploy.measure.engines import Setting, Subject, open_session
from vpdeploy.measure.macs import count_macs
from vpdeploy.models.attention.replace import replace_attention
from vpdeploy.models.tokens.blocks import blocks_of
from vpdeploy.models.tokens.fold import fold
from vpdeploy.models.tokens.prompt import new_tokens, put_tokens, token_parameters
from vpdeploy.recipe.tables import TokensTable
from vpdeploy.scoring.select import build_selector, select
from vpdeploy.surgery.cost import build_cost_model
from vpdeploy.surgery.cut import cut
from vpdeploy.surgery.exactness import probe
from vpdeploy.surgery.gates import Gated, mask_row
from vpdeploy.surgery.groups import example_input, find_groups
from vpdeploy.surgery.plan import plan

RATIO, LARGER, BATCHES = 0.5, 5.0, (1, 3, 8)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ViT-B/16": lambda: vit_b_16(weights=None),
    "Swin-T": lambda: swin_t(weights=None),
}


def network(name: str) -> nn.Module:
    """With attention that can lose heads, and no parameter as it is made: zeros and ones hide what is wrong."""
    torch.manual_seed(0)
    plain = NETWORKS[name]().eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.ndim == 1 or float(parameter.abs().max()) == 0:
                parameter.add_(0.02 * torch.randn(parameter.shape))
    return replace_attention(plain, torch.zeros(1, 3, SIDE, SIDE)).network


def prompted(of: nn.Module, table: TokensTable) -> nn.Module:
    """With 0 to ``table.count`` tokens in a block, no two blocks beside each other with the same number."""
    generator = torch.Generator().manual_seed(1)
    drawn = new_tokens(of, table, generator=generator)
    counts = [round(table.count * (number * 5 % 12) / 11) for number in range(len(drawn))]
    put_tokens(
        of, {name: LARGER * rows[:count] for (name, rows), count in zip(drawn.items(), counts, strict=True)}, table
    )
    return of


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@torch.no_grad()
def measured(name: str, *, count: int) -> str:
    dense, example = network(name), example_input(SIDE, batch=1)
    groups = probe(dense, find_groups(dense, example), example=example).prunable
    cost = build_cost_model(dense, groups, example=example)
    selector = build_selector(groups, cost, budget="macs_ratio", requested=RATIO, round_to=8, max_removal=0.9)
    drawn = np.random.default_rng(0)
    selection = select(selector, {group.root: drawn.random(group.width) for group in groups})
    smaller = cut(dense, plan(dense, groups, selection.mask))
    macs = [count_macs(one, canvas_size=SIDE).macs for one in (dense, smaller)]
    table = TokensTable(kind="vpt-deep", count=count)
    without, images = copy.deepcopy(smaller), torch.rand(max(BATCHES), 3, SIDE, SIDE)
    canvas = (images - 0.5) / 0.5  # as the file normalises
    for one in (dense, smaller):
        prompted(one, table)
    there = token_parameters(smaller)
    counts = [len(there.get(block.name, ())) for block in blocks_of(smaller)]
    shown = canvas[:2].double()
    masked = Gated(copy.deepcopy(dense).double(), groups)(shown, mask_row(groups, selection.mask, dtype=torch.float64))
    removed = apart(copy.deepcopy(smaller).double()(shown), masked)
    expected, plain = smaller(canvas), without(canvas)
    folds = fold(smaller, canvas_size=SIDE)
    folded = apart(smaller(canvas), expected)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "n.onnx"
        write(smaller, path)
        session = open_session(Subject(path), Setting(threads=2))
        by_batch = [apart(torch.from_numpy(session(images[:n].numpy())), expected[:n]) for n in BATCHES]
    for made in folds:
        print(f"{name}: {made.what} {'folded' if made.done else 'not folded'}: {made.how}")
    tokens = f"{min(counts)} to {max(counts)} in {len(counts)} blocks"
    errors = (removed, folded, *by_batch)
    figures = " | ".join(f"{error:.1e}" for error in errors)
    return f"| {name} | {macs[1] / macs[0]:.3f} | {tokens} | {apart(expected, plain):.2f} | {figures} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50)
    args = parser.parse_args()
    print_machine()
    rows = [measured(name, count=args.count) for name in NETWORKS]
    batches = " | ".join(f"file, batch {n}" for n in BATCHES)
    print(
        f"\n| network | MACs kept | tokens | their effect | masked against removed | unfolded against folded | {batches} |"
    )
    print("|---|---:|---|---:|---:|---:|" + "---:|" * len(BATCHES))
    print("\n".join(rows))


if __name__ == "__main__":
    main()
