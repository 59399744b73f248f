"""The page on Python: its code runs from top to bottom, it names every public function, and it quotes what is really said."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

import vpdeploy
from vpdeploy.errors import VpdeployError

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "python.md").read_text(encoding="utf-8")
EXAMPLE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_every_block_runs_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 9
    space: dict[str, object] = {}
    with torch.random.fork_rng():
        for number, block in enumerate(blocks):
            exec(compile(block, f"docs/python.md, block {number}", "exec"), space)
    said = capsys.readouterr().out
    assert "the best reachable is 0." in said and "fc 10 excluded" in said
    assert {"plan.json", "small.pt", "small.onnx"} <= {file.name for file in tmp_path.iterdir()}


def test_every_public_name_is_on_the_page():
    assert [name for name in vpdeploy.__all__ if not re.search(rf"\b{name}\b", PAGE)] == []


class Piece(nn.Module):
    """``function(self, x)`` as a forward."""

    def __init__(self, function, **layers: nn.Module):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Around(nn.Module):
    """A convolution, ``piece``, a convolution that can always be pruned, and a head."""

    def __init__(self, piece: nn.Module, out: int = 16):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.piece, self.last, self.head = piece, nn.Conv2d(out, 8, 3, padding=1), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.piece(F.relu(self.norm(self.stem(x))))
        return self.head(F.relu(self.last(x)).mean((2, 3)))


def conv(inputs: int = 16, outputs: int = 16, **options: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, **options)  # type: ignore[arg-type]


def tied() -> nn.Module:
    first, second = conv(), conv()
    second.weight = first.weight
    return nn.Sequential(first, nn.ReLU(), second)


EXACT = {
    "concatenation": lambda: Around(Piece(lambda m, x: torch.cat([m.a(x), m.b(x)], 1), a=conv(16, 8), b=conv(16, 8))),
    "chunk": lambda: Around(Piece(lambda m, x: torch.cat(x.chunk(2, 1)[::-1], 1))),
    "grouped": lambda: Around(conv(groups=4)),
    "multiplier": lambda: Around(conv(16, 32, groups=16), 32),
    "shuffle": lambda: Around(nn.ChannelShuffle(4)),
    "glu": lambda: Around(Piece(lambda m, x: F.glu(x, 1)), 8),
    "pixel_shuffle": lambda: Around(nn.PixelShuffle(2), 4),
    "sigmoid": lambda: Around(nn.Sigmoid()),
    "hard-swish": lambda: Around(nn.Hardswish()),
    "squeeze-excite": lambda: Around(
        Piece(lambda m, x: x * m.up(m.down(x.mean((2, 3), True)).relu()).sigmoid(), down=conv(16, 8), up=conv(8, 16))
    ),
}
EXCLUDED = {
    "pad": lambda: Around(Piece(lambda m, x: F.pad(x, (0, 0, 0, 0, 4, 4)) + m.a(x), a=conv(16, 24)), 24),
    "roll": lambda: Around(Piece(lambda m, x: x.roll(2, 1))),
    "flip": lambda: Around(Piece(lambda m, x: x.flip(1))),
    "softmax": lambda: Around(nn.Softmax(1)),
    "amax": lambda: Around(Piece(lambda m, x: x * x.amax(1, keepdim=True))),
    "LocalResponseNorm": lambda: Around(nn.LocalResponseNorm(3)),
    "GroupNorm": lambda: Around(nn.GroupNorm(4, 16)),
    "tied": lambda: Around(tied()),
    "weight_norm": lambda: Around(weight_norm(conv())),
}


@pytest.mark.parametrize("name", EXACT)
def test_what_the_page_calls_exact_is(name):
    groups = vpdeploy.find_groups(EXACT[name](), EXAMPLE).groups
    assert [group.root for group in groups if group.status == "excluded"] == ["head"], groups


def quoted() -> list[str]:
    """The sentences of the table of hard cases."""
    table = PAGE.split("## Hard cases")[1]
    return [s for s in re.findall(r": `([^`]+)`", table) if " " in s]


def said_by(network: nn.Module) -> str:
    try:
        return "\n".join(group.reason for group in vpdeploy.find_groups(network, EXAMPLE).groups)
    except VpdeployError as e:
        return str(e)


def test_every_sentence_on_the_page_is_said():
    class Two(Around):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x + y)

    class Answers(Around):
        def forward(self, x: Tensor):  # type: ignore[override]
            return {"logits": super().forward(x)}

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated, and met
        scripted = torch.jit.trace(Around(nn.ReLU()).eval(), EXAMPLE)
    masked = prune.l1_unstructured(conv(), "weight", 0.5)
    refused = [Two(nn.ReLU()), Answers(nn.ReLU()), scripted, Around(masked)]
    said = {name: said_by(make()) for name, make in EXCLUDED.items()}
    everything = "\n".join([*said.values(), *map(said_by, refused)])
    sentences = quoted()
    assert len(sentences) == len(EXCLUDED) + len(refused)
    assert [sentence for sentence in sentences if sentence not in everything] == []
    for name, reasons in said.items():
        assert any(sentence in reasons for sentence in sentences), f"{name}: {reasons}"


@pytest.mark.parametrize("name", EXCLUDED)
def test_the_rest_of_the_network_is_still_pruned(name):
    groups = {group.root: group.status for group in vpdeploy.find_groups(EXCLUDED[name](), EXAMPLE).groups}
    assert groups["last"] == "exact"
