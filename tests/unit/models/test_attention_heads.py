"""Every kind of replacement: equal to its original, and still right when heads are taken out of it."""

from __future__ import annotations

import copy
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torchvision.models import maxvit, swin_transformer

from vpdeploy.models.attention.replace import replace_attention

SAME_FLOAT32 = 1e-5  # the same sums in another order
SAME_FLOAT64 = 1e-12
ONNX_FLOAT32 = 1e-4  # another library's exponential too


@dataclass(frozen=True)
class Kind:
    """How a module of this kind is made, and what shape it takes. ``options`` are those of its dropouts and biases."""

    make: Callable[..., nn.Module]
    shape: tuple[int, ...]
    heads: int
    dropout: dict[str, float]
    plain: dict[str, bool]
    call: Callable[[nn.Module, Tensor], Tensor] = lambda module, x: module(x)


def swin(kind: type[nn.Module], window: list[int], shift: list[int]) -> Callable[..., nn.Module]:
    return lambda **options: kind(dim=24, window_size=window, shift_size=shift, num_heads=3, **options)


def multihead(**options: Any) -> nn.Module:
    return nn.MultiheadAttention(24, 4, batch_first=True, **options)


V1, V2 = swin_transformer.ShiftedWindowAttention, swin_transformer.ShiftedWindowAttentionV2
DROPOUT = {"attention_dropout": 0.4, "dropout": 0.3}
PLAIN = {"qkv_bias": False, "proj_bias": False}

KINDS = {
    "multihead": Kind(
        multihead,
        (2, 7, 24),
        4,
        {"dropout": 0.4},
        {"bias": False},
        lambda module, x: module(x, x, x, need_weights=False)[0],
    ),
    # 19 x 22 fits no window: 21 x 24 with windows of 3 x 4
    "swin": Kind(swin(V1, [3, 4], [0, 0]), (2, 19, 22, 24), 3, DROPOUT, PLAIN),
    "swin shifted": Kind(swin(V1, [3, 4], [1, 2]), (2, 19, 22, 24), 3, DROPOUT, PLAIN),
    "swin one axis shifted": Kind(swin(V1, [4, 8], [2, 4]), (2, 11, 7, 24), 3, DROPOUT, PLAIN),
    "swin one window": Kind(swin(V1, [8, 8], [4, 4]), (2, 5, 7, 24), 3, DROPOUT, PLAIN),
    "swin v2": Kind(swin(V2, [3, 4], [0, 0]), (2, 19, 22, 24), 3, DROPOUT, PLAIN),
    "swin v2 shifted": Kind(swin(V2, [3, 4], [1, 2]), (2, 19, 22, 24), 3, DROPOUT, PLAIN),
    "maxvit": Kind(lambda: maxvit.RelativePositionalMultiHeadAttention(24, 8, 9), (2, 4, 9, 24), 3, {}, {}),
}


def timm(module: str, name: str, **fixed: Any) -> Callable[..., nn.Module]:
    def make(**options: Any) -> nn.Module:
        pytest.importorskip("timm")
        fixed_now = {
            key: value() if callable(value) and key == "rel_pos_cls" else value for key, value in fixed.items()
        }
        return getattr(importlib.import_module(module), name)(**{**fixed_now, **options})

    return make


def rel_pos(name: str, **options: Any) -> Callable[[], Any]:
    """timm's relative position classes are made by attention itself, which tells them its heads."""
    return lambda: partial(
        getattr(importlib.import_module("timm.layers.pos_embed_rel"), name), window_size=(2, 3), **options
    )


TIMM_DROPOUT = {"attn_drop": 0.4, "proj_drop": 0.3}
ROPE = torch.randn(6, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SEEN = torch.rand(7, 7, generator=torch.Generator().manual_seed(0)) > 0.4
WINDOW_MASK = torch.where(torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(0)) > 0.5, -100.0, 0.0)


def with_rope(module: nn.Module, x: Tensor) -> Tensor:
    return module(x, rope=ROPE.to(x.dtype))


def with_window_mask(module: nn.Module, x: Tensor) -> Tensor:
    return module(x, mask=WINDOW_MASK.to(x.dtype))


