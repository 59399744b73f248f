"""The network that trains: canvas and prompt in float32, the backbone under autocast, logits in float32."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn

from vpdeploy.data.prepared import Images, batches
from vpdeploy.data.resize import PIXEL_SCALE
from vpdeploy.models.tokens.prompt import PREFIX as TOKENS
from vpdeploy.models.tokens.prompt import (
    new_projection,
    new_tokens,
    put_tokens,
    split_prompt,
    token_parameters,
    token_projection,
    token_rows,
)
from vpdeploy.models.tokens.prototypes import prototypes
from vpdeploy.prompts.canvas import Canvas
from vpdeploy.prompts.pixels import RandomPrompt, build_prompt
from vpdeploy.recipe.tables import Recipe
from vpdeploy.surgery.gates import Gated
from vpdeploy.surgery.masked_weights import MaskedWeights
from vpdeploy.training.streams import derive, stream

PROTOTYPED = 64  # images that tokens begin as prototypes of


@dataclass(frozen=True)
class TrainingData:
    """What training may see: never the test split. A class may have no image in a small or limited ``train``."""

    train: Images
    val: Images
    classes: int


@dataclass(frozen=True)
class Compute:
    """Where and how a backbone trains."""

    device: torch.device
    bf16: bool
    channels_last: bool


class Prompted(nn.Module):
    """images: float32 [n, 3, s, s] in [0, 1] -> logits float32 [n, k].

    ``backbone`` takes the canvas, and whatever else the call hands on (gate values).
    """

    def __init__(
        self, canvas: Canvas, backbone: nn.Module, compute: Compute, *, label_map: Sequence[int] | None = None
    ):
        super().__init__()
        self.canvas = canvas
        self.backbone = backbone
        self.compute = compute
        self.register_buffer("label_map", None, persistent=False)
        self.map_labels(label_map)
        self.to(compute.device)
        if compute.channels_last:
            self.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def map_labels(self, label_map: Sequence[int] | None) -> None:
        self.label_map = None if label_map is None else torch.tensor(label_map, device=self.compute.device)

    def forward(self, images: Tensor, *values: Tensor, prompted: bool = True, fast: bool = False) -> Tensor:
        """fast: in the precision of training, whatever the mode."""
        source = self.source_logits(images, *values, prompted=prompted, fast=fast)
        return source if self.label_map is None else source[:, self.label_map]

    def source_logits(self, images: Tensor, *values: Tensor, prompted: bool = True, fast: bool = False) -> Tensor:
        """Before the label map: [n, source classes]."""
        x = self.canvas.normalise(self.canvas.place(images, prompted=prompted))
        if self.compute.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        fast = self.compute.bf16 and (self.training or fast)  # evaluation is float32
        with torch.autocast(self.compute.device.type, dtype=torch.bfloat16, enabled=fast):
            out = self.backbone(x, *values)
        return out.float()


def build_canvas(recipe: Recipe, *, prompted: bool) -> Canvas:
    """The recipe's canvas, its prompt at zero or absent."""
    table, pixels = recipe.input, recipe.prompt.pixels
    kind = pixels.kind if prompted else "none"
    seed = derive(recipe.seed, "prompt") % 2**31
    prompt = build_prompt(kind, canvas_size=table.canvas, size=pixels.size, seed=seed)
    return Canvas(table.image_size, table.canvas, mean=table.mean, std=table.std, prompt=prompt)


def add_prompt(
    backbone: nn.Module,
    recipe: Recipe,
    data: TrainingData,
    *,
    stage: Literal["search", "tune"] | None,
    state: Mapping[str, Tensor] = MappingProxyType({}),
) -> Canvas:
    """The prompt that learns in ``stage``, as ``state`` has it, or where it begins: the canvas with its pixels, and its tokens
    put into ``backbone``, which is changed. Without a stage there is none. data: whose images prototypes are of.
    """
    pixels, tokens = split_prompt(state)
    canvas = build_canvas(recipe, prompted=stage is not None and recipe.prompt.pixels.learned_in(stage))
    if pixels and canvas.prompt is not None:
        canvas.prompt.load_state_dict(pixels)
    table = recipe.prompt.tokens
    if stage is not None and table.learned_in(stage):
        if tokens:
            put_tokens(backbone, tokens, table)
        else:
            drawn = stream(recipe.seed, "prompt", 0, "projection")
            projection = new_projection(backbone, table, generator=drawn)
            put_tokens(backbone, _first_tokens(backbone, recipe, data), table, projection=projection)
    return canvas


def _first_tokens(backbone: nn.Module, recipe: Recipe, data: TrainingData) -> dict[str, Tensor]:
    table, drawn = recipe.prompt.tokens, stream(recipe.seed, "prompt", 0, "tokens")
    if table.init == "uniform":
        return new_tokens(backbone, table, generator=drawn)
    order = torch.randperm(len(data.train), generator=drawn)[:PROTOTYPED]
    canvas, device = build_canvas(recipe, prompted=False), next(backbone.parameters()).device
    images = torch.cat([pixels for pixels, _ in batches(data.train, order, PROTOTYPED)])
    shown = canvas.to(device).normalise(canvas.place(to_pixels(images, device), prompted=False))
    return prototypes(backbone, shown, table, generator=drawn)


def prompt_state(network: Prompted) -> dict[str, Tensor]:
    """What was learned beside weights, as ``split_prompt`` takes it; empty without a prompt. A projection is folded into it."""
    pixels = {} if network.canvas.prompt is None else network.canvas.prompt.state_dict()
    masked = network.backbone
    backbone = masked.backbone if isinstance(masked, Gated | MaskedWeights) else masked
    tokens = {TOKENS + name: rows for name, rows in token_rows(backbone).items()}
    return {name: tensor.detach().cpu().clone() for name, tensor in {**pixels, **tokens}.items()}


def prompt_parameters(network: Prompted) -> list[nn.Parameter]:
    """Empty without a prompt."""
    pixels = [] if network.canvas.prompt is None else list(network.canvas.prompt.parameters())
    return [*pixels, *token_parameters(network.backbone).values(), *token_projection(network.backbone)]


def show(recipe: Recipe, images: Images, *, prompt: Mapping[str, Tensor], count: int) -> Tensor:
    """The first ``count`` images as the backbone sees them, with a prompt's state (empty for none): [n, 3, C, C], float32."""
    pixels, _ = split_prompt(prompt)
    canvas = build_canvas(recipe, prompted=bool(pixels)).eval()
    if canvas.prompt is not None:
        canvas.prompt.load_state_dict(pixels)
    order = torch.arange(min(count, len(images)))
    pixels = torch.cat([batch for batch, _ in batches(images, order, count)])
    with torch.no_grad():
        return canvas(to_pixels(pixels, torch.device("cpu")))


def restart_prompt(canvas: Canvas, *, seed: int, stage: str, epoch: int) -> None:
    """Let a moving prompt draw the places that belong to this epoch, whether or not the run was resumed."""
    if isinstance(canvas.prompt, RandomPrompt):
        canvas.prompt.stream = stream(seed, stage, epoch, "prompt")


def to_pixels(images: Tensor, device: torch.device) -> Tensor:
    """uint8 [n, 3, s, s] -> float32 in [0, 1] on ``device``."""
    return images.to(device, non_blocking=True).to(torch.float32).mul_(PIXEL_SCALE)


def set_learning_rates(optimizer: torch.optim.Optimizer, *, peaks: Iterable[float], done: float) -> None:
    """Cosine decay from each parameter group's peak to 0; ``done`` is the share of all steps taken."""
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["lr"] = peak * 0.5 * (1 + math.cos(math.pi * done))
