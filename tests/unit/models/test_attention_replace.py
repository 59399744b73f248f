"""What is replaced in a network, what is not and why, and that the rest of it stays as it was."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torchvision.models import maxvit, swin_transformer, vision_transformer

from vpdeploy.errors import ModelError
from vpdeploy.models.attention.known import KNOWN
from vpdeploy.models.attention.multihead import MultiheadAttention
from vpdeploy.models.attention.replace import Replaced, apply_replacements, replace_attention

SAME_FLOAT32 = 1e-5
NOTHING = torch.zeros(1)  # for modules that are not called
MULTIHEAD = "heads:torch.nn.MultiheadAttention"


def randomise(network: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return network


def vit() -> nn.Module:
    return vision_transformer.VisionTransformer(
        32, 8, num_layers=2, num_heads=4, hidden_dim=24, mlp_dim=32, num_classes=5
    )


def swin() -> nn.Module:
    return swin_transformer.SwinTransformer([4, 4], 12, [2, 2], [3, 3], [4, 4], num_classes=5)


def swin_v2() -> nn.Module:
    return swin_transformer.SwinTransformer(
        [4, 4],
        12,
        [2, 2],
        [3, 3],
        [4, 4],
        num_classes=5,
        block=swin_transformer.SwinTransformerBlockV2,
        downsample_layer=swin_transformer.PatchMergingV2,
    )


def maxvit_t() -> nn.Module:
    return maxvit.MaxVit((32, 32), 8, 2, [16, 16], [1, 1], 8, 0.0, num_classes=5)


@pytest.mark.parametrize(("make", "size", "count"), [(vit, 32, 2), (swin, 38, 4), (swin_v2, 38, 4), (maxvit_t, 32, 4)])
def test_networks_keep_their_logits(make: Callable[[], nn.Module], size: int, count: int):
    network = randomise(make()).eval()
    before = copy.deepcopy(network.state_dict())
    x = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    found = replace_attention(network, x)
    new, names = found.network, found.replaced
    with torch.no_grad():
        logits, again = network(x), new(x)
    assert logits.std() > 1e-2 and (again - logits).abs().max() <= SAME_FLOAT32 * logits.abs().max()
    assert len(names) == count and not found.left and replace_attention(new, x) == Replaced(new, {}, {})
    # the network given is as it was, and shares nothing with the new one
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    theirs = {tensor.untyped_storage().data_ptr() for tensor in network.state_dict().values()}
    assert not theirs & {tensor.untyped_storage().data_ptr() for tensor in new.state_dict().values()}
    # replayed from plain data
    replayed = apply_replacements(network, names)
    with torch.no_grad():
        assert torch.equal(replayed(x), again)


def test_network_without_attention_is_itself():
    network = nn.Sequential(nn.Linear(2, 2))
    assert replace_attention(network, NOTHING) == Replaced(network, {}, {})


class Holder(nn.Module):
    """Attention held under three names, twice the same module."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(8, 2, batch_first=True)
        self.again = self.first
        self.other = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.first, self.again, self.other):
            x = x + part(x, x, x)[0]
        return x


def test_shared_modules_are_replaced_once_and_still_shared():
    network, x = Holder(), torch.randn(2, 5, 8)
    found = replace_attention(network, x)
    new = found.network
    assert found.replaced == {"first": MULTIHEAD, "other": MULTIHEAD} and not found.left
    assert new.first is new.again and isinstance(new.first, MultiheadAttention) and new.other is not new.first
    assert torch.allclose(new(x), network(x), atol=1e-6)


def test_a_shared_output_projection_is_still_shared():
    network = Holder()
    network.other.out_proj.weight = network.first.out_proj.weight
    found = replace_attention(network, torch.randn(2, 5, 8))
    assert len(found.replaced) == 2 and found.network.other.proj.weight is found.network.first.proj.weight


def test_state_of_a_module_is_kept():
    network = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": nn.MultiheadAttention(8, 2, kdim=6, vdim=4)})
    network["a"].requires_grad_(False).double()
    network["a"].in_proj_bias.requires_grad_(True)
    network["b"].eval().bfloat16()
    state = torch.get_rng_state()
    new = replace_attention(network, NOTHING).network
    assert torch.equal(torch.get_rng_state(), state), "random numbers were drawn"
    a, b = new["a"], new["b"]
    assert [name for name, parameter in a.named_parameters() if parameter.requires_grad] == [
        "q.bias",
        "k.bias",
        "v.bias",
    ]
    assert {parameter.dtype for parameter in a.parameters()} == {torch.float64}
    assert all(part.training for part in a.modules()) and not any(part.training for part in b.modules())
    assert all(parameter.requires_grad for parameter in b.parameters())
    assert {parameter.dtype for parameter in b.parameters()} == {torch.bfloat16}
    assert (b.k.in_features, b.v.in_features, b.q.out_features) == (6, 4, 8)
    # on the meta device, where nothing can be computed, shapes are enough
    meta = replace_attention(network.to("meta"), NOTHING).network
    assert {parameter.device.type for parameter in meta.parameters()} == {"meta"}