TOKENS, WINDOWS = (2, 7, 24), (6, 12, 24)
ATTENTION = {"dim": 24, "num_heads": 3, "qkv_bias": True}
NORMS = {"qk_norm": True, "norm_layer": nn.LayerNorm, "gated": True}
LAYERS, EVA = "timm.layers.attention", "timm.models.eva"
NO_BIAS = {"qkv_bias": False}
UNBIASED = {**NO_BIAS, "proj_bias": False}
SWIN = {"dim": 24, "num_heads": 3, "window_size": (3, 4)}

KINDS |= {
    "timm": Kind(timm(LAYERS, "Attention", **ATTENTION), TOKENS, 3, TIMM_DROPOUT, UNBIASED),
    "timm normed and gated": Kind(timm(LAYERS, "Attention", **ATTENTION, **NORMS), TOKENS, 3, TIMM_DROPOUT, UNBIASED),
    "timm masked": Kind(
        timm(LAYERS, "Attention", **ATTENTION, attn_head_dim=4, dim_out=10),
        TOKENS,
        3,
        TIMM_DROPOUT,
        UNBIASED,
        lambda module, x: module(x, SEEN | torch.eye(7, dtype=torch.bool)),
    ),
    "timm causal": Kind(
        timm(LAYERS, "Attention", **ATTENTION),
        TOKENS,
        3,
        TIMM_DROPOUT,
        UNBIASED,
        lambda module, x: module(x, is_causal=True),
    ),
    "timm rope": Kind(
        timm(LAYERS, "AttentionRope", **ATTENTION, **NORMS), TOKENS, 3, TIMM_DROPOUT, UNBIASED, with_rope
    ),
    "timm rope by halves": Kind(
        timm(LAYERS, "AttentionRope", **ATTENTION, qkv_fused=False, rotate_half=True),
        TOKENS,
        3,
        TIMM_DROPOUT,
        UNBIASED,
        with_rope,
    ),
    "timm eva": Kind(
        timm(EVA, "EvaAttention", **ATTENTION, scale_norm=False), TOKENS, 3, TIMM_DROPOUT, NO_BIAS, with_rope
    ),
    "timm eva separate": Kind(
        timm(EVA, "EvaAttention", **ATTENTION, scale_norm=False, qkv_fused=False), TOKENS, 3, TIMM_DROPOUT, NO_BIAS
    ),
    "timm swin": Kind(
        timm("timm.models.swin_transformer", "WindowAttention", **SWIN), WINDOWS, 3, TIMM_DROPOUT, NO_BIAS
    ),
    "timm swin masked": Kind(
        timm("timm.models.swin_transformer", "WindowAttention", **SWIN, head_dim=4),
        WINDOWS,
        3,
        TIMM_DROPOUT,
        NO_BIAS,
        with_window_mask,
    ),
    "timm swin v2": Kind(
        timm("timm.models.swin_transformer_v2", "WindowAttention", **SWIN), WINDOWS, 3, TIMM_DROPOUT, NO_BIAS
    ),
    "timm swin v2 masked": Kind(
        timm("timm.models.swin_transformer_v2", "WindowAttention", **SWIN, qkv_bias_separate=True),
        WINDOWS,
        3,
        TIMM_DROPOUT,
        NO_BIAS,
        with_window_mask,
    ),
} | {
    f"timm maxxvit {name} {head_first} {bias}": Kind(
        timm(
            "timm.models.maxxvit",
            name,
            dim=24,
            dim_out=32,
            dim_head=8,
            expand_first=False,
            head_first=head_first,
            rel_pos_cls=rel_pos(bias, **options),
        ),
        (2, 24, 2, 3) if name == "Attention2d" else (2, 2, 3, 24),
        3,
        TIMM_DROPOUT,
        {"bias": False},
    )
    for name, head_first, bias, options in (
        ("Attention2d", True, "RelPosBias", {}),
        ("Attention2d", False, "RelPosMlp", {"mode": "cr"}),
        ("AttentionCl", False, "RelPosBiasTf", {}),
        ("AttentionCl", True, "RelPosMlp", {"mode": "swin"}),
    )
}
EACH = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Weights, biases and tables far from zero: attention that differs from token to token and from head to head."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if name.endswith("logit_scale"):
            drawn = drawn + math.log(30)  # on both sides of log(100), where it is clamped
        elif parameter.dim() > 1 and "table" not in name:
            drawn = drawn * (2 / parameter[0].numel() ** 0.5)
        parameter.data.copy_(drawn)
    return module


