"""Writing a Deployable as one ONNX file."""

from __future__ import annotations

import ast
import copy
import gc
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import numpy_helper
from torch import nn

from vpdeploy.deploy.bake import Deployable, Resize
from vpdeploy.errors import ModelError
from vpdeploy.run_folder import write_bytes

SCOPES = "pkg.torch.onnx.name_scopes"
NOWHERE = "_empty_nn_module_stack"  # in place of a module, by torch 2.11, of operations that it makes itself
Core = onnx.ModelProto  # the graph of images that are resized already: that of form "float"
LIMIT_BYTES = 2**31 - 2**24  # a protobuf message holds less than 2 GiB; 16 MiB are left for the graph itself


def to_onnx(
    deployable: Deployable, path: Path, *, opset: int, metadata: Mapping[str, str], core: Core | None = None
) -> Core:
    """Write ``deployable`` to ``path``: input "image", output "logits", any batch (and any h and w for form "uint8").

    One file, without a second one for the weights. It appears under its name only when it is complete and checked. Exporting is
    slow, and both forms hold the same: give what the first returned as ``core`` of the second.

    Raises: ModelError when the network cannot be exported, or not with ``opset`` or a later one, or takes 2 GiB or
    more; RunFolderError when the file cannot be written.
    """
    size = sum(t.numel() * t.element_size() for t in deployable.state_dict().values())
    if size > LIMIT_BYTES:
        raise ModelError(
            f"{path.name}: the weights take {size / 2**30:.2f} GiB; one ONNX file holds less than 2 GiB: "
            "use a smaller network or a smaller budget"
        )
    core = _core(deployable, path, opset=opset) if core is None else core
    model = core
    if deployable.form == "uint8":
        model = _behind(_resizing(deployable.resize.image_size, deployable.resize.how, _opset_of(core)), core)
    onnx.helper.set_model_props(model, dict(sorted(metadata.items())))
    onnx.checker.check_model(model, full_check=True)
    write_bytes(path, model.SerializeToString())
    return core


def count_zeros(path: Path) -> int:
    """Entries that are 0 in the float constants of two axes or more: weights that were set to 0, as they ship."""
    arrays = (numpy_helper.to_array(tensor) for tensor in onnx.load(str(path)).graph.initializer)
    return sum(int((array == 0).sum()) for array in arrays if array.ndim > 1 and array.dtype.kind == "f")


def _core(deployable: Deployable, path: Path, *, opset: int) -> Core:
    """Form "float": what takes images that are resized already."""
    module = copy.copy(deployable)  # shares the weights
    module.form = "float"
    try:
        core = _trace(module, torch.zeros(2, 3, *[deployable.resize.image_size] * 2), ("n",), "logits", opset=opset)
    except torch.onnx.errors.OnnxExporterError as e:
        raise ModelError(
            f"{path.name}: torch {torch.__version__} cannot export this network to ONNX ({_reason(e)}); expected a "
            "forward of tensor operations that fits any batch size: rewrite that part of the model, or exclude it"
        ) from e
    if (reached := _opset_of(core)) < opset:
        raise ModelError(
            f"{path.name}: export.opset is {opset}, but the exporter of torch {torch.__version__} got no further than "
            f"{reached}; set export.opset = {reached}, or install a newer torch and onnxscript"
        )
    return core


@lru_cache(maxsize=8)
def _resizing(image_size: int, how: str, opset: int) -> onnx.ModelProto:
    """The resize alone. It knows nothing of the network behind it, so it is exported once."""
    module = Resize(image_size, how).eval()
    # Height and width differ from each other and from image_size, so that nothing is taken for a constant.
    example = torch.zeros(2, image_size + 7, image_size + 11, 3, dtype=torch.uint8)
    model = _trace(module, example, ("n", "h", "w"), "resized", opset=opset)
    for node in model.graph.node:
        node.name = _of_resize(node.name)
        node.input[:] = map(_of_resize, node.input)
        node.output[:] = map(_of_resize, node.output)
    for named in (*model.graph.initializer, *model.graph.output):
        named.name = _of_resize(named.name)
    return model


def _of_resize(name: str) -> str:
    """A name that the graph behind cannot have too; an empty one is an input left out."""
    return name if name in ("", "image") else f"resize/{name}"


def _behind(front: onnx.ModelProto, core: Core) -> onnx.ModelProto:
    """What ``core`` computes of the output of ``front``."""
    model = onnx.ModelProto()
    model.CopyFrom(core)
    for part in ("node", "input"):
        model.graph.ClearField(part)
        getattr(model.graph, part).extend(getattr(front.graph, part))
    model.graph.initializer.extend(front.graph.initializer)
    given = {"image": front.graph.output[0].name}
    for node in core.graph.node:
        behind = model.graph.node.add()
        behind.CopyFrom(node)
        behind.input[:] = [given.get(name, name) for name in node.input]
    return model


def _opset_of(model: onnx.ModelProto) -> int:
    return next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))


def _trace(
    module: nn.Module, example: torch.Tensor, axes: tuple[str, ...], output: str, *, opset: int
) -> onnx.ModelProto:
    """The graph as the dynamo exporter gives it, of any size of the ``axes`` that come first."""
    with _silence(), _seldom_collected(), torch.no_grad():
        program: Any = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            opset_version=opset,
            input_names=["image"],
            output_names=[output],
            dynamic_shapes=(dict(enumerate(axes)),),
            verbose=False,
        )
    return _without_traces(_named_by_module(program.model_proto))


def _named_by_module(model: onnx.ModelProto) -> onnx.ModelProto:
    """Nodes named after the module that they come from, such as "backbone.layer1.0.conv1/Conv": in a viewer and in a profile they
    are found again.
    """
    weights = {tensor.name for tensor in model.graph.initializer}
    seen: Counter[str] = Counter()
    for node in model.graph.node:
        owner = next(
            (name.rpartition(".")[0] for name in node.input if name in weights and name.endswith(".weight")), None
        )
        name = f"{_scope(node) if owner is None else owner}/{node.op_type}".lstrip("/")
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"
    return model


def _scope(node: onnx.NodeProto) -> str:
    """The innermost module that called the operation, as the exporter notes it: a list of names, the operation's own the last."""
    noted = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "[]")
    try:
        scopes = [str(name) for name in ast.literal_eval(noted) if not str(name).startswith(NOWHERE)]
        return scopes[-2] if len(scopes) > 1 else ""
    except (ValueError, SyntaxError):
        return ""


def _without_traces(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph without what only the exporter's authors need: every node carries the stack trace of the Python
    line that made it, with the paths of the machine that exported it, which for a small network is most of the file.
    """
    entries = [model.graph, *model.graph.node, *model.graph.input, *model.graph.output, *model.graph.value_info]
    for entry in [*entries, *model.graph.initializer, *model.functions]:
        entry.ClearField("metadata_props")
        entry.ClearField("doc_string")
    model.graph.ClearField("value_info")  # shapes that ONNX Runtime infers again at load
    model.ClearField("metadata_props")
    return model


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the exporter's logs and prints to itself: what fails is raised, and what it tries before helps no user."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()), warnings.catch_warnings():
            # torch 2.11 warns of its own use of a class that it deprecates.
            warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`", category=FutureWarning)
            yield
    finally:
        logging.disable(before)


@contextmanager
def _seldom_collected() -> Iterator[None]:
    """The exporter makes millions of small objects that live: looking through them for garbage takes a fifth of its time."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _reason(error: BaseException) -> str:
    """The innermost cause, one line: the exporter's own text is a page of advice about itself."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