class Overriding(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class Renamed(nn.MultiheadAttention):
    """A subclass that computes what its base computes."""


class OtherBias(swin_transformer.ShiftedWindowAttention):
    def get_relative_position_bias(self) -> Tensor:
        return 2 * super().get_relative_position_bias()


def patched() -> nn.Module:
    module = nn.MultiheadAttention(8, 2)
    module.forward = lambda query, key, value: (query, None)  # pyright: ignore
    return module


def window(kind: type[nn.Module] = swin_transformer.ShiftedWindowAttention) -> nn.Module:
    return kind(8, [2, 2], [0, 0], 2)


def hooked() -> nn.Module:
    module = nn.MultiheadAttention(8, 2)
    module.out_proj.register_forward_hook(lambda *_: None)
    return module


def pruned() -> nn.Module:
    module = window().requires_grad_(False)  # a weight computed with gradients cannot be copied
    prune.random_unstructured(module.qkv, "weight", 0.5)
    return module


def computed() -> nn.Module:
    module = nn.MultiheadAttention(8, 2)
    parametrizations.orthogonal(module, "in_proj_weight")
    return module


def wrapped() -> nn.Module:
    module = window()
    module.proj = nn.Sequential(module.proj)  # pyright: ignore
    return module


REASONS = [
    (lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True), "add_bias_kv appends a learned key"),
    (lambda: nn.MultiheadAttention(8, 2, add_zero_attn=True), "add_zero_attn appends"),
    (lambda: Overriding(8, 2), r"Overriding has a forward\(\) of its own, not that of torch.nn.MultiheadAttention"),
    (patched, r"MultiheadAttention has a forward\(\) of its own"),
    (lambda: window(OtherBias), r"OtherBias has a get_relative_position_bias\(\) of its own"),
    (hooked, "its out_proj has hooks"),
    (pruned, "its qkv has hooks"),
    (computed, "it has a computed weight"),
    (wrapped, "its proj is a Sequential, not a plain linear layer"),
]


@pytest.mark.parametrize(("make", "reason"), REASONS)
def test_what_cannot_be_replaced_is_left_with_the_reason(make: Callable[[], nn.Module], reason: str):
    network = nn.ModuleDict({"bad": make(), "good": nn.MultiheadAttention(8, 2)})
    found = replace_attention(network, NOTHING)
    assert found.replaced == {"good": MULTIHEAD} and type(found.network["bad"]) is type(network["bad"])
    assert list(found.left) == ["bad"] and found.left == replace_attention(found.network, NOTHING).left
    assert re.search(reason, found.left["bad"])


def test_a_packed_projection_in_two_places_is_left():
    network = Holder()
    network.other.in_proj_weight = network.first.in_proj_weight
    left = replace_attention(network, NOTHING).left
    assert set(left) == {"first", "other"} and "its in_proj_weight is used elsewhere" in left["other"]
    network = nn.ModuleDict({"a": window(), "b": window()})
    network["b"].qkv = network["a"].qkv
    found = replace_attention(network, NOTHING)
    assert "its qkv is used elsewhere" in found.left["a"] and found.replaced == {}


def test_a_subclass_that_changes_nothing_is_replaced():
    assert replace_attention(nn.ModuleDict({"a": Renamed(8, 2)}), NOTHING).replaced == {"a": MULTIHEAD}


def test_replay_that_does_not_fit_says_so():
    network = nn.ModuleDict({"a": nn.MultiheadAttention(8, 2), "b": nn.MultiheadAttention(8, 2, add_bias_kv=True)})
    assert isinstance(apply_replacements(network, {"a": MULTIHEAD})["a"], MultiheadAttention)
    assert apply_replacements(network, {}) is network
    with pytest.raises(ModelError, match="^c: expected attention to replace by 'heads:torch.nn.Mul.*there is none"):
        apply_replacements(network, {"c": MULTIHEAD})
    with pytest.raises(ModelError, match="^a: got torch.nn.MultiheadAttention; expected what 'heads:some' replaces"):
        apply_replacements(network, {"a": "heads:some"})
    with pytest.raises(ModelError, match="^b: cannot be replaced by 'heads:torch.*: add_bias_kv"):
        apply_replacements(network, {"a": MULTIHEAD, "b": MULTIHEAD})
    with pytest.raises(ModelError, match="^the network: expected attention"):
        apply_replacements(nn.Linear(1, 1), {"": MULTIHEAD})


def test_a_subclass_is_known_before_its_base():
    types = [known.type for known in KNOWN]
    for i, kind in enumerate(types):
        assert kind is None or not any(earlier is not None and issubclass(kind, earlier) for earlier in types[:i])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # which the original uses
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("padding", [False, True])
def test_transformer_encoder_still_works(training: bool, padding: bool):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    network = randomise(nn.TransformerEncoder(layer, 2)).train(training)
    x = torch.randn(3, 5, 8)
    found = replace_attention(network, x)
    new = found.network
    assert found.replaced == {"layers.0.self_attn": MULTIHEAD, "layers.1.self_attn": MULTIHEAD}
    hidden = torch.arange(5) >= torch.tensor([[5], [3], [4]]) if padding else None
    with torch.no_grad():
        expected, got = (net(x, src_key_padding_mask=hidden) for net in (network, new))
    seen = slice(None) if hidden is None else ~hidden
    assert (got[seen] - expected[seen]).abs().max() <= SAME_FLOAT32 * expected.abs().max()
    assert network.use_nested_tensor, "the network given was changed"


def test_a_new_transformer_encoder_takes_a_replaced_layer():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    new = replace_attention(layer, NOTHING).network
    with pytest.warns(UserWarning, match="use_nested_tensor is False"):
        encoder = nn.TransformerEncoder(new, 2).eval()
    x = torch.randn(3, 5, 8)
    assert torch.allclose(encoder(x), nn.TransformerEncoder(layer, 2).eval()(x), atol=1e-6)


def test_transformer_decoder_still_works():
    network = randomise(nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0), 2)).eval()
    found = replace_attention(network, NOTHING)
    new = found.network
    assert len(found.replaced) == 4
    target, memory = torch.randn(4, 3, 8), torch.randn(6, 3, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    with torch.no_grad():
        expected, got = (net(target, memory, tgt_mask=mask) for net in (network, new))
    assert (got - expected).abs().max() <= SAME_FLOAT32 * expected.abs().max()
