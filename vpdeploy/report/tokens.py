"""The prompt's tokens of a transformer: what they cost, where they stand, and what the file computes in a cheaper form."""

from __future__ import annotations

from collections.abc import Iterator

from vpdeploy.report.headline import describe
from vpdeploy.report.numbers import NOTHING, amount, mebibytes, significant
from vpdeploy.report.sheets import Cell, Sheet, sheet_of
from vpdeploy.values import Report, Tokens


def tokens_of(report: Report) -> dict[str, Tokens]:
    """The arms that ship tokens."""
    return {name: arm.tokens for name, arm in report.arms.items() if arm.tokens is not None}


def folds(report: Report) -> list[str]:
    """A line for each thing that was folded, or was not; those that all arms share once."""
    told: dict[str, list[str]] = {}
    for name, arm in report.arms.items():
        for made in arm.folds:
            line = f"{made.what} {'folded' if made.done else 'not folded'}: {made.how}"
            told.setdefault(line, []).append(name)
    return [
        f"{'all arms' if len(names) == len(report.arms) else ', '.join(names)}: {line}" for line, names in told.items()
    ]


def costs(found: Tokens) -> Sheet:
    """One row for each way to write the network."""
    without = found.costs[0]

    def rows() -> Iterator[tuple[Cell | str, ...]]:
        for cost in found.costs:
            low, high = cost.interval
            same = cost is without
            yield (
                cost.form,
                Cell(amount(cost.macs), "" if same else f"{100 * (cost.macs / without.macs - 1):+.1f} %"),
                amount(cost.params),
                Cell(
                    mebibytes(cost.file_bytes), "" if same else f"{(cost.file_bytes - without.file_bytes) / 2**20:+.3f}"
                ),
                significant(cost.p50_ms),
                NOTHING if same else Cell(f"{cost.times:.2f}x", f"{low:.2f} to {high:.2f}"),
            )

    count = sum(block.count for block in found.blocks)
    caption = (
        f"{found.kind}: {found.count} tokens of a block before condensation, {count} in all that ship. The same weights each "
        f"time, files timed in the same rounds: {describe(found.conditions)}. As published: nothing folded, tokens of VPT in the "
        "sequence; of a Swin they are keys and values at all times, which is less than their authors compute."
    )
    return sheet_of(caption, ("network", "MACs", "params", "file, MiB", "p50, ms", "time"), rows())


def blocks(found: Tokens) -> Sheet:
    """One row a block."""

    def rows() -> Iterator[tuple[Cell | str, ...]]:
        for block in found.blocks:
            share = NOTHING if block.attention is None else f"{100 * block.attention:.1f} %"
            yield block.block, str(block.count), share

    caption = (
        "Share: of the attention of all tokens in the sequence, the mean over heads and validation images of what goes to tokens "
        "of the prompt."
    )
    return sheet_of(caption, ("block", "tokens", "share of attention"), rows())
