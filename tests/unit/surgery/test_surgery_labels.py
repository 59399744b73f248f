"""Labels by hand, and under every reshape that numpy knows."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vpdeploy.surgery.labels import (
    Field,
    Ints,
    LabelBook,
    Labelled,
    _parts,
    along,
    collapse,
    hold_all,
    merge,
    only,
    permuted,
    reshaped,
    stay,
)


def tensor(book: LabelBook, shape: tuple[int, ...], *axes: int) -> tuple[Labelled, dict[int, Ints]]:
    """A tensor of ``shape`` with fresh labels along each of ``axes``, and these labels."""
    labels = {axis: book.fresh(shape[axis]) for axis in axes}
    return Labelled(shape, tuple(along(labels[axis], axis, len(shape)) for axis in axes)), labels


def components(book: LabelBook, labels: Ints) -> list[int]:
    """Numbers from 0 in the order of ``labels``: which of them are one."""
    of = book.components().of[labels.ravel()].tolist()
    seen = list(dict.fromkeys(of))
    return [seen.index(component) for component in of]


def told(book: LabelBook, labels: Ints) -> list[str | None]:
    """Why each label can never go, None where it can."""
    found = book.components()
    return [found.rigid.get(component) for component in found.of[labels.ravel()].tolist()]


# --- joining --------------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40))
def test_what_is_joined_directly_or_through_others_is_one_component(count, pairs):
    book = LabelBook()
    labels = book.fresh(count)
    pairs = [(a % count, b % count) for a, b in pairs]
    for a, b in pairs:
        book.join(labels[[a]], labels[[b]])
    reach = [{label} for label in range(count)]  # by hand: merge the sets
    for a, b in pairs:
        if reach[a] is not reach[b]:
            union = reach[a] | reach[b]
            for label in union:
                reach[label] = union
    assert book.components().of.tolist() == [min(reach[label]) for label in range(count)]


def test_labels_are_handed_out_once_and_join_by_broadcasting():
    book = LabelBook()
    a, b = book.fresh(3), book.fresh(2)
    assert (a.tolist(), b.tolist(), book.count) == ([0, 1, 2], [3, 4], 5)
    book.join(np.stack([a, book.fresh(3)]), a[None, :])
    assert components(book, np.arange(8)) == [0, 1, 2, 3, 4, 0, 1, 2]


def test_of_two_reasons_the_first_stays_and_a_reason_reaches_all_that_is_joined():
    book = LabelBook()
    a, b = book.fresh(2), book.fresh(2)
    book.hold(a[:1], "first")
    book.hold(a, "second")
    book.normalise(b[1:], "a norm")
    book.suspect(b, "code")
    book.join(a, b)
    found = book.components()
    assert (found.rigid, found.normalised, found.suspect) == (
        {0: "first", 1: "second"},
        {1: "a norm"},
        {0: "code", 1: "code"},
    )


# --- one tensor -----------------------------------------------------------------------------------------------------


def test_a_collapsed_axis_is_one_channel_for_each_position_of_the_others():
    book = LabelBook()
    labels = book.fresh(6)
    field = collapse(book, Field(labels.reshape(2, 3), (0, 1)), [1])
    assert (field.labels.shape, field.covered) == ((2, 1), (0,))
    assert components(book, labels) == [0, 0, 0, 1, 1, 1]


def test_an_axis_that_stays_holds_what_covers_it_alone_and_collapses_what_covers_others_too():
    book = LabelBook()
    heads, alone = book.fresh(6), book.fresh(4)
    x = Labelled((2, 3, 4), (Field(heads.reshape(2, 3, 1), (0, 1, 2)), along(alone, 2, 3)))
    left = stay(book, x, [-1, 1], "why")
    assert told(book, alone) == ["why"] * 4
    assert told(book, heads) == [None] * 6 and components(book, heads) == [0, 0, 0, 1, 1, 1]
    assert [field.covered for field in left.fields] == [(0,)]
    assert hold_all(book, left, "all").fields == () and told(book, heads) == ["all"] * 6


def test_only_one_axis_of_a_field_over_two_is_left():
    book = LabelBook()
    labels = book.fresh(6)
    x = only(book, Labelled((2, 3), (Field(labels.reshape(2, 3), (0, 1)),)), 1)
    assert [field.covered for field in x.fields] == [(1,)] and components(book, labels) == [0, 1, 2, 0, 1, 2]
    bare = Labelled((2, 3))
    assert only(book, bare, 1) is bare


@given(st.permutations(range(4)))
def test_permuted_labels_are_those_of_the_permuted_tensor(order):
    labels = np.arange(2 * 3 * 4).reshape(2, 3, 4, 1)
    x = permuted(Labelled((2, 3, 4, 5), (Field(labels, (0, 1, 2, 3)),)), [axis - 4 for axis in order])
    assert x.shape == tuple((2, 3, 4, 5)[axis] for axis in order)
    assert np.array_equal(x.fields[0].labels, labels.transpose(order))
    assert x.fields[0].nesting == tuple(order)


# --- two tensors ----------------------------------------------------------------------------------------------------


def test_two_tensors_join_position_by_position():
    book = LabelBook()
    x, a = tensor(book, (2, 3, 5), 1)
    y, b = tensor(book, (2, 3, 5), 1)
    merged = merge(book, x, y, "why")
    assert (merged.shape, [field.covered for field in merged.fields]) == ((2, 3, 5), [(1,)])
    assert components(book, np.concatenate([a[1], b[1]])) == [0, 1, 2, 0, 1, 2]
    assert told(book, a[1]) == [None] * 3


def test_a_tensor_of_fewer_axes_or_of_length_one_is_broadcast():
    book = LabelBook()
    x, a = tensor(book, (2, 3, 1), 1)
    y, b = tensor(book, (5,), 0)
    merged = merge(book, x, y, "why")  # each channel of x meets each of y: neither is the other's
    assert merged.shape == (2, 3, 5)
    assert {field.covered for field in merged.fields} == {(1,), (2,)}
    assert components(book, np.concatenate([a[1], b[0]])) == list(range(8))
    z, c = tensor(book, (3, 1), 0)
    merge(book, merged, z, "why")
    assert components(book, np.concatenate([a[1], c[0]])) == [0, 1, 2] * 2
    assert told(book, np.concatenate([a[1], b[0], c[0]])) == [None] * 11


@pytest.mark.parametrize("swapped", [False, True])
def test_channels_against_an_axis_that_never_changes_stay(swapped):
    book = LabelBook()
    x, a = tensor(book, (2, 3), 0, 1)
    pair = (x, Labelled((2, 3), (along(book.fresh(2), 0, 2),)))
    merged = merge(book, *(reversed(pair) if swapped else pair), "why")
    assert told(book, a[1]) == ["why"] * 3 and told(book, a[0]) == [None] * 2
    assert [field.covered for field in merged.fields] == [(0,)]


def test_a_field_over_two_axes_against_one_of_them_is_collapsed_to_what_both_have():
    book = LabelBook()
    labels, other = book.fresh(6), book.fresh(2)
    x = Labelled((2, 3), (Field(labels.reshape(2, 3), (0, 1)),))
    y = Labelled((2, 1), (along(other, 0, 2),))
    merged = merge(book, x, y, "why")
    assert [field.covered for field in merged.fields] == [(0,)]
    assert components(book, np.concatenate([other, labels])) == [0, 1, 0, 0, 0, 1, 1, 1]


def test_only_two_constants_make_a_constant():
    book = LabelBook()
    constant, given_ = Labelled((3,), constant=True), Labelled((3,))
    assert merge(book, constant, constant, "").constant
    assert not merge(book, constant, given_, "").constant and not merge(book, given_, constant, "").constant


# --- other shapes ---------------------------------------------------------------------------------------------------


def test_a_split_axis_keeps_its_labels_and_merges_back():
    book = LabelBook()
    x, labels = tensor(book, (2, 6, 4), 1)
    split = reshaped(book, x, (2, 3, 2, 4), "view")
    (field,) = split.fields
    assert np.array_equal(field.labels, labels[1].reshape(1, 3, 2, 1)) and field.covered == (1, 2)
    (back,) = reshaped(book, split, (2, 6, 4), "view").fields
    assert np.array_equal(back.labels, labels[1].reshape(1, 6, 1))
    assert components(book, labels[1]) == list(range(6))  # nothing was joined


def test_a_merged_axis_repeats_each_label():
    book = LabelBook()
    x, labels = tensor(book, (2, 3, 4), 1)
    (field,) = reshaped(book, x, (2, 12), "flatten").fields
    assert field.labels.tolist() == [np.repeat(labels[1], 4).tolist()]
    (last,) = reshaped(book, permuted(x, (0, 2, 1)), (2, 12), "flatten").fields  # as of [n, h * w, c]
    assert last.labels.tolist() == [np.tile(labels[1], 4).tolist()]
    assert components(book, labels[1]) == [0, 1, 2]


def test_shuffled_parts_lose_the_same_positions():
    book = LabelBook()
    x, labels = tensor(book, (2, 6), 1)
    y = reshaped(book, permuted(reshaped(book, x, (2, 2, 3), ""), (0, 2, 1)), (2, 6), "")
    assert components(book, labels[1]) == [0, 1, 2, 0, 1, 2]
    of = book.components().of
    assert of[y.fields[0].labels].ravel().tolist() == of[labels[1][[0, 0, 1, 1, 2, 2]]].tolist()


def test_heads_split_apart_and_moved_come_back_whole():
    """[n, t, h * d] -> [n, h, t, d] -> [n, t, h * d], as attention has it: the axes lie again as they lay."""
    book = LabelBook()
    x, labels = tensor(book, (2, 5, 6), 2)
    apart = permuted(reshaped(book, x, (2, 5, 3, 2), ""), (0, 2, 1, 3))
    back = reshaped(book, permuted(apart, (0, 2, 1, 3)), (2, 5, 6), "")
    assert back.fields[0].labels.ravel().tolist() == labels[2].tolist() and components(book, labels[2]) == list(
        range(6)
    )


def test_an_axis_merged_of_two_fields_stays():
    """A position of it would hang on two channels."""
    book = LabelBook()
    x, labels = tensor(book, (3, 4), 0, 1)
    assert reshaped(book, x, (12,), "flatten").fields == ()
    assert (
        told(book, np.concatenate([labels[0], labels[1]]))
        == ["flatten, where axes of different channels become one"] * 7
    )


def test_an_axis_of_one_label_is_held():
    book = LabelBook()
    labels = book.fresh(1)
    x = Labelled((2, 3), (Field(np.broadcast_to(labels, (1, 3)), (0, 1)),))
    reshaped(book, x, (2, 3, 1), "view")
    assert told(book, labels) == ["view, where all its channels hang together"]


SHAPES = st.lists(st.sampled_from([1, 1, 2, 3, 4, 5, 6]), min_size=1, max_size=5).map(tuple)


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes of the same number of elements: the primes of one, dealt out anew, with ones between."""
    old = draw(SHAPES)
    primes: list[int] = []
    for size in old:
        while size > 1:
            prime = next(p for p in (2, 3, 5) if size % p == 0)
            primes.append(prime)
            size //= prime
    order = draw(st.permutations(primes))
    edges = sorted({0, len(order), *draw(st.lists(st.integers(0, len(order)), max_size=4))})
    new = [math.prod(order[a:b]) for a, b in pairwise(edges)] or [1]
    for place in draw(st.lists(st.integers(0, len(new)), max_size=2)):
        new.insert(place, 1)
    return old, tuple(new)