def made(kind: Kind, **options: Any) -> nn.Module:
    return randomise(kind.make(**options)).eval()


def replaced(module: nn.Module) -> nn.Module:
    found = replace_attention(module, torch.zeros(1))  # of which there is nothing around it to see
    assert list(found.replaced) == [""] and not found.left
    return found.network


def image(kind: Kind, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(kind.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape and a.dtype == b.dtype
    return ((a - b).abs().max() / b.abs().max()).item()


def compare(kind: Kind, old: nn.Module, new: nn.Module, dtype: torch.dtype = torch.float32) -> float:
    x = image(kind, dtype)
    with torch.no_grad():
        return difference(kind.call(new, x), kind.call(old, x))


@EACH
def test_equal_in_float32_and_float64(kind: Kind):
    old = made(kind)
    assert compare(kind, old, replaced(old)) <= SAME_FLOAT32
    old = old.double()
    assert compare(kind, old, replaced(old), torch.float64) <= SAME_FLOAT64


@EACH
@pytest.mark.parametrize("autocast", [False, True])
def test_as_exact_as_the_original_in_bfloat16(kind: Kind, autocast: bool):
    old = made(kind).bfloat16()  # weights that every dtype holds
    x = image(kind, torch.bfloat16)
    exact = kind.call(copy.deepcopy(old).double(), x.double())
    if autocast:
        old, x = old.float(), x.float()
    new = replaced(old)
    assert {p.dtype for p in new.parameters()} == {x.dtype}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), torch.no_grad():
        errors = [difference(kind.call(module, x).double(), exact) for module in (new, old)]
    assert errors[0] <= 2 * errors[1], errors


@EACH
def test_equal_without_biases(kind: Kind):
    if not kind.plain:
        pytest.skip("this kind always has biases")
    old = made(kind, **kind.plain).double()
    assert compare(kind, old, replaced(old), torch.float64) <= SAME_FLOAT64


@EACH
def test_equal_gradients_in_training_mode(kind: Kind):
    old = made(kind).double().train()
    new = replaced(old)
    assert new.training
    grads = []
    for module in (old, new):
        x = image(kind, torch.float64).requires_grad_()
        torch.manual_seed(0)  # a bias by timm's small network has a dropout of its own
        out = kind.call(module, x)
        (out * torch.arange(out.numel(), dtype=out.dtype).view_as(out).cos()).sum().backward()
        assert x.grad is not None
        # every parameter learns; those of a bias that attention cannot see (k's) get rounding errors only
        assert all(parameter.grad is not None for parameter in module.parameters())
        total = sum(parameter.grad.square().sum() for parameter in module.parameters() if parameter.grad is not None)
        grads.append((x.grad, torch.as_tensor(total)))
    assert difference(grads[1][0], grads[0][0]) <= SAME_FLOAT64 * 10
    assert difference(grads[1][1], grads[0][1]) <= SAME_FLOAT64 * 10


@EACH
def test_dropout_is_for_training(kind: Kind):
    if not kind.dropout:
        pytest.skip("this kind has no dropout")
    for name in kind.dropout:
        old = made(kind, **{name: kind.dropout[name]}).double()
        new = replaced(old)
        assert compare(kind, old, new, torch.float64) <= SAME_FLOAT64
        x = image(kind, torch.float64)
        torch.manual_seed(0)
        outs = torch.stack([kind.call(new.train(), x) for _ in range(100)])
        expected = kind.call(old, x)
        assert outs.std(0).mean() > 0.05 * expected.std(), "nothing was dropped"
        # dropout is unbiased up to here: both kinds of it act on what the output is linear in
        assert (outs.mean(0) - expected).abs().mean() < 0.25 * outs.std(0).mean()


def core(module: nn.Module) -> Any:
    """The part that holds q, k, v and proj."""
    return next(part for part in module.modules() if "q" in part._modules)


def cut_heads(module: nn.Module, kept: list[int], heads: int) -> nn.Module:
    """``module`` with only the heads ``kept``, by slicing parameters and nothing else."""
    new = copy.deepcopy(module)
    part = core(new)

    def take(parameter: nn.Parameter, axis: int) -> nn.Parameter:
        by_head = parameter.data.unflatten(axis, (heads, -1)).index_select(axis, torch.tensor(kept))
        return nn.Parameter(by_head.flatten(axis, axis + 1))

    for name in ("q", "k", "v", "gate"):
        if part._modules.get(name) is not None:
            layer = part._modules[name]
            layer.weight = take(layer.weight, 0)
            layer.bias = None if layer.bias is None else take(layer.bias, 0)
    part.proj.weight = take(part.proj.weight, 1)
    if part._parameters.get("logit_scale") is not None:
        part.logit_scale = take(part.logit_scale, 0)
    bias = part._modules.get("position_bias")
    if bias is not None and "table" in bias._parameters:
        bias.table = take(bias.table, 1)
    elif bias is not None:
        last = [layer for layer in bias.mlp.modules() if isinstance(layer, nn.Linear)][-1]
        last.weight = take(last.weight, 0)
        last.bias = None if last.bias is None else take(last.bias, 0)
    return new


def mask_heads(module: nn.Module, kept: list[int], heads: int) -> nn.Module:
    """``module`` whose other heads are zeros where proj reads them."""
    new = copy.deepcopy(module)
    gate = torch.zeros(heads, dtype=torch.float64).index_fill(0, torch.tensor(kept), 1.0)

    def apply(layer: nn.Module, inputs: tuple[Tensor]) -> Tensor:
        (x,) = inputs
        channels = 1 if isinstance(layer, nn.Conv2d) else x.dim() - 1
        shape = [1] * x.dim()
        shape[channels] = -1
        return x * gate.repeat_interleave(x.shape[channels] // heads).view(shape)

    core(new).proj.register_forward_pre_hook(apply)
    return new


@EACH
def test_heads_cut_out_are_heads_masked(kind: Kind):
    new = replaced(made(kind).double())
    kept = [1, *range(3, kind.heads)]  # two of the heads removed
    cut = cut_heads(new, kept, kind.heads)
    assert sum(p.numel() for p in cut.parameters()) < sum(p.numel() for p in new.parameters())
    assert compare(kind, mask_heads(new, kept, kind.heads), cut, torch.float64) <= SAME_FLOAT64
    wrong = [2, *range(3, kind.heads)]
    assert compare(kind, mask_heads(new, wrong, kind.heads), cut, torch.float64) > 1e-3


ONNX_KINDS = (
    "multihead",
    "swin shifted",
    "swin v2 shifted",
    "maxvit",
    "timm normed and gated",
    "timm rope",
    "timm swin v2 masked",
    "timm maxxvit Attention2d True RelPosBias",
)


class Called(nn.Module):
    def __init__(self, kind: Kind, module: nn.Module):
        super().__init__()
        self.kind, self.module = kind, module

    def forward(self, x: Tensor) -> Tensor:
        return self.kind.call(self.module, x)


@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize("name", ONNX_KINDS)
def test_exported_with_any_batch_size_after_heads_were_cut(name: str, tmp_path):
    kind = KINDS[name]
    new = replaced(made(kind))
    module = Called(kind, cut_heads(new, [1, 2], kind.heads)).eval()
    path = tmp_path / "attention.onnx"
    torch.onnx.export(
        module,
        (image(kind),),
        path,
        dynamo=True,
        opset_version=18,
        dynamic_shapes={"x": {0: torch.export.Dim("n")}},
        external_data=False,
        verbose=False,
    )
    x = torch.cat([image(kind, seed=2), image(kind, seed=3), image(kind, seed=4)])
    session = onnxruntime.InferenceSession(path)
    got = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    with torch.no_grad():
        assert difference(torch.from_numpy(np.asarray(got)), module(x)) <= ONNX_FLOAT32
