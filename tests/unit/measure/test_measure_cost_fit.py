"""Costs of any widths from a few measured networks: exact where the form is right, never less for what is wider."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from vpdeploy.measure.cost_fit import fit_layers, fit_whole, non_negative
from vpdeploy.surgery.exactness import probe
from vpdeploy.surgery.groups import example_input, groups_of
from vpdeploy.surgery.shapes import Shapes, shapes_of
from vpdeploy.surgery.trace import look
from vpdeploy.values import Term


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 12, 3, padding=1, groups=12), nn.BatchNorm2d(12), nn.ReLU(),
        nn.Conv2d(12, 20, 1, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(20, 5),
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def shapes() -> Shapes:
    net, example = network(), example_input(8, batch=1)
    seen = look(net, example)
    return shapes_of(seen, net, probe(net, groups_of(seen, net), example=example).prunable)


WIDTHS = np.array([[4, 4], [4, 20], [12, 4], [8, 12], [12, 20], [6, 16]], float)
OTHERS = np.array([[5, 7], [10, 18], [12, 6]], float)


def test_shapes_tell_how_long_axes_are_and_where_layers_stand(shapes):
    by_name = {layer.module: layer for layer in shapes.layers}
    assert list(by_name) == ["0", "3", "6", "10"]
    assert by_name["0"].positions == 64 and by_name["6"].positions == 16 and by_name["10"].positions == 1
    assert by_name["6"].lengths(np.array([5.0, 7.0])).tolist() == [7, 5]
    assert by_name["3"].lengths(np.array([5.0, 7.0])).tolist() == [5, 1]  # depthwise
    assert by_name["0"].macs == 12 * 27 * 64
    assert shapes.other_macs == 0


def test_times_that_follow_widths_are_found_again(shapes):
    true = [
        Term("0", 0.002, (("0.weight", 0), ("0.weight", 1))),
        Term("3", 0.01, (("3.weight", 0),)),
        Term("6", 0.5),
        Term("6", 0.001, (("6.weight", 0), ("6.weight", 1))),
        Term("10", 0.02, (("10.weight", 1),)),
        Term("", 0.3),
    ]

    def sample(row: np.ndarray) -> dict[str, float]:
        parts: dict[str, float] = {}
        for term in true:
            parts[term.module] = parts.get(term.module, 0.0) + shapes.sum_of([term]).at(row)
        return parts

    samples = [sample(row) for row in WIDTHS]
    fitted = shapes.sum_of(fit_layers(samples, np.array([sum(s.values()) for s in samples]), WIDTHS, shapes))
    for row in OTHERS:
        assert fitted.at(row) == pytest.approx(sum(sample(row).values()), rel=1e-4)


def test_what_the_profiler_does_not_see_belongs_to_no_layer(shapes):
    samples = [{"0": 1.0, "": 0.5}] * len(WIDTHS)
    terms = fit_layers(samples, np.full(len(WIDTHS), 2.0), WIDTHS, shapes)
    of_layer = shapes.sum_of([term for term in terms if term.module == "0"])
    assert of_layer.at(OTHERS[0]) == pytest.approx(1.0, rel=1e-6)
    assert shapes.sum_of(terms).at(OTHERS[0]) == pytest.approx(2.0, rel=1e-6)


def test_a_profiler_that_slows_what_it_watches_is_brought_back_to_the_total(shapes):
    samples = [{"0": 3.0, "": 1.0}] * len(WIDTHS)
    terms = fit_layers(samples, np.full(len(WIDTHS), 2.0), WIDTHS, shapes)
    assert shapes.sum_of(terms).at(OTHERS[1]) == pytest.approx(2.0, rel=1e-6)
    of_layer = shapes.sum_of([term for term in terms if term.module == "0"])
    assert of_layer.at(OTHERS[1]) == pytest.approx(1.5, rel=1e-6)  # three quarters, as the profiler saw


def test_totals_alone_tell_what_a_product_and_a_value_cost(shapes):
    def total(row: np.ndarray) -> float:
        macs = sum(
            layer.macs * np.prod(layer.lengths(row) / layer.lengths(shapes.dense_widths)) for layer in shapes.layers
        )
        written = sum(layer.lengths(row)[0] * layer.positions for layer in shapes.layers)
        return 1.0 + 2e-5 * macs + 3e-4 * written

    fitted = shapes.sum_of(fit_whole(np.array([total(row) for row in WIDTHS]), WIDTHS, shapes))
    for row in OTHERS:
        assert fitted.at(row) == pytest.approx(total(row), rel=1e-4)


def test_noise_never_makes_a_wider_network_cheaper(shapes):
    generator = np.random.default_rng(0)
    for _ in range(20):
        samples = [{layer.module: float(generator.uniform(0.1, 2)) for layer in shapes.layers} for _ in WIDTHS]
        totals = np.array([sum(s.values()) for s in samples]) * generator.uniform(0.8, 1.2, len(samples))
        for terms in (fit_layers(samples, totals, WIDTHS, shapes), fit_whole(totals, WIDTHS, shapes)):
            assert all(term.amount >= 0 for term in terms)
            cost = shapes.sum_of(terms)
            assert cost.at(np.array([6.0, 9.0])) <= cost.at(np.array([7.0, 9.0])) <= cost.at(np.array([7.0, 12.0]))


def test_coefficients_are_found_and_not_below_zero():
    x = np.array([[1.0, 1], [1, 2], [1, 3], [1, 4]])
    assert non_negative(x, x @ [2.0, 3.0]) == pytest.approx([2, 3], rel=1e-5)
    falling = non_negative(x, np.array([4.0, 3, 2, 1]))
    assert falling[1] == 0 and falling[0] > 0
    assert non_negative(x, np.zeros(4)).tolist() == [0, 0]
