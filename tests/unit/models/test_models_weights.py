"""Checkpoints: what is read, what is refused, and in which words."""

from __future__ import annotations

import pickle
from pathlib import Path, PurePosixPath

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vpdeploy.errors import ModelError
from vpdeploy.models.weights import fit_names, load_weights, read_tensors


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in got)


@pytest.mark.parametrize("wrap", [
    lambda s: s,
    lambda s: {"state_dict": s, "epoch": 3, "optimizer": {"state": {}}},
    lambda s: {"model": s},
    lambda s: {"model_state_dict": s, "ema": {"x": torch.zeros(1)}},
    lambda s: {"net": {"state_dict": s}},
    lambda s: {"ema": s},
    lambda s: {"weights": s},
    lambda s: {f"module.{k}": v for k, v in s.items()},
    lambda s: {"state_dict": {f"_orig_mod.{k}": v for k, v in s.items()}},
    lambda s: {f"module._orig_mod.{k}": v for k, v in s.items()},
    lambda s: {"n_averaged": torch.tensor(5), **{f"module.{k}": v for k, v in s.items()}},
])  # fmt: skip
@pytest.mark.parametrize("zipped", [True, False])
def test_state_dict_is_found_and_unwrapped(tmp_path: Path, wrap, zipped):
    state = dict(net().state_dict())
    torch.save(wrap(state), tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    assert_same(read_tensors(tmp_path / "a.pt"), state)


def test_safetensors(tmp_path: Path):
    state = dict(net().state_dict())
    save_file({f"module.{k}": v for k, v in state.items()}, tmp_path / "a.safetensors")
    assert_same(read_tensors(tmp_path / "a.safetensors"), state)


def test_plain_values_beside_tensors_are_left_out(tmp_path: Path):
    torch.save({"weight": torch.ones(1), "epoch": 3}, tmp_path / "a.pt")
    assert list(read_tensors(tmp_path / "a.pt")) == ["weight"]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(("content", "named"), [
    (net(), "torch.nn.modules.container.Sequential"),
    ({"state_dict": net().state_dict(), "path": PurePosixPath("x")}, "pathlib.PurePosixPath"),
])  # fmt: skip
def test_pickled_objects_are_refused(tmp_path: Path, content, named, zipped):
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(ModelError) as e:
        read_tensors(tmp_path / "a.pt")
    text = str(e.value)
    assert text.startswith(f"{tmp_path / 'a.pt'}: holds pickled objects (")
    assert ("pathlib" if "pathlib" in named else named) in text
    assert text.endswith("expected tensors only: save model.state_dict() and give that file")


class Evil:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_in_a_pickle_does_not_run(tmp_path: Path):
    for protocol in (2, 4):
        (tmp_path / "a.th").write_bytes(pickle.dumps({"w": Evil(tmp_path / "ran")}, protocol=protocol))
        with pytest.raises(ModelError):
            read_tensors(tmp_path / "a.th")
    assert not (tmp_path / "ran").exists()


def test_plain_pickles_are_refused_as_pickles(tmp_path: Path):
    (tmp_path / "a.pt").write_bytes(pickle.dumps({"w": [1.0, 2.0]}, protocol=4))
    with pytest.raises(ModelError, match="holds pickled objects, which can run code when read; expected tensors only"):
        read_tensors(tmp_path / "a.pt")


def test_missing_file_and_folder(tmp_path: Path):
    with pytest.raises(ModelError, match=r"a\.pt: no such file; expected a checkpoint: .*: check model\.weights"):
        read_tensors(tmp_path / "a.pt")
    with pytest.raises(ModelError, match=r": a folder; expected a checkpoint"):
        read_tensors(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.95])
