"""MACs equal their closed forms, what cannot be counted is named, and nothing is left changed."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from vpdeploy.data.resize import resize
from vpdeploy.measure.macs import count_macs, preprocessing_macs

SIZE = 12


class Wrapped(nn.Module):
    """Any function of the canvas [1, 3, 12, 12] as a backbone."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.function(self, x)


def macs(network: nn.Module) -> int:
    counted = count_macs(network, canvas_size=SIZE)
    assert counted.uncounted == {}
    return counted.macs


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), 8 * 3 * 9 * SIZE**2),
        (nn.Conv2d(3, 8, 3, stride=2, bias=False), 8 * 3 * 9 * 5**2),
        (nn.Conv2d(3, 6, 3, padding=1, groups=3), 6 * 1 * 9 * SIZE**2),
        (nn.Conv2d(3, 3, 5, padding=2, groups=3), 3 * 25 * SIZE**2),
        (nn.Conv2d(3, 8, 3, padding="same", dilation=2), 8 * 3 * 9 * SIZE**2),
        (nn.ConvTranspose2d(3, 8, 2, stride=2), 3 * 8 * 4 * SIZE**2),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE**2, 10)), 3 * SIZE**2 * 10),
        (nn.Linear(SIZE, 7), 3 * SIZE * SIZE * 7),
        (nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.GroupNorm(3, 3), nn.MaxPool2d(2), nn.AvgPool2d(2)), 0),
        (nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Hardswish(), nn.SiLU(), nn.GELU(), nn.Sigmoid(), nn.Softmax(1)), 0),
    ],
)
def test_a_layer_costs_its_closed_form(layer, expected):
    assert macs(layer) == expected


def test_matrix_products_cost_outputs_times_inner_axis():
    x_transposed_x = Wrapped(lambda _, x: x.flatten(2) @ x.flatten(2).transpose(1, 2))  # [1, 3, 144] @ [1, 144, 3]
    assert macs(x_transposed_x) == 3 * 144 * 3
    broadcast = Wrapped(lambda _, x: x[0, 0] @ x)  # [12, 12] @ [1, 3, 12, 12]: the left factor is used three times
    assert macs(broadcast) == 3 * SIZE**3
    added = Wrapped(lambda _, x: torch.baddbmm(x[0], x[0], x[0]))
    assert macs(added) == 3 * SIZE**3
    einsum = Wrapped(lambda _, x: torch.einsum("nchw, nchv -> ncwv", x, x))
    assert macs(einsum) == 3 * SIZE**3
    vector = Wrapped(lambda _, x: x[0, 0] @ x[0, 0, 0])
    assert macs(vector) == SIZE**2


def test_scaled_dot_product_attention_costs_both_products():
    tokens = Wrapped(lambda _, x: F.scaled_dot_product_attention(x, x[:, :, :5], x[:, :, :5, :7]))
    # 3 heads, 12 queries of 12, 5 keys of 12, 5 values of 7
    assert macs(tokens) == 3 * SIZE * 5 * (12 + 7)


@pytest.mark.parametrize("need_weights", [False, True])
def test_multihead_attention_costs_projections_and_both_products(need_weights):
    length, width = 3 * SIZE, SIZE
    attention = nn.MultiheadAttention(width, 4, batch_first=True)
    network = Wrapped(
        lambda self, x: self.attention(*[x.reshape(1, length, width)] * 3, need_weights=need_weights)[0],
        attention=attention,
    )
    assert macs(network) == 4 * length * width**2 + 2 * length**2 * width


def test_a_transformer_layer_is_counted_in_full_and_the_fast_path_is_put_back():
    length, width = 3 * SIZE, SIZE
    layer = nn.TransformerEncoderLayer(width, 4, dim_feedforward=20, batch_first=True)
    network = Wrapped(lambda self, x: self.layer(x.reshape(1, length, width)), layer=layer)
    before = torch.backends.mha.get_fastpath_enabled()
    assert macs(network) == 4 * length * width**2 + 2 * length**2 * width + 2 * length * width * 20
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_resnet18_at_224_is_its_convolutions_and_its_linear_layer():
    from torchvision.models import resnet18

    counted = count_macs(resnet18(), canvas_size=224)
    assert (counted.macs, counted.uncounted) == (1_814_073_344, {})


def test_operations_that_may_hide_products_are_named():
    network = Wrapped(
        lambda self, x: self.recurrent(F.interpolate(x, scale_factor=2)[0, 0, :, :8])[0],
        recurrent=nn.LSTM(8, 4),
    )
    counted = count_macs(network, canvas_size=SIZE)
    assert counted.macs == 0
    assert counted.uncounted == {"aten::lstm": 1, "aten::upsample_nearest2d": 1}


def test_the_network_is_left_as_it_was():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).double().train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    count_macs(network, canvas_size=SIZE)
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("how", ["stretch", "shorter-side-crop"])
@pytest.mark.parametrize(("height", "width", "size"), [(37, 50, 8), (8, 8, 32), (9, 64, 9), (100, 33, 33), (1, 5, 4)])
def test_preprocessing_counts_the_products_that_the_resize_really_takes(height, width, size, how):
    with FlopCounterMode(display=False) as counter:
        resize(torch.zeros(1, height, width, 3, dtype=torch.uint8), size, how=how)
    assert preprocessing_macs(height, width, image_size=size, resize_how=how) == counter.get_total_flops() // 2
