"""Files that are timed stand for networks that could ship."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from budgeted import workbench

from vpdeploy import pipeline
from vpdeploy.measure.engines import Setting
from vpdeploy.pricing.candidates import Candidates
from vpdeploy.pricing.network import Network

SHUFFLE = (
    "n, c, h, w = y.shape\n"
    "        y = y.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)\n"
    "        return self.c(y.mean((2, 3)))"
)


def test_a_network_whose_graph_cannot_be_followed_is_exported_each_time(tmp_path):
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n\n\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b, self.c = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 24, 3), nn.Linear(24, 10)\n\n"
        "    def forward(self, x):\n"
        "        y = torch.relu(self.b(torch.relu(self.a(x))))\n"
        f"        {SHUFFLE}\n"
    )
    work = workbench(tmp_path, {"macs_ratio": 0.5}, model={"name": f"{tmp_path / 'net.py'}:Net"})
    groups = pipeline.grouped(work)
    (tmp_path / "files").mkdir()
    files = Candidates(work, groups, tmp_path / "files", form="float", prompted=True)
    least = np.array([8.0] * len(groups.prunable))
    files.check(least)
    subject = files.subject(least)
    assert files.graph is None and subject.path is not None
    assert subject.module is not None
    images = np.random.default_rng(0).random((2, 3, 8, 8), np.float32)
    from vpdeploy.measure.engines import open_session

    network = Network.of(work, groups)
    cost = network.shapes.sum_of(files.byte_terms(network.shapes, least))
    removed = files.whole.stat().st_size - subject.path.stat().st_size
    assert cost.at(network.cost.dense_widths) - cost.at(least) == pytest.approx(removed, rel=1e-9)
    with torch.no_grad():
        expected = subject.module()(torch.from_numpy(images)).numpy()
    assert np.allclose(open_session(subject, Setting())(images), expected, rtol=1e-3, atol=1e-5)


def test_a_shuffle_that_the_narrowest_network_does_not_tell_is_found(tmp_path):
    """Of eight channels in eight groups: whichever part of the split is 8, they stay in place."""
    (tmp_path / "net.py").write_text(
        "import torch\nfrom torch import nn\n\n\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b, self.c = nn.Conv2d(3, 64, 3), nn.Conv2d(64, 24, 1), nn.Linear(24, 10)\n\n"
        "    def forward(self, x):\n"
        "        n, c, h, w = (y := torch.relu(self.a(x))).shape\n"
        "        y = y.view(n, 8, c // 8, h, w).transpose(1, 2).reshape(n, c, h, w)\n"
        "        return self.c(torch.relu(self.b(y)).mean((2, 3)))\n"
    )
    work = workbench(tmp_path, {"macs_ratio": 0.5}, model={"name": f"{tmp_path / 'net.py'}:Net"})
    groups = pipeline.grouped(work)
    assert groups.prunable
    files = Candidates(work, groups, tmp_path, form="float", prompted=True)
    assert files.graph is not None
    narrowest = Network.of(work, groups).narrowest(1)
    assert files._follows(narrowest)
    files.check(narrowest)
    assert files.graph is None
