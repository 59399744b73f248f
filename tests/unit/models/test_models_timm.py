"""timm's networks: names, class counts, published weights by tag, and every way they can fail. Nothing is fetched."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import timm
import torch
from torch import nn

from vpdeploy.errors import ModelError
from vpdeploy.models.build import build, check_forward
from vpdeploy.recipe.tables import ModelTable


def table(name: str, **keys: Any) -> ModelTable:
    return ModelTable(name=f"timm:{name}", **keys)


def message(given: ModelTable, *, classes: int = 4) -> str:
    with pytest.raises(ModelError) as e:
        build(given, classes=classes, seed=0)
    return str(e.value)


def published(monkeypatch, answer: Any) -> list[str]:
    """Let ``answer`` give what timm would fetch; the list gets the names that it asks its store for."""
    asked: list[str] = []

    def fetch(name: str, *_: Any, **__: Any) -> Any:
        asked.append(name)
        return answer()

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", fetch)
    return asked


def trained(name: str, **arguments: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(9)
        return timm.create_model(name, **arguments).eval()


@pytest.mark.parametrize(("name", "classifier"), [
    ("resnet18", "fc"), ("mobilenetv3_small_050", "classifier"), ("convnext_atto", "head.fc"), ("vit_tiny_patch16_224", "head"),
    ("resnet18.a1_in1k", "fc"),
])  # fmt: skip
def test_networks_are_built_with_the_class_count(name, classifier):
    built = build(table(name), classes=7, seed=0)
    assert (built.head, built.classifier, built.source_classes) == ("keep", classifier, 7)
    assert not built.backbone.training
    check_forward(built.backbone, canvas_size=224, classes=7)


def test_arguments():
    built = build(table("resnet18", args={"num_classes": 9, "drop_rate": 0.5}), classes=4, seed=0)
    assert (built.head, built.source_classes) == ("replace", 9)
    assert built.backbone.get_submodule("fc").out_features == 4
    text = message(table("resnet18", args={"depth": 3}))
    assert text.startswith("model.args: timm's resnet18 failed with depth=3: TypeError: ")
    assert text.endswith("expected arguments that it takes")
    assert message(table("resnet18", args={"checkpoint_path": "x.pth"})) == (
        "model.args: got 'checkpoint_path' for a timm network; weights are named by model.weights: remove it"
    )


@pytest.mark.parametrize(("name", "hint"), [
    ("resnet19", "did you mean 'timm:resnet18'"),
    ("qqqqqqqqq", "timm.list_models() gives all names"),
    ("hf-hub:timm/resnet18", "timm has no such network"),
])  # fmt: skip
def test_unknown_names(name, hint):
    text = message(table(name))
    assert text.startswith(f"model.name: got 'timm:{name}'; timm has no such network; ") and hint in text


def test_names_with_an_unknown_tag_and_without_a_classifier():
    text = message(table("resnet18.a9_in1k"))
    assert text.startswith(
        "model.name: got 'timm:resnet18.a9_in1k'; timm's resnet18 has the tags a3_in1k, a2_in1k, a1_in1k "
    )
    assert text.endswith(" more: use one of these, or 'timm:resnet18'")
    assert message(table("qwen3_vit_88m_enc")) == (
        "model.name: got 'timm:qwen3_vit_88m_enc', which has no classifier; expected a network that ends in one: choose another"
    )


@pytest.mark.parametrize("broken", [None, "libtimm"])
def test_without_timm(monkeypatch, broken):
    if broken:
        monkeypatch.delitem(sys.modules, "timm")
        monkeypatch.setattr("builtins.__import__", failing(__import__))
    else:
        monkeypatch.setitem(sys.modules, "timm", None)
    what = "does not import: libtimm is gone" if broken else "is not installed"
    assert message(table("resnet18")) == (
        f"model.name: got 'timm:resnet18', but timm {what}; expected it beside vpdeploy: pip install \"vpdeploy[timm]\""
    )


def failing(original: Any) -> Any:
    def imported(name: str, *args: Any, **keys: Any) -> Any:
        if name == "timm":
            raise ImportError("libtimm is gone")
        return original(name, *args, **keys)

    return imported


@pytest.mark.parametrize(("name", "weights", "asked"), [
    ("resnet18", "DEFAULT", "timm/resnet18.a1_in1k"), ("resnet18", "a2_in1k", "timm/resnet18.a2_in1k"),
    ("resnet18.a2_in1k", "DEFAULT", "timm/resnet18.a2_in1k"), ("resnet18", "resnet18.a3_in1k", "timm/resnet18.a3_in1k"),
])  # fmt: skip
def test_published_weights(monkeypatch, name, weights, asked):
    state = trained("resnet18").state_dict()
    names = published(monkeypatch, lambda: dict(state))
    built = build(table(name, weights=weights), classes=4, seed=0)
    assert names == [asked]
    assert (built.head, built.source_classes) == ("replace", 1000)
    got = built.backbone.state_dict()
    assert all(torch.equal(got[key], value) for key, value in state.items() if not key.startswith("fc."))
    mapped = build(table(name, weights=weights, head="flm"), classes=4, seed=0).backbone.state_dict()
    assert all(torch.equal(mapped[key], value) for key, value in state.items())

    names.clear()
    again = build(table(name, weights=weights, head="replace"), classes=4, seed=0, with_weights=False)
    assert {k: v.shape for k, v in again.backbone.state_dict().items()} == {k: v.shape for k, v in got.items()}
    assert names == []


def test_published_weights_without_a_classifier_get_a_new_one(monkeypatch):
    name = "vit_small_patch14_dinov2"
    arguments = {"img_size": 28, "embed_dim": 24, "depth": 1, "num_heads": 2}
    state = trained(name, num_classes=0, **arguments).state_dict()
    published(monkeypatch, lambda: dict(state))
    built = build(table(name, weights="DEFAULT", args=arguments), classes=4, seed=0)
    assert (built.head, built.classifier) == ("replace", "head")
    got = built.backbone.state_dict()
    assert got["head.weight"].shape == (4, 24)
    assert len(got.keys() & state.keys()) > 5 and all(
        torch.equal(got[key], state[key]) for key in got.keys() & state.keys()
    )
    assert message(table(name, weights="DEFAULT", head="flm", args=arguments)).startswith("model.head: got 'flm', but ")


def test_several_classifiers_are_kept_or_refused(tmp_path):
    name = "deit_tiny_distilled_patch16_224"
    built = build(table(name), classes=4, seed=0)
    assert (built.head, built.classifier) == ("keep", "head")
    check_forward(built.backbone, canvas_size=224, classes=4)
    torch.save(trained(name, num_classes=4).state_dict(), tmp_path / "four.pt")
    assert build(table(name, weights=str(tmp_path / "four.pt")), classes=4, seed=0).head == "keep"
    assert message(table(name, weights=str(tmp_path / "four.pt")), classes=3) == (
        f"model.head: 'timm:{name}' has 2 classifiers (head, head_dist) of 4 classes, and the data 3; expected one that can "
        "be exchanged or mapped (head 'replace'): train it from scratch (without model.weights), or choose another network"
    )


def test_checkpoint_of_another_class_count(tmp_path):
    net = trained("resnet18", num_classes=5)
    torch.save(net.state_dict(), tmp_path / "five.pt")
    built = build(table("resnet18", weights=str(tmp_path / "five.pt"), head="ilm"), classes=3, seed=0)
    assert built.source_classes == 5
    assert all(torch.equal(a, b) for a, b in zip(built.backbone.parameters(), net.parameters(), strict=True))


def test_weights_that_there_are_not(monkeypatch):
    published(monkeypatch, dict)
    assert message(table("resnet18", weights="a9_in1k")).startswith(
        "model.weights: got 'a9_in1k'; timm's resnet18 has DEFAULT, a"
    )
    assert message(table("resnet18", weights="a9_in1k")).endswith(
        "; use one of these, or a file that ends in .pt, .pth, .th or .safetensors"
    )
    bare = next(name for name in timm.list_models() if not timm.list_pretrained(f"{name}*"))
    assert message(table(bare, weights="DEFAULT")) == (
        f"model.weights: got 'DEFAULT'; timm's {bare} has no published weights; give a file that ends in .pt, .pth, .th or "
        ".safetensors"
    )


@pytest.mark.parametrize("error", [OSError("no route to host"), RuntimeError("damaged"), Exception("proxy")])
def test_weights_that_cannot_be_fetched(monkeypatch, error):
    def answer() -> Any:
        raise error

    published(monkeypatch, answer)
    assert message(table("resnet18", weights="DEFAULT")) == (
        f"model.weights: 'DEFAULT' of timm's resnet18 could not be fetched (resnet18.a1_in1k): {error}; fetch that file by "
        "other means and give its path as model.weights"
    )