def test_cut_off_files(tmp_path: Path, zipped, share):
    torch.save({"w": torch.rand(500)}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(
        ModelError, match=r"a\.pt: damaged, or no checkpoint: .*; expected what torch\.save.*save it again$"
    ):
        read_tensors(tmp_path / "a.pt")


@pytest.mark.parametrize(
    "content",
    [b"hello world, this is text", b"\x89PNG\r\n\x1a\n" * 9, b"PK\x03\x04" + b"x" * 99],
    ids=["text", "picture", "zip"],
)
def test_other_files(tmp_path: Path, content):
    (tmp_path / "a.th").write_bytes(content)
    with pytest.raises(ModelError, match=r"a\.th: damaged, or no checkpoint: "):
        read_tensors(tmp_path / "a.th")
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(
        ModelError, match=r"a\.safetensors: damaged, or no safetensors file: .*: fetch or save it again"
    ):
        read_tensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize(("content", "got"), [
    ({"my_net": {"w": torch.ones(1)}, "epoch": 1}, "a dictionary with the keys 'my_net', 'epoch'"),
    ({}, "a dictionary with the keys none"),
    ([torch.ones(1)], "a list"),
    (torch.ones(1), "a Tensor"),
])  # fmt: skip
def test_no_state_dict_inside(tmp_path: Path, content, got):
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ModelError) as e:
        read_tensors(tmp_path / "a.pt")
    assert f"a.pt: got {got}; expected names and tensors, at the top or under one of state_dict, " in str(e.value)


# --- into a network -------------------------------------------------------------------------------------------------


def test_loading_fills_everything_and_old_checkpoints_need_no_counters():
    source, target = net(), net()
    tensors = {name: torch.rand_like(t.float()) for name, t in source.state_dict().items() if t.ndim}
    load_weights(target, tensors, where="a.pt")
    assert all(torch.equal(target.state_dict()[name], t) for name, t in tensors.items())


def test_missing_unexpected_and_misshapen_tensors_are_told_together():
    tensors = dict(net().state_dict())
    del tensors["1.running_mean"], tensors["1.weight"]
    tensors["0.weight"] = torch.zeros(4, 3, 3, 3)
    tensors["fc.bias"] = torch.zeros(1)
    with pytest.raises(ModelError) as e:
        load_weights(net(), tensors, where="model.weights a.pt")
    assert str(e.value) == (
        "model.weights a.pt: its 5 tensors do not fit; expected the 6 of Sequential; give the checkpoint of this "
        "network, or name the network that it is of\n"
        "  2 missing: 1.weight, 1.running_mean\n"
        "  1 unexpected: fc.bias\n"
        "  1 of another shape: 0.weight [4, 3, 3, 3] where the network has [4, 3, 1, 1]"
    )


def test_missing_and_unexpected_alone_are_errors_too():
    tensors = dict(net().state_dict())
    with pytest.raises(ModelError, match=r"1 unexpected: x$"):
        load_weights(net(), {**tensors, "x": torch.ones(1)}, where="a.pt")
    del tensors["0.weight"]
    with pytest.raises(ModelError, match=r"1 missing: 0\.weight$"):
        load_weights(net(), tensors, where="a.pt")


def test_long_lists_are_cut_at_ten():
    big = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in range(13)))
    with pytest.raises(
        ModelError, match=r"13 missing: 0\.weight, .*, 9\.weight and 3 more\n  12 unexpected: .* and 2 more$"
    ):
        load_weights(big, {f"x{i}": torch.ones(1) for i in range(12)}, where="a.pt")


def test_model_prefix_goes_only_where_that_fits():
    state = dict(net().state_dict())
    lightning = {f"model.{name}": t for name, t in state.items()}
    assert_same(fit_names(net(), lightning), state)
    assert_same(fit_names(net(), state), state)

    class Wrapper(nn.Module):
        def __init__(self, name: str):
            super().__init__()
            self.add_module(name, net())

    assert_same(fit_names(Wrapper("model"), lightning), lightning)
    assert_same(fit_names(Wrapper("module"), state), {f"module.{name}": t for name, t in state.items()})
