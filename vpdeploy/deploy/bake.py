"""Fold resize, prompt, normalisation and label map into one module that takes what the caller has."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Literal, cast

import torch
from torch import Tensor, nn

from vpdeploy.data.resize import resize
from vpdeploy.models.classifier import take_rows
from vpdeploy.models.tokens.fold import fold
from vpdeploy.models.tokens.prompt import put_tokens, split_prompt
from vpdeploy.prompts.canvas import Canvas
from vpdeploy.prompts.pixels import build_prompt
from vpdeploy.recipe.tables import PixelsTable, Recipe
from vpdeploy.values import Fold, Tuned

Form = Literal["uint8", "float"]
FORMS: tuple[Form, ...] = ("uint8", "float")


class ConstantPrompt(nn.Module):
    """A learned prompt as one constant on its canvas, so that the exported graph holds a single addition."""

    canvas: Tensor

    def __init__(self, canvas: Tensor):
        super().__init__()
        self.register_buffer("canvas", canvas)

    def forward(self) -> Tensor:
        """[3, C, C]."""
        return self.canvas


class Resize(nn.Module):
    """The deployed resize: uint8 [n, h, w, 3], any h and w -> float32 [n, 3, image_size, image_size] in [0, 1]."""

    def __init__(self, image_size: int, how: str):
        super().__init__()
        self.image_size = image_size
        self.how = how

    def forward(self, image: Tensor) -> Tensor:
        return resize(image, self.image_size, how=self.how)


class Deployable(nn.Module):
    """What ships: image -> logits float32 [n, k].

    image, form "uint8": uint8 [n, h, w, 3], any h and w, 0 to 255; form "float": float32 [n, 3, image_size, image_size]
    in [0, 1], already resized (for callers that resize by themselves). ``folds``: what was done to ``backbone``.
    """

    def __init__(
        self,
        backbone: nn.Module,
        canvas: Canvas,
        *,
        form: Form,
        image_size: int,
        resize_how: str,
        folds: tuple[Fold, ...] = (),
    ):
        super().__init__()
        self.backbone = backbone
        self.canvas = canvas
        self.form = form
        self.folds = folds
        self.resize = Resize(image_size, resize_how)

    def forward(self, image: Tensor) -> Tensor:
        x = self.resize(image) if self.form == "uint8" else image
        return cast(Tensor, self.backbone(self.canvas(x)))  # [n, 3, s, s] -> [n, 3, C, C] -> [n, k]


def bake(tuned: Tuned, *, recipe: Recipe, classifier: str, form: str, folded: bool = True) -> Deployable:
    """One arm as a module that needs no preprocessing, on the CPU, in float32 and evaluation mode.

    Everything in it is a copy: ``tuned`` is not changed and shares no memory with it. ``classifier`` names the layer whose rows
    a label map selects. Without pixels nothing is added to the canvas. ``folded``: in its cheapest form, tokens as what they
    amount to; otherwise as it was trained.
    """
    if form not in FORMS:
        raise ValueError(f"form: got {form!r}; expected one of {', '.join(FORMS)}")
    backbone = copy.deepcopy(tuned.backbone)
    if tuned.label_map is not None:
        backbone = take_rows(backbone, classifier, tuned.label_map)
    pixels, tokens = split_prompt(tuned.prompt)
    put_tokens(backbone, tokens, recipe.prompt.tokens)
    folds = fold(backbone, canvas_size=recipe.input.canvas) if folded else ()
    prompt = _constant_prompt(pixels, recipe.prompt.pixels, canvas_size=recipe.input.canvas, seed=recipe.seed)
    canvas = Canvas(
        recipe.input.image_size, recipe.input.canvas, mean=recipe.input.mean, std=recipe.input.std, prompt=prompt
    )
    deployable = Deployable(
        backbone, canvas, form=form, image_size=recipe.input.image_size, resize_how=recipe.input.resize, folds=folds
    )
    # Training may have left channels_last weights behind; the file holds them in one order only.
    deployable = deployable.to("cpu", torch.float32).to(memory_format=torch.contiguous_format)
    return deployable.eval().requires_grad_(False)


def _constant_prompt(
    state: Mapping[str, Tensor], pixels: PixelsTable, *, canvas_size: int, seed: int
) -> ConstantPrompt | None:
    """The prompt of ``state`` at the one place where evaluation sees it; None for an arm that ships none."""
    if not state:
        return None
    prompt = build_prompt(pixels.kind, canvas_size=canvas_size, size=pixels.size, seed=seed)
    assert prompt is not None, "a prompt was learned, so the recipe names its kind"
    prompt.load_state_dict(dict(state))
    with torch.no_grad():
        return ConstantPrompt(prompt.eval()().detach().clone())