@settings(max_examples=300)
@given(reshapes())
def test_parts_hold_all_axes_in_order_and_as_many_elements_on_both_sides(shapes):
    old, new = shapes
    parts = _parts(old, new)
    assert [axis for a, _ in parts for axis in a] == list(range(len(old)))
    assert [axis for _, b in parts for axis in b] == list(range(len(new)))
    for a, b in parts:
        assert math.prod(old[i] for i in a) == math.prod(new[j] for j in b)
        for i, j in ((i, j) for i in range(1, len(a)) for j in range(1, len(b))):  # no shorter ones inside
            assert math.prod(old[a.start : a.start + i]) != math.prod(new[b.start : b.start + j])


@settings(max_examples=300)
@given(shapes=reshapes(), data=st.data())
def test_labels_of_a_reshaped_tensor_are_the_reshaped_labels(shapes, data):
    """Whatever the shapes: what is known of each element before is known of it after, or was held, and said so."""
    old, new = shapes
    wide = [axis for axis, size in enumerate(old) if size > 1]
    covered = data.draw(st.lists(st.sampled_from(wide), unique=True) if wide else st.just([]))
    book = LabelBook()
    x, labels = tensor(book, old, *sorted(covered))
    y = reshaped(book, x, new, "why")
    assert y.shape == new
    of, rigid = book.components().of, book.components().rigid
    after = [np.broadcast_to(field.labels, new).ravel() for field in y.fields]
    for axis in covered:
        shape = [1] * len(old)
        shape[axis] = old[axis]
        before = np.broadcast_to(labels[axis].reshape(shape), old).ravel()
        held = all(int(of[label]) in rigid for label in labels[axis])
        assert held or any(np.array_equal(of[before], of[field]) for field in after)
    for field in y.fields:
        assert all(size in (1, length) for size, length in zip(field.labels.shape, new, strict=True))
        assert sorted(field.nesting) == list(range(len(new)))
    assert len({axis for field in y.fields for axis in field.covered}) == sum(len(field.covered) for field in y.fields)


