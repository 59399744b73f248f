"""The gather is the zero-padded shortcut, bit for bit, and removing channels from either side is indexing."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from vpdeploy.models.gather import ChannelGather


def padded(x: torch.Tensor, pad: int, stride: int) -> torch.Tensor:
    return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, pad, pad))


@pytest.mark.parametrize(
    ("channels", "pad", "stride", "side"), [(16, 8, 2, 8), (32, 16, 2, 7), (3, 1, 1, 4), (4, 0, 2, 5)]
)
def test_gather_equals_slice_and_pad_with_gradients(channels, pad, stride, side):
    x = torch.randn(2, channels, side, side + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = padded(a, pad, stride)
    got = ChannelGather(channels, channels + 2 * pad, stride)(b)
    assert torch.equal(got, expected)
    weight = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (expected * weight).sum().backward()
    (got * weight).sum().backward()
    assert a.grad is not None and b.grad is not None
    assert torch.equal(a.grad, b.grad)


def test_odd_difference_places_from_the_lower_half():
    x = torch.ones(1, 2, 1, 1)
    assert ChannelGather(2, 5, 1)(x).flatten().tolist() == [0, 1, 1, 0, 0]


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_removing_channels_of_either_side_is_removing_them_from_the_dense_result(data):
    width, pad = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 3))
    total = width + 2 * pad
    kept_in = sorted(data.draw(st.sets(st.integers(0, width - 1), min_size=1)))
    kept_out = sorted(data.draw(st.sets(st.integers(0, total - 1), min_size=1)))
    x = torch.randn(2, width, 4, 4, dtype=torch.float64)
    gone = [j for j in range(width) if j not in kept_in]
    masked = x.clone()
    masked[:, gone] = 0
    expected = padded(masked, pad, 2)[:, kept_out]

    gather = ChannelGather(width, total, 2)
    gather.source = gather.source.index_select(0, torch.tensor(kept_in))
    gather.target = gather.target.index_select(0, torch.tensor(kept_out))
    gather.reindex()
    assert torch.equal(gather(x[:, kept_in]), expected)
    assert (gather.in_channels, gather.out_channels) == (len(kept_in), len(kept_out))


def test_selecting_twice_composes():
    x = torch.randn(1, 8, 2, 2)
    once, twice = ChannelGather(8, 12, 1), ChannelGather(8, 12, 1)
    once.source, once.target = once.source[[1, 6]], once.target[[3, 8, 11]]
    once.reindex()
    twice.source, twice.target = twice.source[[1, 4, 6]], twice.target[[0, 3, 8, 11]]
    twice.reindex()
    twice.source, twice.target = twice.source[[0, 2]], twice.target[[1, 2, 3]]
    twice.reindex()
    assert torch.equal(once(x[:, [1, 6]]), twice(x[:, [1, 6]]))


def test_gather_brings_no_keys_and_survives_copy_and_double():
    gather = ChannelGather(4, 8, 2)
    assert gather.state_dict() == {} and list(gather.parameters()) == []
    x = torch.randn(1, 4, 6, 6, dtype=torch.float64)
    twin = copy.deepcopy(gather).double()
    assert twin.index.dtype == torch.int64
    assert torch.equal(twin(x), gather(x))
    twin.source = twin.source[:2]
    twin.reindex()
    assert gather.in_channels == 4 and len(gather.source) == 4


def test_gather_in_onnx_runtime(tmp_path: Path):
    onnxruntime = pytest.importorskip("onnxruntime")
    cut = ChannelGather(16, 32, 2)
    cut.source, cut.target = cut.source[[1, 4, 5]], cut.target[[0, 9, 12, 13, 31]]
    cut.reindex()
    model = nn.Sequential(ChannelGather(3, 3, 1), cut).eval()
    file = tmp_path / "gather.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations; what counts is the file
        torch.onnx.export(
            model,
            (torch.rand(2, 3, 9, 7),),
            file,
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("n")},),
            verbose=False,
        )
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for n in (1, 2, 5):
        x = torch.rand(n, 3, 9, 7)
        (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert np.array_equal(got, model(x).numpy())
