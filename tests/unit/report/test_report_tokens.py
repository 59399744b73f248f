"""What a report says of a transformer's tokens, and of what the file computes in a cheaper form."""

from __future__ import annotations

from dataclasses import replace

import pytest
from unit.report.test_report_pages import example_report

from vpdeploy.errors import VpdeployError
from vpdeploy.report.compare import check_consistency
from vpdeploy.report.render import render
from vpdeploy.report.tokens import blocks, costs, folds
from vpdeploy.values import BlockTokens, Conditions, Fold, Report, TokenCost, Tokens

AT = Conditions("onnxruntime-cpu", "cpu", "fp32", "float", 1, 1)
READ = Fold("read-out", True, "the last block computes 1 of 65: no other is read")


def with_tokens(*, shipped: int = 61_151_000) -> Report:
    report = example_report(groups=3)
    pruned = report.arms["pruned"]
    found = Tokens(
        "vpt-deep",
        100,
        (BlockTokens("blocks.0", 40, 0.317), BlockTokens("blocks.1", 0, None)),
        (
            TokenCost("without tokens", 60_000_000, 420_000, 1_700_000, 2.4, 1.0, (1.0, 1.0)),
            TokenCost("as published", 90_000_000, 431_000, 1_720_000, 3.3, 1.375, (1.35, 1.4)),
            TokenCost("as shipped", shipped, pruned.params, 1_740_000, 2.45, 1.02, (1.0, 1.04)),
        ),
        AT,
    )
    arms = {
        name: replace(
            arm,
            folds=(Fold("tokens", True, "constant keys and values, in 1 block"), READ) if name == "pruned" else (READ,),
            tokens=found if name == "pruned" else None,
        )
        for name, arm in report.arms.items()
    }
    return replace(report, arms=arms)


def test_each_way_to_write_the_network_stands_beside_the_one_without_tokens():
    (found,) = (arm.tokens for arm in with_tokens().arms.values() if arm.tokens)
    rows = [[(cell.text, cell.note) for cell in row] for row in costs(found).rows]
    assert [row[0][0] for row in rows] == ["without tokens", "as published", "as shipped"]
    assert [row[1] for row in rows] == [("60.0 M", ""), ("90.0 M", "+50.0 %"), ("61.2 M", "+1.9 %")]
    assert [row[5] for row in rows] == [("–", ""), ("1.38x", "1.35 to 1.40"), ("1.02x", "1.00 to 1.04")]
    assert "40 in all that ship" in costs(found).caption
    assert [[cell.text for cell in row] for row in blocks(found).rows] == [
        ["blocks.0", "40", "31.7 %"],
        ["blocks.1", "0", "–"],
    ]


def test_what_all_arms_share_is_told_once():
    assert folds(with_tokens()) == [
        f"all arms: read-out folded: {READ.how}",
        "pruned: tokens folded: constant keys and values, in 1 block",
    ]
    assert folds(example_report(groups=3)) == []


def test_both_pages_tell_it():
    pages = render(with_tokens())
    for page in (pages.markdown, pages.html):
        assert "the last block computes 1 of 65" in page and "31.7 %" in page and "1.38x" in page
    assert "40 / 100, 31.7 % of attention" in pages.html
    assert "Tokens of" not in render(example_report(groups=3)).html


def test_the_file_that_ships_is_the_one_whose_cost_is_told():
    check_consistency(with_tokens())
    with pytest.raises(
        VpdeployError, match=r"arms\.pruned\.tokens: as shipped has 61000000 MACs and 431200 parameters; "
    ):
        check_consistency(with_tokens(shipped=61_000_000))