@settings(max_examples=100)
@given(
    st.sampled_from([(4, 3, 2), (2, 3, 4), (6, 2, 2), (2, 2, 6)]),
    st.permutations(range(3)),
    st.integers(0, 5),
)
def test_split_moved_and_merged_every_element_knows_its_channel(split, order, rest):
    """An axis split in three, the parts in any order, merged again."""
    book = LabelBook()
    size = math.prod(split)
    x, labels = tensor(book, (size, rest + 1), 0)
    y = reshaped(book, permuted(reshaped(book, x, (*split, rest + 1), ""), (*order, 3)), (size, rest + 1), "")
    truth = np.arange(size).reshape(split).transpose(order).ravel()  # where each element came from
    of = book.components().of
    if y.fields:
        assert np.array_equal(of[y.fields[0].labels.ravel()], of[labels[0]][truth])
    else:
        assert all(why is not None for why in told(book, labels[0]))


def test_heads_survive_what_is_combined_with_each_of_them():
    """[heads, d] against constants over d alone (rotary positions, a norm within heads): the heads are what can go."""
    book = LabelBook()
    split = reshaped(book, Labelled((1, 6), (along(book.fresh(6), 1, 2),)), (1, 3, 2), "split")
    inner = Labelled((1, 1, 2), (along(book.fresh(2), 2, 3),), constant=True)
    merged = merge(book, split, inner, "combined")
    assert merged.fields[0].covered == (1,)
    components = book.components()
    assert len(set(components.of[:6].tolist())) == 3  # heads, each whole
    assert set(components.rigid) == set(components.of[6:].tolist())


def test_an_axis_put_in_between_does_not_change_which_is_the_outer():
    """A stack and a reshape over what is in a head, as rotary positions do, leave the heads the outer axis."""
    book = LabelBook()
    split = reshaped(book, Labelled((1, 6), (along(book.fresh(6), 1, 2),)), (1, 3, 2), "split")
    longer = reshaped(book, reshaped(book, split, (1, 3, 2, 1), "add"), (1, 3, 2), "take away")
    (field,) = longer.fields
    assert field.nesting[1] < field.nesting[2]
