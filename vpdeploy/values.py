"""The nouns of the road: plain, frozen values that one stage hands to the next. Nothing here imports torch at run time.

Tensors appear only in ``Dense``, ``Found`` and ``Tuned``; everything else is JSON.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import torch

Side = Literal["out", "in", "both"]
Status = Literal["exact", "approximate", "excluded"]
Interval = tuple[float, float]


# --- channels -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """One axis of one tensor in a group: which of its positions belong to which channel of the group.

    ``tensor`` is the qualified name of a parameter or buffer. ``side`` is "out" where a product writes the axis, "in" where
    one reads along it, "both" for what passes channels through (norms, biases, depthwise convolutions, bare parameters).
    ``indices[i]`` of the axis belongs to channel ``channels[i]`` of the group: a flattened map gives one channel many
    indices, a concatenation an offset.
    """

    tensor: str
    axis: int
    side: Side
    indices: tuple[int, ...]
    channels: tuple[int, ...]

    @property
    def module(self) -> str:
        return self.tensor.rpartition(".")[0]


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that must be kept or removed together. ``width`` counts them; ``root`` names a writer of the group."""

    root: str
    width: int
    members: tuple[Member, ...]
    status: Status = "exact"
    reason: str = ""
    difference: float | None = None  # relative difference of masked and removed, as probed

    @property
    def unit(self) -> int:
        """How many outputs of a layer one channel of the group is: 1, or as many as a head or a conv group holds."""
        return min((len(m.indices) // self.width for m in self.members if m.side == "out"), default=1)


@dataclass(frozen=True)
class ChannelGroups:
    """All groups of a network, in the order of its writers, as a forward on ``shape`` [c, h, w] showed them; ``path`` is a
    hash of what that forward did.
    """

    groups: tuple[ChannelGroup, ...]
    path: str = ""
    shape: tuple[int, ...] = ()

    @property
    def prunable(self) -> tuple[ChannelGroup, ...]:
        return tuple(group for group in self.groups if group.status != "excluded")


@dataclass(frozen=True)
class ChannelMask:
    """What stays. ``keep[root][channel]`` is True for a kept channel; groups that are absent are kept whole."""

    keep: Mapping[str, tuple[bool, ...]]

    def widths(self) -> dict[str, int]:
        return {root: sum(keep) for root, keep in self.keep.items()}


@dataclass(frozen=True)
class Selection:
    """A mask and how near it came to what was asked. Ratios are what remains, at most 1; amounts have the unit in their name."""

    mask: ChannelMask
    budget: str  # a key of [budget]
    requested: float
    reached: float
    limits: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # hard ones: requested, reached


@dataclass(frozen=True)
class PrunePlan:
    """All cuts of a network as data: enough to rebuild the pruned network from the dense one's weights.

    ``fits`` is the name and shape of every tensor of the dense network; ``kept[tensor][axis]`` the original indices
    that stay; ``attributes[module]`` the integers that describe the new widths; ``replacements`` the modules that must
    be exchanged first (module name -> name of an exact replacement in ``vpdeploy.models``).
    """

    fits: Mapping[str, tuple[int, ...]]
    kept: Mapping[str, Mapping[int, tuple[int, ...]]]
    attributes: Mapping[str, Mapping[str, int | tuple[int, ...]]]
    widths: Mapping[str, tuple[int, int]]  # group root -> (dense, kept)
    replacements: Mapping[str, str] = field(default_factory=dict)


class Conditions(NamedTuple):
    """Under which a time was taken; times under different ones are not compared."""

    engine: str
    device: str
    precision: str
    form: str
    threads: int
    batch: int


@dataclass(frozen=True)
class Term:
    """A part of what a network costs, due to ``module`` ("" for none): ``amount`` times the lengths of ``axes``, each a tensor
    of the backbone and one of its axes.
    """

    module: str
    amount: float
    axes: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Reach:
    """One quantity: with every group at its narrowest, as the budget asks (None: it does not speak of it), and dense."""

    quantity: str
    smallest: float
    requested: float | None
    dense: float


@dataclass(frozen=True)
class Price:
    """What networks of given widths cost on a target, before anything is trained.

    ``costs``: quantity ("latency_ms", "file_mib", "memory_mib") -> terms whose sum it is; ``dense``: the same of the dense
    network without a prompt, ``least`` of the narrowest one, both as measured; ``limits``: what a budget's sum may be so that
    the measured figure is as requested; ``alignment``: width multiple -> MACs per millisecond, relative to the best;
    ``round_to``: the multiple in use, under which the groups of ``whole`` cannot lose a channel; ``target``: what ran, in
    words, and ``conditions``; ``machine``: where; ``table_seconds`` of all ``seconds`` were for the table.
    """

    round_to: int
    costs: Mapping[str, tuple[Term, ...]]
    dense: Mapping[str, float]
    limits: Mapping[str, float]
    alignment: Mapping[str, float]
    table: tuple[Reach, ...]
    target: str
    conditions: Conditions | None
    machine: Mapping[str, str]
    least: Mapping[str, float] = field(default_factory=dict)
    whole: tuple[str, ...] = ()
    table_seconds: float = 0.0
    seconds: float = 0.0


# --- networks -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dense:
    """Stage 0's network, from which every arm starts. ``label_map[i]`` is the source class of target class i, or None."""

    backbone: torch.nn.Module
    label_map: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Found:
    """What stage 1 found.

    ``scores[root]``: [g] float32; ``prompt``: the prompt module's state (empty without one); ``tensors``: those of the dense
    network that the search changed, by name: norm statistics, and weights where the method trains them.
    """

    scores: Mapping[str, torch.Tensor]
    prompt: Mapping[str, torch.Tensor]
    tensors: Mapping[str, torch.Tensor]
    label_map: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Tuned:
    """One arm after stage 2: backbone and prompt state (empty when the arm ships none)."""

    backbone: torch.nn.Module
    prompt: Mapping[str, torch.Tensor]
    label_map: tuple[int, ...] | None = None


# --- proofs and measurements ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parity:
    """Agreement of torch and ONNX Runtime for one file. ``relative_error`` is the largest max|a-b| / max|a|."""

    form: str
    images: int
    batches: tuple[int, ...]
    relative_error: float
    top1_agreement: float
    logit_spread: float


@dataclass(frozen=True)
class Parities:
    """The parity of every exported form of one arm."""

    forms: tuple[Parity, ...]


@dataclass(frozen=True)
class GroupRecord:
    """One group as the certificate and the report tell it."""

    root: str
    width: int
    kept: int
    status: Status
    reason: str
    difference: float | None


@dataclass(frozen=True)
class Certificate:
    """What was proved of a cut: groups with status and reason, requested and reached, and the agreements measured.

    ``masked_vs_pruned`` is the largest relative difference of the logits on the real network with real images, in
    float64, ``masked_vs_pruned_random`` with random ones. Where approximate groups were cut, ``but_for_norms`` is the
    larger of both with norms that take no statistics; otherwise None. ``mask_effect`` is how far masking moves the logits
    of the real images from the dense network's: near 0 the agreement would prove nothing. ``replacements``: modules that
    were exchanged for equal ones first. ``torch_vs_onnx``: one Parity for each exported form, in the report alone:
    a file cannot tell what was measured of itself. ``limits``: hard ones beside the budget, requested and reached;
    ``measured_on``: what ran the network for those that only measuring can tell.
    """

    masked_vs_pruned: float
    images: int
    masked_vs_pruned_random: float
    but_for_norms: float | None
    mask_effect: float
    budget: str
    requested: float
    reached: float
    groups: tuple[GroupRecord, ...]
    replacements: Mapping[str, str] = field(default_factory=dict)
    torch_vs_onnx: tuple[Parity, ...] = ()
    limits: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    measured_on: str = ""


@dataclass(frozen=True)
class _Conditioned:
    engine: str
    device: str
    precision: str
    form: str
    threads: int
    batch: int

    @property
    def conditions(self) -> Conditions:
        return Conditions(self.engine, self.device, self.precision, self.form, self.threads, self.batch)


@dataclass(frozen=True)
class Latency(_Conditioned):
    """One distribution of run times of one exported file, interleaved with the other arms of the same run.

    ``images_per_second`` is of all rounds together. ``steady``: the first and the last half of them agree. ``openings``: for how
    many equal parts of the samples the files were opened anew.
    """

    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    images_per_second: float
    steady: bool
    samples_ms: tuple[float, ...]
    openings: int = 1


@dataclass(frozen=True)
class Memory:
    """A fresh process that runs one file: its peak resident set (VmHWM), its value before the session was made, how long
    the session took to make, and the first run.
    """

    form: str
    threads: int
    batch: int
    peak_rss_mib: float
    before_rss_mib: float
    load_ms: float
    first_run_ms: float


@dataclass(frozen=True)
class Layer:
    """One layer with products: outputs, products of one image, and how long ONNX Runtime takes for it and for what it fuses
    with it, at the headline conditions. The last one, without a name, is all the rest.
    """

    module: str
    width: int
    macs: int
    ms: float


@dataclass(frozen=True)
class Fold:
    """What the file computes in a cheaper form that is equal, or does not, and why: of the prompt's "tokens", and of the
    "read-out".
    """

    what: str
    done: bool
    how: str


@dataclass(frozen=True)
class BlockTokens:
    """Tokens that one block has. ``attention``: the share of its attention that goes to them, over validation images; None where
    they are not in it.
    """

    block: str
    count: int
    attention: float | None


@dataclass(frozen=True)
class TokenCost:
    """One way to write the network of an arm: "without tokens", "as published" (nothing folded) or "as shipped". ``times``: its
    median run time over that without tokens, of the same rounds, with an interval at 95 %.
    """

    form: str
    macs: int
    params: int
    file_bytes: int
    p50_ms: float
    times: float
    interval: Interval


@dataclass(frozen=True)
class Tokens:
    """The prompt's tokens in a transformer. ``count``: of each block, before condensation."""

    kind: str
    count: int
    blocks: tuple[BlockTokens, ...]
    costs: tuple[TokenCost, ...]
    conditions: Conditions


@dataclass(frozen=True)
class Measurement:
    """One arm, measured on the files that ship. Accuracies are fractions; intervals are at 95 %."""

    accuracy_top1: float
    accuracy_top1_interval: Interval
    accuracy_top1_torch: float
    n: int
    macs: int
    macs_uncounted: Mapping[str, int]  # operation -> how often it occurs without a count
    macs_preprocessing: int
    params: int
    file_bytes: Mapping[str, int]  # form -> bytes
    latency: tuple[Latency, ...]
    memory: tuple[Memory, ...]
    layers: tuple[Layer, ...] = ()
    compressed_bytes: Mapping[str, int] = field(
        default_factory=dict
    )  # form -> bytes by gzip, where weights were set to 0
    folds: tuple[Fold, ...] = ()  # of transformers
    tokens: Tokens | None = None


@dataclass(frozen=True)
class LatencyFactor(_Conditioned):
    """Dense p50 over this arm's p50, with a bootstrap interval at 95 %."""

    factor: float
    interval: Interval


@dataclass(frozen=True)
class FileFigures:
    """One file, measured beside others."""

    file_bytes: int
    latency: tuple[Latency, ...]
    memory: tuple[Memory, ...]
    factors: tuple[LatencyFactor, ...]  # the first file over this one; none of the first


@dataclass(frozen=True)
class FileBench:
    """Files measured in the same rounds, the first one the baseline."""

    files: Mapping[str, FileFigures]
    image_shape: tuple[int, ...]
    environment: Mapping[str, Any]

    @property
    def unsteady(self) -> list[Latency]:
        return [row for figures in self.files.values() for row in figures.latency if not row.steady]


@dataclass(frozen=True)
class Factors:
    """Dense over this arm: above 1 is better."""

    macs: float
    params: float
    file_bytes: Mapping[str, float]
    latency_p50: tuple[LatencyFactor, ...]


@dataclass(frozen=True)
class AccuracyDifference:
    """One arm minus another, dense unless said otherwise, paired: on the same test images.

    ``changed`` is the share of changed predictions.
    """

    difference: float
    interval: Interval
    changed: float
    n: int


@dataclass(frozen=True)
class EpochRecord:
    """One epoch as ``history.jsonl`` holds it. ``stage`` is "fit", "search:ARM" or "tune:ARM"."""

    stage: str
    epoch: int
    epochs: int
    loss: float
    accuracy_val: float
    seconds: float
    images_per_second: float


@dataclass(frozen=True)
class Report:
    """Everything ``report.json`` holds, and all that the pages are drawn from."""

    title: str
    arms: Mapping[str, Measurement]  # the first is the baseline, "dense"
    factors: Mapping[str, Factors]  # every other arm
    accuracy_difference: Mapping[str, AccuracyDifference]
    prompt_difference: Mapping[str, AccuracyDifference]  # arms with the prompt, each against the same without it
    certificates: Mapping[str, Certificate]  # every pruned arm
    history: tuple[EpochRecord, ...]
    skipped_images: tuple[str, ...]
    recipe: str  # the resolved recipe, TOML
    command: str
    environment: Mapping[str, Any]
    price: Price | None = None  # without the terms of its costs
    schema: int = 1


@dataclass(frozen=True)
class _Point:
    """One of several runs side by side, and how to get it again. ``difference``: against the first, on the same test images."""

    run: str
    command: str
    accuracy_top1: float
    accuracy_top1_interval: Interval
    n: int
    difference: AccuracyDifference | None


@dataclass(frozen=True)
class CondensedPoint(_Point):
    """Tokens that stayed by one score, and what came of it. ``score``: "" for all tokens, which come first; "scratch" for as few
    from the start.
    """

    score: str
    keep: float
    tokens: int
    published: TokenCost
    shipped: TokenCost
    conditions: Conditions


@dataclass(frozen=True)
class Condensation:
    """One search with fewer and fewer tokens; the first point has all."""

    title: str
    points: tuple[CondensedPoint, ...]
    environment: Mapping[str, Any]
    schema: int = 1


@dataclass(frozen=True)
class SweepPoint(_Point):
    """One budget of a sweep, and what the pruned arm came to; the dense one comes first. ``time`` is its median run time over
    dense's, of the same rounds, with an interval at 95 %, at ``conditions``; ``front``: the costs ("time", "macs", "file_bytes")
    at which no other point is as cheap and as accurate.
    """

    budget: str
    requested: float
    reached: float
    macs: int
    params: int
    file_bytes: int
    time: float
    time_interval: Interval
    conditions: Conditions | None
    front: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sweep:
    """One search cut at several budgets; the first point is the dense network."""

    title: str
    points: tuple[SweepPoint, ...]
    environment: Mapping[str, Any]
    schema: int = 1
